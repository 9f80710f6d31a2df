"""Where a run computes: its processes (one, or those that torchrun starts), their devices and number formats."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ced.config import Mode
from ced.errors import ProcessError

_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among the processes of a run, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process reports progress and writes the shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            with _lost_process_explained():
                dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return the first process's `value` in every process."""
        if self.size == 1:
            return value
        values = [value]
        with _lost_process_explained():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_process_explained():
            dist.all_gather_object(values, value)
        return values


@contextmanager
def _lost_process_explained() -> Iterator[None]:
    """Turn the error of a lost connection into one that points to the process that failed."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError("another process of this run has stopped; its own message explains why") from error


def join_processes() -> World:
    """Join the run: all processes under torchrun (NCCL with GPUs, gloo without), otherwise this process alone.

    Raises:
        ProcessError: a launcher other than torchrun left out a variable, or there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and (missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]):
        raise ProcessError(f"WORLD_SIZE is {size} without {', '.join(missing)}; start several processes by torchrun")
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ProcessError(f"process {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        # Processes may synchronise as rarely as once a run, and one may have far more work than another. They stay
        # joined until they exit: a second group of the same processes could find the addresses of the first.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return World(rank, size, device)


def half_type(mode: Mode, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit type that a mode computes in on a device; None: fp32, as for fp16 on a CPU, which is slow."""
    if mode == "amp" and device.type == "cpu":
        return None
    return {"amp": torch.float16, "amp_bf16": torch.bfloat16, "off": None}[mode]


def autocast(mode: Mode, device: torch.device) -> torch.autocast:
    """Return the context in which a network computes in the precision of `mode`."""
    half = half_type(mode, device)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)
