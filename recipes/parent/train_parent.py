"""Train the bundled parent: a small NemotronH hybrid that thinks, from scratch on CPU cores.

Each optimiser step draws its problems from (seed, step), takes the loss on the assistant's turns
only, and sums gradients over ranks in one flat buffer. Experts are balanced without an auxiliary
loss: after each step the routers' correction biases move towards the mean load. The learning rate
warms up, stays, and falls linearly to zero over the last part of the run, so `--minutes` may be
changed on `--resume`. Knows nothing of nested sizes.

    torchrun --nproc-per-node 2 recipes/parent/train_parent.py --out RUN_DIR --minutes 75
"""

import argparse
import gc
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import scan
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accuracy import greedy_completions, num_correct_by_task
from data import IGNORED, MicroBatch, step_batches
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM

from star_elastic.evaluate.tasks import (
    FULL_TRACE_SHARE,
    NO_TRACE_SHARE,
    TASKS,
    sample_problems,
)

PATTERN = "M*EM*EM*EME"
MODEL = {
    "hidden_size": 192,
    "hybrid_override_pattern": PATTERN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 16,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "chunk_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "intermediate_size": 128,  # of MLP layers, of which the pattern has none
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "initializer_range": 0.05,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run does; every default is defined here."""

    out: Path
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    sequences_per_step: int = 96
    rows_per_micro_batch: int = 24
    peak_lr: float = 2.5e-3
    warmup_steps: int = 100
    decay_share: float = 0.25
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    balance_rate: float = 1e-3
    log_interval_steps: int = 20
    save_interval_seconds: float = 120.0
    eval_interval_seconds: float = 420.0
    eval_per_task: int = 40

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise SystemExit("minutes and steps: give exactly one of them")

    def settings(self) -> dict[str, object]:
        """What a card should state: the fields, without the directory, and the data's shares."""
        fields = {name: value for name, value in asdict(self).items() if name != "out"}
        return {**fields, "full_trace_share": FULL_TRACE_SHARE, "no_trace_share": NO_TRACE_SHARE}

    def progress(self, step: int, seconds: float) -> float:
        """The part of the run that is done, 0 to 1."""
        done = step / self.steps if self.steps else seconds / (self.minutes * 60)
        return min(done, 1.0)

    def lr_factor(self, step: int, progress: float) -> float:
        """Warm-up, then constant, then linear decay over the last `decay_share`."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return warmup * min(1.0, (1.0 - progress) / self.decay_share)


class RouterLoad:
    """Counts which experts the real (unpadded) tokens choose, and moves the correction biases."""

    def __init__(self, model: NemotronHForCausalLM) -> None:
        self.gates = [layer.mixer.gate for layer in model.model.layers if layer.block_type == "moe"]
        self.counts_LE = torch.zeros(len(self.gates), model.config.n_routed_experts)
        self._real_N = torch.zeros(0, dtype=torch.bool)
        for index, gate in enumerate(self.gates):
            gate.register_forward_hook(partial(self._count, index))

    def expect(self, real_BT: torch.Tensor) -> None:
        """Say which positions of the next forward are not padding."""
        self._real_N = real_BT.flatten()

    def _count(self, index: int, _: torch.nn.Module, __: tuple, output: tuple) -> None:
        choices_NK = output[2]
        if len(choices_NK) == len(self._real_N):
            chosen = choices_NK[self._real_N].flatten()
            self.counts_LE[index] += torch.bincount(chosen, minlength=self.counts_LE.shape[1])

    def update(self, counts_LE: torch.Tensor, rate: float) -> None:
        """bias += rate * sign(mean load - load), for counts summed over ranks."""
        for gate, counts_E in zip(self.gates, counts_LE, strict=True):
            gate.e_score_correction_bias += rate * torch.sign(counts_E.mean() - counts_E)
        self.counts_LE.zero_()


class FlatGradients:
    """All gradients in one buffer, with room for a few more sums: one all-reduce per step."""

    def __init__(self, model: torch.nn.Module, num_extra: int) -> None:
        parameters = list(model.parameters())
        num_grads = sum(p.numel() for p in parameters)
        self.buffer = torch.zeros(num_grads + num_extra)
        self.grads, self.extra = self.buffer[:num_grads], self.buffer[num_grads:]
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.grad = self.grads[start:end].view_as(parameter)
            start = end

    def all_reduce(self) -> None:
        """Sum over ranks."""
        if dist.is_initialized():
            dist.all_reduce(self.buffer)


def build_model(tokenizer, seed: int) -> NemotronHForCausalLM:
    """The parent at initialisation, fp32."""
    config = NemotronHConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **MODEL,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="grouped_mm"
        )


def build_optimizer(model: torch.nn.Module, run: Run) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": run.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=run.peak_lr, betas=(0.9, 0.95), fused=True)


def micro_batch_loss(
    model: NemotronHForCausalLM, batch: MicroBatch, load: RouterLoad, num_targets: int
) -> torch.Tensor:
    """Summed cross-entropy of the next tokens, over the targets of the whole step."""
    load.expect(batch.ids_BT != model.config.pad_token_id)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(batch.ids_BT, use_cache=False).logits
    losses = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        batch.labels_BT[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return losses / num_targets


def save_checkpoint(
    path: Path, model, optimizer, position: dict[str, float], settings: dict[str, object]
) -> None:
    """Weights, biases, optimiser state and position in one safetensors file, renamed into place."""
    tensors = {f"model.{name}": t.detach() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    partial = path.with_suffix(".partial")
    save_file(
        {name: t.contiguous() for name, t in tensors.items()},
        partial,
        metadata={"position": json.dumps(position), "run": json.dumps(settings)},
    )
    os.replace(partial, path)


def load_checkpoint(path: Path, model, optimizer=None) -> dict[str, float]:
    """Restore what `save_checkpoint` wrote; returns the position."""
    with safe_open(path, "pt") as file:
        state = {
            name.removeprefix("model."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (safe_open is not a dict)
            if name.startswith("model.")
        }
        model.load_state_dict(state)
        if optimizer is not None:
            for name, parameter in model.named_parameters():
                optimizer.state[parameter] = {
                    key: file.get_tensor(f"optimizer.{key}.{name}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return json.loads(file.metadata()["position"])


def validation_accuracy(model, tokenizer, num_per_task: int, rank: int, num_ranks: int) -> dict:
    """Greedy accuracy per task with thinking on validation problems, shared out over ranks."""
    problems = sample_problems(TASKS, "validation", num_per_task, seed=0)
    mine = problems[rank::num_ranks]
    texts = greedy_completions(model, tokenizer, mine, thinking=True, batch_size=256)
    counts = num_correct_by_task(mine, texts)
    counts_K = torch.tensor([float(counts.get(name, 0)) for name in TASKS])
    if dist.is_initialized():
        dist.all_reduce(counts_K)
    accuracy = {
        name: round(n / num_per_task, 3) for name, n in zip(TASKS, counts_K.tolist(), strict=True)
    }
    return {"mean": round(sum(accuracy.values()) / len(accuracy), 4), **accuracy}


def train(run: Run, *, resume: bool) -> None:
    """The whole run on this rank."""
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    scan.install()
    tokenizer = train_tokenizer()
    model = build_model(tokenizer, run.seed).train()
    optimizer = build_optimizer(model, run)
    load = RouterLoad(model)
    flat = FlatGradients(model, num_extra=load.counts_LE.numel() + 2)
    position = {"step": 0, "tokens": 0, "targets": 0, "seconds": 0.0}
    checkpoint = run.out / "checkpoint.safetensors"
    if resume:
        position = load_checkpoint(checkpoint, model, optimizer)
    run.out.mkdir(parents=True, exist_ok=True)
    log = (run.out / "metrics.jsonl").open("a") if rank == 0 else None

    def write_log(**record: object) -> None:
        if log is not None:
            print(json.dumps(record), file=log, flush=True)
            print(json.dumps(record), flush=True)

    write_log(event="start", num_parameters=sum(p.numel() for p in model.parameters()), **position)
    since, last_save, last_eval = dict(position), position["seconds"], position["seconds"]
    begun = time.monotonic() - position["seconds"]
    losses: list[float] = []
    loads: list[float] = []
    progress = run.progress(position["step"], position["seconds"])
    while progress < 1.0:
        batches = step_batches(
            tokenizer,
            seed=run.seed,
            step=position["step"],
            sequences_per_step=run.sequences_per_step,
            rows_per_micro_batch=run.rows_per_micro_batch,
        )
        num_targets = sum(batch.num_targets for batch in batches)
        flat.buffer.zero_()
        loss_sum = 0.0
        for index, batch in enumerate(batches):
            # Snake order: with batches sorted by length, every rank gets short and long ones.
            turn, slot = divmod(index, num_ranks)
            if (slot if turn % 2 == 0 else num_ranks - 1 - slot) == rank:
                loss = micro_batch_loss(model, batch, load, num_targets)
                loss.backward()
                loss_sum += loss.item()
        flat.extra[:-2] = load.counts_LE.flatten()
        flat.extra[-2] = loss_sum
        flat.extra[-1] = (time.monotonic() - begun) / num_ranks
        flat.all_reduce()
        counts_LE = flat.extra[:-2].view_as(load.counts_LE).clone()
        loss_sum, position["seconds"] = flat.extra[-2:].tolist()

        factor = run.lr_factor(position["step"], progress)
        grad_norm = flat.grads.norm()
        flat.grads.mul_((run.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        for group in optimizer.param_groups:
            group["lr"] = run.peak_lr * factor
        optimizer.step()
        load.update(counts_LE, run.balance_rate * factor)
        position["step"] += 1
        position["targets"] += num_targets
        position["tokens"] += sum(int((b.ids_BT != tokenizer.pad_token_id).sum()) for b in batches)
        progress = run.progress(position["step"], position["seconds"])
        losses.append(loss_sum)
        loads.append((counts_LE.amax(1) / counts_LE.mean(1)).max().item())

        if position["step"] % run.log_interval_steps == 0 or progress >= 1.0:
            seconds = position["seconds"] - since["seconds"]
            write_log(
                step=position["step"],
                loss=round(sum(losses) / len(losses), 4),
                tokens=position["tokens"],
                tokens_per_second=round((position["tokens"] - since["tokens"]) / seconds),
                lr=round(run.peak_lr * factor, 6),
                grad_norm=round(grad_norm.item(), 3),
                max_load=round(sum(loads) / len(loads), 2),
                seconds=round(position["seconds"]),
            )
            since, losses, loads = dict(position), [], []
        done = progress >= 1.0
        if done or position["seconds"] - last_save > run.save_interval_seconds:
            last_save = position["seconds"]
            if rank == 0:
                save_checkpoint(checkpoint, model, optimizer, position, run.settings())
        if done or position["seconds"] - last_eval > run.eval_interval_seconds:
            last_eval = position["seconds"]
            accuracy = validation_accuracy(model, tokenizer, run.eval_per_task, rank, num_ranks)
            load.counts_LE.zero_()
            write_log(step=position["step"], validation=accuracy)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    del model, optimizer
    gc.collect()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the run's directory")
    parser.add_argument("--minutes", type=float, help="wall time of all training together")
    parser.add_argument("--steps", type=int, help="optimiser steps of all training together")
    parser.add_argument("--seed", type=int, default=Run.seed)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--smoke", action="store_true", help="a few small steps of the same path")
    args = parser.parse_args()
    if args.smoke:
        run = Run(
            out=args.out,
            steps=args.steps or 4,
            seed=args.seed,
            sequences_per_step=16,
            rows_per_micro_batch=8,
            warmup_steps=2,
            log_interval_steps=1,
            eval_per_task=1,
        )
    else:
        run = Run(out=args.out, minutes=args.minutes, steps=args.steps, seed=args.seed)
    train(run, resume=args.resume)


if __name__ == "__main__":
    main()
