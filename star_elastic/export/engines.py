"""Which engines and GPUs run a checkpoint, and why not: what is known of them, as rules.

Known as of transformers 5.24, compressed-tensors 0.20, vLLM 0.32 and llama.cpp's converter of 2026;
nothing is run here, but the tests run transformers on every kind that it is said to run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from star_elastic.architectures import read_config
from star_elastic.architectures.config_file import Config
from star_elastic.axes import AxisMap
from star_elastic.checkpoints.companions import is_elastic
from star_elastic.checkpoints.layouts import (
    MODELOPT_FILE,
    read_scheme,
    scheme_of_modelopt,
)
from star_elastic.checkpoints.written_config import (
    DTYPE,
    EAGER,
    EXPERTS,
    KERNEL_MULTIPLE,
    OLD_DTYPE,
    grouped_products_fit,
)
from star_elastic.files.paths import has_file
from star_elastic.quant.scheme import Scheme

UNPACK = "unpack to BF16: less memory, no faster products"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether something runs a checkpoint, and what there is to know about it."""

    engine: str
    runs: bool
    note: str


def check_engines(path: str | Path) -> list[Verdict]:
    """What runs the checkpoint in a directory. Raises ConfigError for one that cannot be read."""
    path = Path(path)
    config = read_config(path)
    axis_map = config.axis_map
    is_modelopt = has_file(path / MODELOPT_FILE)
    scheme = scheme_of_modelopt(path, axis_map) if is_modelopt else read_scheme(config, axis_map)
    verdicts = [_star_elastic(is_modelopt), _transformers(config, axis_map, scheme, is_modelopt)]
    verdicts += [_vllm(axis_map, scheme), _llama_cpp(scheme)]
    if is_elastic(path):
        first, *others = verdicts
        verdicts = [first, *(_of_family(verdict) for verdict in others)]
    return [*verdicts, *_arithmetic(scheme)]


def _of_family(verdict: Verdict) -> Verdict:
    """Of an engine that knows nothing of sizes."""
    alone = "as its largest size alone; cut the others with star-elastic slice"
    return replace(verdict, note=f"{alone}; {verdict.note}") if verdict.runs else verdict


def _star_elastic(is_modelopt: bool) -> Verdict:
    if is_modelopt:
        return Verdict("star-elastic", False, "reads compressed-tensors, not ModelOpt's layout")
    return Verdict("star-elastic", True, "CPU and GPU")


def _transformers(
    config: Config, axis_map: AxisMap, scheme: Scheme | None, is_modelopt: bool
) -> Verdict:
    engine = "transformers"
    if is_modelopt:
        return Verdict(engine, False, "does not read ModelOpt's layout; slice without --layout")
    packed = scheme is not None and scheme.format.packed
    if packed and _quantises_experts(axis_map, scheme):
        note = (
            "ignores the global scales of fused NVFP4 experts without a word: wrong results; keep "
            '"routed experts", or use fp8'
        )
        return Verdict(engine, False, note)
    dtype = config.get(DTYPE) or config.get(OLD_DTYPE)
    if packed and dtype != "bfloat16":
        note = (
            f"unpacks NVFP4 to BF16, but config.json names {dtype}: load it with "
            "dtype=torch.bfloat16"
        )
        return Verdict(engine, False, note)
    note = "CPU and GPU"
    if scheme is not None:
        note = f"with the package compressed-tensors{', in BF16' if packed else ''}; CPU and GPU"
    if not grouped_products_fit(axis_map, 4 if dtype == "float32" else 2):
        shape = f"expert_ffn={_expert_width(axis_map)}, hidden={axis_map.axes['hidden'].size}"
        if config.get(EXPERTS) != EAGER:
            note = (
                f"its grouped products want other widths than {shape}: load it with "
                'experts_implementation="eager"'
            )
            return Verdict(engine, False, note)
        note += f"; slowly, its grouped products want other widths than {shape}"
    return Verdict(engine, True, note)


def _vllm(axis_map: AxisMap, scheme: Scheme | None) -> Verdict:
    engine = "vLLM"
    experts = _expert_width(axis_map)
    where = "GPU" if experts or (scheme and scheme.format.packed) else "GPU and CPU"
    packs = scheme is not None and scheme.format.packed and _quantises_experts(axis_map, scheme)
    if packs and experts % KERNEL_MULTIPLE:
        note = (
            f"{where}; FlashInfer's NVFP4 experts reject expert_ffn={experts}, which is no "
            f"multiple of {KERNEL_MULTIPLE}; other kernels do not"
        )
        return Verdict(engine, True, note)
    return Verdict(engine, True, where)


def _llama_cpp(scheme: Scheme | None) -> Verdict:
    if scheme is None:
        return Verdict("llama.cpp", True, "with its own converter to GGUF")
    note = "its converter wants the unquantised slice, and quantises itself"
    return Verdict("llama.cpp", False, note)


def _arithmetic(scheme: Scheme | None) -> list[Verdict]:
    """Which GPUs multiply in the format itself; others unpack first."""
    if scheme is None:
        return []
    if scheme.format.packed:
        return [
            Verdict("Blackwell (10.0, 12.0)", True, "multiplies NVFP4 itself"),
            Verdict("Hopper, Ada and older", True, UNPACK),
        ]
    return [
        Verdict("Ada, Hopper, Blackwell (8.9 and up)", True, "multiply FP8 themselves"),
        Verdict("Ampere and older", True, UNPACK),
    ]


def _expert_width(axis_map: AxisMap) -> int:
    """Neurons of a routed expert; 0 if there are none."""
    return axis_map.axes["expert_ffn"].size if "expert_ffn" in axis_map.axes else 0


def _quantises_experts(axis_map: AxisMap, scheme: Scheme | None) -> bool:
    return scheme is not None and any(spec.routed for spec in scheme.quantised(axis_map).values())
