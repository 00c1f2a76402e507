"""Many ranks: PyTorch's FSDP2 under torchrun, on NCCL or gloo. One process is the same with one.

Every block of the elastic model is a sharded unit: its parameters are gathered before its forward,
where they are sliced, and its gradients are averaged over the ranks. The router is small and whole
on every rank. Long waits go over gloo in either case.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from star_elastic.errors import ConfigError, StarElasticError, reason
from star_elastic.models.elastic import ElasticModel
from star_elastic.signals import num_ranks

PATIENCE = timedelta(days=1)
"""How long ranks wait for one that writes or quantises a checkpoint, where other collectives give
up after minutes."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all that train together. `patient`: a gloo group of the same ranks, whose
    collectives wait for `PATIENCE`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    patient: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in their order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def agree(self, value: Any) -> Any:
        """The first rank's (picklable) value, on every rank."""
        if self.size == 1:
            return value
        given = [value]
        dist.broadcast_object_list(given, src=0, device=self.device)
        return given[0]

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What some work gives (picklable) that only the first rank does, on every rank. An error
        of ours is raised on every rank."""
        value, problem = None, None
        if self.is_first:
            try:
                value = work()
            except StarElasticError as error:
                problem = error
        value, problem = self.agree((value, problem))
        if problem is not None:
            raise problem
        return value

    def wait(self) -> None:
        """Waits until all ranks are here, however long the work of one takes."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def average_gradients(self, module: nn.Module) -> None:
        """The mean over ranks of the gradients of a module that is whole on every rank; those of
        sharded modules are averaged already."""
        if self.size == 1:
            return
        for parameter in (p for p in module.parameters() if p.requires_grad):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.size

    def shard(self, model: ElasticModel) -> ElasticModel:
        """Shards a model's parameters over the ranks, block by block, in place."""
        if self.size == 1:
            return model
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        inside = {p for block in model.blocks for p in block.parameters()}
        fully_shard(model, mesh=self.mesh, ignored_params=inside)
        register_fsdp_forward_method(model, "hidden_states")
        return model


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has units for bf16 products. Without them a CPU, or a GPU before Ampere,
    imitates such products, several times slower than those in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    units = torch.cpu.get_capabilities()
    return any(units.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


@contextmanager
def join_world() -> Iterator[World]:
    """The world that torchrun set up, or this process alone.

    Uses the rank's CUDA device and NCCL where there are any, else the CPU and gloo. Raises
    ConfigError if there are fewer devices than ranks on this machine, or if the caller has set up a
    process group of its own.
    """
    size = num_ranks()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {local} of this machine has no GPU ({torch.cuda.device_count()} found); start "
            "torchrun with --nproc-per-node of that many"
        )
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if size == 1:
        yield World(device=device)
        return
    if dist.is_initialized():
        raise ConfigError(
            "a process group is initialised already; training makes its own: destroy it first"
        )
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    except (ValueError, RuntimeError) as error:  # no address, or one that is taken
        raise ConfigError(
            f"WORLD_SIZE={size}, but the ranks cannot meet ({reason(error)}); start with torchrun"
        ) from None
    try:
        mesh = init_device_mesh(device.type, (size,))
        patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield World(dist.get_rank(), size, device, mesh, patient)
    finally:
        dist.destroy_process_group()
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
