"""What work costs, measured in processes of their own: elapsed time, processor time, peak memory."""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

Work = Callable[[], object]  # what is measured

# A small process of its own, because the memory of the parent counts for a forked process.
LAUNCH = """if True:
    import json, os, sys, time
    begin = time.perf_counter()
    pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
    _, status, usage = os.wait4(pid, 0)
    print(json.dumps([time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
    sys.exit(status != 0)
"""


@dataclass(frozen=True)
class Cost:
    """What a piece of work took."""

    seconds: float
    processor: float  # seconds
    memory: float | None  # MB; None: not measured


def of_work(prepare: Callable[..., Work], *arguments: Any) -> Cost:
    """Return the cost of the work that `prepare` returns, in a process of its own; preparing is not counted.

    The memory is the peak of resident memory above what the process had after preparing.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        cost: Cost = receiver.recv()
    except EOFError as error:
        raise SystemExit(f"{prepare.__name__} failed; its own message is above") from error
    process.join()
    return cost


def _measure(sender: Connection, prepare: Callable[..., Work], arguments: Iterable[Any]) -> None:
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    result = work()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    sender.send(Cost(seconds, processor, _status("VmHWM") - before))
    del result


def _status(name: str) -> float:
    """Return a figure of this process in MB: VmRSS, its resident memory, or VmHWM, the peak of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def of_command(command: Sequence[str | Path]) -> Cost:
    """Return the cost of a command, whose memory is the peak of the resident memory of its largest process.

    Processes that it starts count as far as it waits for their end.
    """
    return _launched(command)[0]


def of_processes(command: Sequence[str | Path]) -> Cost:
    """Return the cost of a command and of all processes that it starts; their memory is not measured.

    Their processor time is read a few times a second, because a command does not wait for all of them.
    """
    cost, watched = _launched(command, watch=True)
    return Cost(cost.seconds, max(watched, cost.processor), None)


def _launched(command: Sequence[str | Path], watch: bool = False) -> tuple[Cost, float]:
    """Run a command; return its cost and the processor seconds of the whole tree, if `watch`."""
    launcher = [sys.executable, "-S", "-c", LAUNCH, *map(str, command)]
    with subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        tree = _Tree(process.pid)
        if watch:
            tree.start()
        output, errors = process.communicate()
        tree.ended.set()
        if watch:
            tree.join()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{errors}")
    return Cost(*json.loads(output.splitlines()[-1])), tree.processor


class _Tree(Thread):
    """Adds up the processor time of the descendants of a process, also of those that have ended."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.ended = Event()
        self._root = psutil.Process(root)
        self._found: dict[tuple[int, float], float] = {}

    @property
    def processor(self) -> float:
        """The seconds so far."""
        return sum(self._found.values())

    def run(self) -> None:
        """Look a few times a second."""
        while not self.ended.wait(0.2):
            with suppress(psutil.NoSuchProcess):
                for process in self._root.children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        times = process.cpu_times()
                        self._found[process.pid, process.create_time()] = times.user + times.system
