"""Which engines and GPUs run a checkpoint, and why not: what is known of them, as rules.

Known as of transformers 5.23, compressed-tensors 0.20, vLLM 0.32 and llama.cpp's converter of 2026;
nothing is run here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from star_elastic.axes import AxisMap
from star_elastic.errors import ConfigError
from star_elastic.families import family_of, read_config
from star_elastic.quant.layout import MODELOPT_FILE, Scheme, read_scheme, scheme_of_modelopt

GROUPED_MULTIPLE, KERNEL_MULTIPLE = 8, 128
"""Of expert widths: what PyTorch's grouped products take in BF16, what FlashInfer's NVFP4 experts
do."""

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
    axis_map = family_of(config).axis_map(config)
    is_modelopt = (path / MODELOPT_FILE).is_file()
    scheme = scheme_of_modelopt(path, axis_map) if is_modelopt else read_scheme(config, axis_map)
    verdicts = [_star_elastic(is_modelopt), _transformers(axis_map, scheme, is_modelopt)]
    verdicts += [_vllm(axis_map, scheme), _llama_cpp(scheme)]
    return [*verdicts, *_arithmetic(scheme)]


def _star_elastic(is_modelopt: bool) -> Verdict:
    if is_modelopt:
        return Verdict("star-elastic", False, "reads compressed-tensors, not ModelOpt's layout")
    return Verdict("star-elastic", True, "CPU and GPU")


def _transformers(axis_map: AxisMap, scheme: Scheme | None, is_modelopt: bool) -> Verdict:
    engine = "transformers"
    if is_modelopt:
        return Verdict(engine, False, "does not read ModelOpt's layout; slice without --layout")
    experts = _expert_width(axis_map)
    if scheme is None:
        if experts % GROUPED_MULTIPLE:
            note = f"slowly: expert_ffn={experts} is no multiple of {GROUPED_MULTIPLE}"
            return Verdict(engine, True, note)
        return Verdict(engine, True, "CPU and GPU")
    if scheme.format.packed and _quantises_experts(axis_map, scheme):
        note = (
            "ignores the global scales of fused NVFP4 experts without a word: wrong results; keep "
            '"routed experts", or use fp8'
        )
        return Verdict(engine, False, note)
    return Verdict(engine, True, "with the package compressed-tensors; CPU and GPU")


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


def _quantises_experts(axis_map: AxisMap, scheme: Scheme) -> bool:
    return any(spec.routed for spec in scheme.quantised(axis_map).values())


def require_readable(path: Path) -> None:
    """Raises ConfigError for a checkpoint in ModelOpt's layout, which is for engines."""
    if (path / MODELOPT_FILE).is_file():
        raise ConfigError(
            f"{path} is in ModelOpt's layout, which star-elastic writes for engines and does not "
            "read; name the quantised family, or a slice in the layout of compressed-tensors"
        )
