"""Where a run computes: its processes (one, or those that torchrun starts), their devices and number formats.

When torchrun loses a process or a machine, it starts the command again in all processes. They join again, and the
walks find what the job has written: the parts of a store, or the experiment that has the job's id.
"""

import atexit
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ced.config import Mode
from ced.errors import ProcessError
from ced.files import writing

_UNNAMED = "none"  # the id of all jobs on several machines that have no --rdzv-id
_CLAIM_WAIT = 120.0  # seconds until a network file system has released the lock of a lost machine (NFS: 90)
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_JOIN_TIMEOUT = timedelta(minutes=10)
_SHARED_WAIT = 60.0  # seconds until a network file system shows new files on other machines
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.I)  # in errors of torch.distributed


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
            with lost_process_explained():
                dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Return the first process's `value` in every process."""
        if self.size == 1:
            return value
        values = [value]
        with lost_process_explained():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_process_explained():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, settings: Mapping[str, object]) -> None:
        """Check that every process has the same settings.

        Raises:
            ProcessError: one differs; the message has its name and both values.
        """
        mine = socket.gethostname(), dict(settings)
        for rank, (host, values) in enumerate(found := self.gather(mine)):
            first_host, first = found[0]
            for name in first:
                if values[name] != first[name]:
                    raise ProcessError(
                        f"{name} is {_short(first[name])} in process 0 on {first_host}, and {_short(values[name])} in "
                        f"process {rank} on {host}; all processes of a run need the same settings and data"
                    )

    def check_shared(self, folder: Path) -> None:
        """Check that every process sees the folder that a run writes to; the first process can write to it.

        Raises:
            ProcessError: one does not; the message has the names of the machines.
            WriteError: the first process cannot write to it.
        """
        if self.size == 1:
            return
        # No other folder has a file of this name, and no machine has cached that there is none.
        mark = folder / str(self.broadcast(f".shared.{secrets.token_hex(4)}.partial"))
        if self.is_main:
            with writing(mark):
                mark.touch()
        self.barrier()
        deadline = time.monotonic() + _SHARED_WAIT
        while not (seen := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.5)
        found = self.gather((socket.gethostname(), seen))
        if self.is_main:
            mark.unlink(missing_ok=True)
        for rank, (host, seen) in enumerate(found):
            if not seen:
                raise ProcessError(
                    f"process {rank} on {host} does not see the folder {folder} in which process 0 on {found[0][0]} "
                    "writes; outputpath has to be the same folder of a file system that all machines share"
                )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def lost_process_explained() -> Iterator[None]:
    """Turn the error of a lost connection into one that points to the process that failed.

    Raises:
        ProcessError: the connection to another process was lost.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ProcessError(
            f"another process of this run has stopped, and its own message explains why, or cannot be reached: {reason}"
        ) from error


def job_names(world: World) -> list[str]:
    """Return the names by which a job of torchrun finds its experiments again; none without torchrun.

    A job has one name, its id: `--rdzv-id`, or what torchrun draws on a single machine. On several machines without
    `--rdzv-id` all jobs have the same id. Such a job has a name for each machine instead, that of the folder of
    torchrun's logs, which is drawn when torchrun begins and stays when it restarts its processes.

    All processes call this.
    """
    # <folder>/attempt_0/0/error.json. The count of attempts is no help: it does not change when a machine is added.
    logs = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    folders = set(world.gather(logs[2].name if len(logs) > 2 else ""))
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job == _UNNAMED:
        return sorted(folders - {""})
    return [] if job is None else [job]


def claim_wait() -> float:
    """Return the seconds to wait for the lock of an output, which a lost process of the same job may still have."""
    return _CLAIM_WAIT if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


def join_processes() -> World:
    """Join the run: all processes under torchrun (NCCL with GPUs, gloo without), otherwise this process alone.

    Raises:
        ProcessError: a launcher other than torchrun left out a variable, there are more processes than GPUs, or a
            process did not join.
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
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Processes may synchronise as rarely as once a run, and one may have far more work than another. They stay
        # joined until they exit: a second group of the same processes could find the addresses of the first.
        store = _meet(rank, size)
        with lost_process_explained():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return World(rank, size, device)


def _meet(rank: int, size: int) -> Any:
    """Wait until all processes have started; return the key-value store through which they find each other.

    Raises:
        ProcessError: one of them did not start in ten minutes.
    """
    started = [f"started {each}" for each in range(size)]
    try:
        store = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))[0]
        store.set(started[rank], "")
        store.wait(started, _JOIN_TIMEOUT)
    except (dist.DistError, OSError) as error:
        minutes = _JOIN_TIMEOUT.total_seconds() / 60
        raise ProcessError(
            f"process {rank} of {size} could not join the others in {minutes:g} minutes: one of them has not started, "
            f"or this machine cannot connect to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        ) from error
    return store


def half_type(mode: Mode, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit type that a mode computes in on a device; None: fp32, as for fp16 on a CPU, which is slow."""
    if mode == "amp" and device.type == "cpu":
        return None
    return {"amp": torch.float16, "amp_bf16": torch.bfloat16, "off": None}[mode]


def autocast(mode: Mode, device: torch.device) -> torch.autocast:
    """Return the context in which a network computes in the precision of `mode`."""
    half = half_type(mode, device)
    return torch.autocast(device.type, dtype=half, enabled=half is not None)
