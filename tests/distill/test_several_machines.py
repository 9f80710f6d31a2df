"""Two machines on loopback: torchrun agents with one process each, which are killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from ced.config import StoreConfig, TrainConfig, check, dump
from ced.distill.experiment import create_folder
from ced.distill.store import store
from ced.distill.view_store import ViewStore
from tests.distill.trainings import free_ports, measurements, settings

REPOSITORY = Path(__file__).parents[2]
SECONDS = 600  # in which a run ends, even on a busy machine
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as docs/several-machines.md has it
}
TEACHER = """
import time

def ten(mel):
    time.sleep(0.02)  # so that there is time for a kill
    return mel.mean(2)[:, :10].sigmoid()
"""


class Machine:
    """A machine, on which a scheduler starts the agent of torchrun again whenever it ends with an error."""

    def __init__(self, name: str, folder: Path, port: str, words: list[str], machines: str = "2") -> None:
        options = ["--nnodes", machines, "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "job"]
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        # Seconds: between signs of life, and for the second of "1:2" machines to join.
        timing = ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=10,last_call_timeout=60"]
        self.command = [sys.executable, "-m", "torch.distributed.run", *options, *rendezvous, *timing]
        self.command += ["-m", "ced", *words]
        self.log, self.folder, self.starts = folder / f"{name}.log", folder, 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        with self.log.open("a") as log:
            self.agent = subprocess.Popen(
                self.command, cwd=self.folder, env=os.environ | ENVIRONMENT, stdout=log, stderr=log
            )

    def is_done(self) -> bool:
        """Return whether the agent has ended well; it is started again if it has failed."""
        if self.agent.poll():
            assert self.starts < 6, self.log.read_text()[-3000:]
            self.start()
        return self.agent.poll() == 0

    def lose(self) -> None:
        """Kill the agent and its worker at once, as by a power cut."""
        workers = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        for process in (self.agent.pid, *map(int, workers)):
            os.kill(process, signal.SIGKILL)
        self.agent.wait()


def run_and_lose(folder: Path, words: list[str], losses: Mapping[str, Callable[[], bool]]) -> dict[str, Machine]:
    """Run a command on two machines, and lose each of the named ones once its condition holds.

    The machine `first` has the store of the rendezvous.
    """
    (port,) = free_ports(1)
    machines = {"first": Machine("first", folder, port, words)}
    deadline = time.monotonic() + SECONDS
    while not _accepts(int(port)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    machines["second"] = Machine("second", folder, port, words)
    waiting = dict(losses)
    try:
        while True:
            done = [machine.is_done() for machine in machines.values()]  # each, as this restarts those that failed
            if all(done):
                break
            assert time.monotonic() < deadline, "\n".join(one.log.read_text()[-3000:] for one in machines.values())
            for name in list(waiting)[:1]:
                if waiting[name]():
                    del waiting[name]
                    machines[name].lose()
            time.sleep(0.02)
    finally:
        for machine in machines.values():
            if machine.agent.poll() is None:
                machine.lose()
    assert not waiting, "the run ended before a machine was lost"
    return machines


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run_by_two(folder: Path, words: list[str]) -> None:
    """Run a command in two processes that are not interrupted."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ced", *words],
            cwd=folder,
            env=os.environ | ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=SECONDS) for process in processes] == [0, 0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux to find the workers")


@needs_proc
@pytest.mark.slow
def test_a_student_is_trained_to_the_same_bytes_when_machines_are_lost(sounds: Path, tmp_path: Path) -> None:
    """Both machines are lost, one after the other; the second loss takes the rendezvous with it.

    The bytes are those of two uninterrupted processes. One process sums the gradients in another order, so its weights
    differ by rounding: `test_two_processes_train_as_one_does`.
    """
    epochs = 60
    keys = settings(sounds, tmp_path, logitspath=sounds / "store", eval_data=sounds / "eval.tsv", num_classes=4)
    keys |= {"epochs": epochs, "mixup": 0.5, "early_stop": None, "warmup_iters": 3}

    def words(name: str) -> list[str]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump(check(TrainConfig, keys | {"outputpath": tmp_path / name}, "test")))
        return ["train", str(path)]

    def trained(count: int) -> Callable[[], bool]:
        logs = (tmp_path / "lost/lost").glob
        return lambda: any(f'"epoch": {count},' in path.read_text() for path in logs("*/metrics.jsonl"))

    machines = run_and_lose(tmp_path, words("lost"), {"second": trained(3), "first": trained(20)})
    run_by_two(tmp_path, words("whole"))
    (lost,), (whole,) = (tmp_path / "lost/lost").iterdir(), (tmp_path / "whole/whole").iterdir()
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (lost, whole)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (lost / name).read_bytes() == (whole / name).read_bytes()
    lines = [[line | {"seconds": 0} for line in measurements(folder)] for folder in (lost, whole)]
    assert lines[0] == lines[1]
    assert [line["epoch"] for line in lines[0]] == list(range(1, epochs + 1))
    log = (lost / "train.log").read_text()
    assert log.count("resuming after epoch") >= 2
    assert (lost / "job.txt").read_text() == "job\n"
    assert min(machine.starts for machine in machines.values()) >= 2


@needs_proc
@pytest.mark.slow
def test_a_machine_that_stays_behind_alone_trains_to_the_end(sounds: Path, tmp_path: Path) -> None:
    keys = settings(sounds, tmp_path, logitspath=sounds / "store", num_classes=4) | {"warmup_iters": 3}
    path = tmp_path / "alone.yaml"
    path.write_text(dump(check(TrainConfig, keys | {"epochs": 60, "outputpath": tmp_path}, "test")))
    (port,) = free_ports(1)
    deadline = time.monotonic() + SECONDS
    first = Machine("first", tmp_path, port, ["train", str(path)], "1:2")
    while not _accepts(int(port)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = Machine("second", tmp_path, port, ["train", str(path)], "1:2")
    try:
        while not any('"epoch": 5,' in found.read_text() for found in tmp_path.glob("alone/*/metrics.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        log = first.log.read_text()
        assert "2 process(es)" in log
        second.lose()
        assert first.agent.wait(deadline - time.monotonic()) == 0
    finally:
        for machine in (first, second):
            if machine.agent.poll() is None:
                machine.lose()
    (folder,) = (tmp_path / "alone").iterdir()
    assert len(measurements(folder)) == 60
    assert "1 process(es)" in first.log.read_text()[len(log) :]


@needs_proc
@pytest.mark.slow
def test_a_store_has_the_same_bytes_when_machines_are_lost(sounds: Path, tmp_path: Path) -> None:
    """Its rows are those of one process, and its files those of two."""
    (tmp_path / "homemade.py").write_text(TEACHER)
    keys = {"train_data": sounds / "train.tsv", "model": "homemade:ten", "topk": 3, "chunk_length": 1, "batch_size": 4}
    keys |= {"epochs": 20, "num_workers": 1, "seed": 7, "spectransforms": None}

    def words(name: str) -> list[str]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump(check(StoreConfig, keys | {"outputpath": tmp_path / name}, "test")))
        return ["store", str(path)]

    lost, whole, alone = (tmp_path / name / "homemade_ten/train/chunk_1" for name in ("lost", "whole", "alone"))
    second, first = lost / "logits_ep3_1.h5", lost / "logits_ep10_0.h5"
    run_and_lose(tmp_path, words("lost"), {"second": second.exists, "first": first.exists})
    run_by_two(tmp_path, words("whole"))
    assert contents(lost) == contents(whole)
    subprocess.run(
        [sys.executable, "-m", "ced", *words("alone")], cwd=tmp_path, env=os.environ | ENVIRONMENT, check=True
    )
    for epoch in range(1, 21):
        one, two = ViewStore(alone).rows(epoch), ViewStore(lost).rows(epoch)
        for name in ("values", "indexes", "seeds", "filenames", "starts", "ends"):
            np.testing.assert_array_equal(getattr(two, name), getattr(one, name))


# Run in two processes, each in a folder of its own; a network file system would show new files later.
APART = """
import ced.distill.distributed
from ced.cli import main
ced.distill.distributed._SHARED_WAIT = 1.0
main()
"""


@pytest.mark.parametrize("command", ["train", "train --resume begun", "store"])
def test_machines_that_share_no_folder_end_with_one_error(command: str, sounds: Path, tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    keys = settings(sounds, Path("out"), logitspath=sounds / "store", eval_data=None, num_classes=4)
    if command == "store":
        keys = {"train_data": sounds / "train.tsv", "outputpath": "out", "model": "homemade:ten", "topk": 3}
        keys |= {"chunk_length": 1, "epochs": 1}
    processes = []
    name, *options = command.split()
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "homemade.py").write_text(TEACHER)
        (folder / "run.yaml").write_text(json.dumps(keys, default=str))
        if "--resume" in command and rank == 0:
            create_folder(check(TrainConfig, keys, "test"), str(folder)).rename(folder / "begun")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", APART, name, "run.yaml", *options],
                cwd=folder,
                env=os.environ | ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": "0"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, printed = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
        (error,) = (line for line in printed.splitlines() if "error" in line.lower())
        assert "does not see the folder" in error
        assert ("begun" if options else "out") in error
        assert "process 1" in error
        assert socket.gethostname() in error
        assert "Traceback" not in printed


def test_any_number_of_processes_completes_a_store(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two begin it; one adds epochs in two parts each, with the bytes of two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "homemade", raising=False)
    (tmp_path / "homemade.py").write_text(TEACHER)
    keys = {"train_data": sounds / "train.tsv", "model": "homemade:ten", "topk": 3, "chunk_length": 1, "batch_size": 16}
    keys |= {"epochs": 1, "num_workers": 1, "outputpath": "out"}
    config = check(StoreConfig, keys, "test")
    Path("run.yaml").write_text(dump(config))
    run_by_two(tmp_path, ["store", "run.yaml"])
    run_by_two(tmp_path, ["store", "run.yaml", "--epochs", "2", "--outputpath", "two"])
    folder = store(config.model_copy(update={"epochs": 2}))
    assert contents(folder) == contents(Path("two/homemade_ten/train/chunk_1"))
