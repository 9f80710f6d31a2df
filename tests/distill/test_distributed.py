from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from ced.distill import distributed
from ced.distill.distributed import World, job_names, join_processes, lost_process_explained
from ced.errors import ProcessError, WriteError
from tests.distill.trainings import free_ports


def test_a_single_process_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_processes()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    world.barrier()
    assert world.broadcast("a") == "a"
    assert world.gather(3) == [3]


def test_a_launcher_that_omits_a_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProcessError, match=r"WORLD_SIZE is 2 .* MASTER_PORT"):
        join_processes()


def test_a_process_that_nobody_joins_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_JOIN_TIMEOUT", timedelta(seconds=1))
    place = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": free_ports(1)[0]}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=r"process 0 of 2 could not join .*127\.0\.0\.1"):
        join_processes()


class Together(World):
    """The first of two processes, whose values are gathered as if the second one were on another machine."""

    other: Any = None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]

    def broadcast(self, value: Any) -> Any:
        return value


def test_other_settings_on_a_machine_are_named() -> None:
    world = Together(0, 2, torch.device("cpu"))
    world.other = ("elsewhere", {"seed": 42, "epochs": 3})
    world.check_same({"seed": 42, "epochs": 3})
    with pytest.raises(ProcessError, match=r"epochs is 4 in process 0 on .*, and 3 in process 1 on elsewhere"):
        world.check_same({"seed": 42, "epochs": 4})


def test_only_errors_of_a_lost_connection_are_explained() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5528")
    for error in (lost, torch.distributed.DistNetworkError("Broken pipe")):
        with pytest.raises(ProcessError, match="another process") as found, lost_process_explained():
            raise error
        assert str(error) in found.value.message
    with pytest.raises(RuntimeError, match="size of tensor"), lost_process_explained():
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")


def test_the_names_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --rdzv-id, all jobs on several machines have the id "none"; folders of logs distinguish them."""
    world = Together(0, 2, torch.device("cpu"))
    world.other = "none_second"
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert job_names(world) == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert job_names(world) == ["7"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_x/none_first/attempt_3/0/error.json")
    assert job_names(world) == ["none_first", "none_second"]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")  # without logs
    assert job_names(world) == ["none_second"]


def test_the_shared_folder_has_to_be_writable(tmp_path: Path) -> None:
    world = Together(0, 2, torch.device("cpu"))
    with pytest.raises(WriteError, match="missing"):
        world.check_shared(tmp_path / "missing")
