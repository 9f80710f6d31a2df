import pytest

from ced.distill.distributed import join_processes
from ced.errors import ProcessError


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
