"""Ranks and devices. A single process is a world of size 1, in which every function works too."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vca.runtime.errors import ConfigError, RankZeroError
from vca.runtime.signals import end_workers

COLLECTIVE_TIMEOUT_MINUTES = 24 * 60.0  # sampling, evaluation, compilation: ranks finish at different times


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process: the local rank selects the device, the global rank the data.

    `cpu_group` is a process group for tensors on the CPU; None is the default group.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    cpu_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only process that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place; it must be on `device`."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def start_sum(self, number: int) -> Callable[[], int]:
        """Start to sum a number over all ranks; the returned function waits for the sum and returns it.

        It uses CPUs only, so that it does not wait for a GPU.
        """
        if self.size == 1:
            return lambda: number
        total = torch.tensor([number])
        work = dist.all_reduce(total, group=self.cpu_group, async_op=True)

        def wait() -> int:
            work.wait()
            return int(total.numpy()[0])

        return wait

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 and return its result on every rank; its error is raised on every rank."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = function()
            except ConfigError as error:
                outcome = error
            except Exception as error:
                self.broadcast(RankZeroError(f"rank 0 failed: {error}"))  # else the other ranks wait for it
                raise
        outcome = self.broadcast(outcome)
        if isinstance(outcome, (ConfigError, RankZeroError)):
            raise outcome
        return outcome

    def from_main_slowly(self, function: Callable[[], Any]) -> Any:
        """`from_main` for work that may take longer than the time limit of collectives."""
        outcome, error = None, None
        with self.wait_for_slowest():
            try:
                outcome = function() if self.is_main else None
            except Exception as problem:  # raised on every rank below
                error = problem

        def result() -> Any:
            if error is not None:
                raise error
            return outcome

        return self.from_main(result)

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable values of all ranks on rank 0, an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def raise_first(self, error: Exception | None) -> None:
        """Raise the error of the lowest rank that has one on every rank; return if no rank has one."""
        errors = [error]
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
        for first in errors:
            if first is not None:
                raise first

    @contextmanager
    def wait_for_slowest(self) -> Iterator[None]:
        """Wait on exit until every rank has finished the block, without the time limit of collectives.

        For work whose duration differs between ranks by more than that limit, such as compilation. The wait fails if
        another rank exits.
        """
        if self.size == 1:
            yield
            return
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(minutes=COLLECTIVE_TIMEOUT_MINUTES))
        yield
        dist.barrier(group)
        dist.destroy_process_group(group)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


ONE = World(0, 0, 1, torch.device("cpu"))  # a single process without a process group


def pick_device(name: str, local_rank: int, key: str = "trainer.device") -> torch.device:
    """Return the device for `cpu`, `cuda` or `auto` on this rank.

    Raises:
        ConfigError: about `key`, if no GPU is visible for this local rank.
    """
    gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ConfigError(
            f"{key}={name} needs a GPU for local rank {local_rank}, but {gpus} are visible; "
            f"set {key}=cpu or --nproc_per_node={max(gpus, 1)}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def start(device: str, timeout_minutes: float = 10.0, key: str = "trainer.device") -> Iterator[World]:
    """Join the process group that torchrun describes in the environment; on exit, leave it and end loader workers.

    A nested `start` uses the group of the outer one. `timeout_minutes` is the limit of a collective, `key` the config
    key of the device, for error messages.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, local_rank, size, pick_device(device, local_rank, key))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    join = size > 1 and not dist.is_initialized()
    if join:
        check_restart()
        limit = timedelta(minutes=timeout_minutes)
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", timeout=limit)
        if world.device.type == "cuda":
            world = replace(world, cpu_group=dist.new_group(backend="gloo", timeout=limit))
    try:
        yield world
    finally:
        end_workers()
        if join:
            dist.destroy_process_group()


def check_restart() -> None:
    """Raise `ConfigError` if torchrun restarted the ranks with a store that contains the old ranks' addresses."""
    restarts, shared = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), "TORCHELASTIC_USE_AGENT_STORE"
    if restarts and os.environ.get(shared) == "True":  # https://github.com/pytorch/pytorch/issues/135712
        raise ConfigError("torchrun --max_restarts requires TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment")


def is_main_process() -> bool:
    """Whether this is rank 0; does not need a process group."""
    return int(os.environ.get("RANK", 0)) == 0
