import numpy as np
import pytest

from ced.errors import ConfigError
from ced.sound.audio import SoundBytes
from ced.tag.intake import Allowance, Limits, RefusedError, Room, Upload, check_cost, load

RATE = 16_000


def test_an_allowance_is_a_minutes_worth_for_each_client() -> None:
    now = 0.0
    allowance = Allowance(3, clock=lambda: now)
    assert [allowance.ask("a") for _ in range(3)] == [0, 0, 0]
    assert allowance.ask("a") == pytest.approx(20)
    assert allowance.ask("b") == 0  # has its own
    now = 19.0
    assert allowance.ask("a") == pytest.approx(1)
    now = 20.0
    assert allowance.ask("a") == 0
    assert allowance.ask("a") == pytest.approx(20)  # asking in vain costs nothing
    now = 100.0
    assert [allowance.ask("a") for _ in range(4)] == [0, 0, 0, pytest.approx(20)]


def test_who_asked_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ced.tag.intake._KNOWN_CLIENTS", 3)
    allowance = Allowance(2, clock=lambda: 0.0)
    for client in ("a", "b", "c", "a", "d"):
        assert allowance.ask(client) == 0
    assert list(allowance._empty) == ["c", "a", "d"]  # never more than are known
    assert allowance.ask("a") > 0


def test_a_room_has_so_many_places() -> None:
    room = Room(2)
    assert [room.enter() for _ in range(3)] == [True, True, False]
    assert (room.taken, room.full) == (2, True)
    room.leave()
    assert room.enter()


@pytest.mark.parametrize(
    ("samples", "window", "hop", "allowed"),
    [
        (60 * RATE, 10.0, 10.0, True),
        (60 * RATE, 7.0, 7.0, True),  # the last window is as short as what is left
        (60 * RATE, 60.0, 60.0, True),
        (60 * RATE, 0.5, 0.5, False),  # 120 windows, a second each
        (29 * RATE, 0.5, 0.5, True),
        (60 * RATE, 10.0, 5.0, False),
        (30 * RATE, 10.0, 5.0, True),
        (100, 0.5, 0.1, True),
    ],
)
def test_what_windows_cost(samples: int, window: float, hop: float, allowed: bool) -> None:
    if allowed:
        check_cost(samples, window, hop, 60)
        return
    with pytest.raises(RefusedError, match="60 s is the most in a request") as refused:
        check_cost(samples, window, hop, 60)
    assert refused.value.status == 413


def test_a_sound_is_not_decoded_beyond_what_is_allowed() -> None:
    wave = np.linspace(-0.5, 0.5, 3 * RATE, dtype=np.float32)
    np.testing.assert_array_equal(load(Upload("a", (wave, RATE)), 3.0), wave)
    with pytest.raises(RefusedError, match=r"a is longer than 2\.9 s") as refused:
        load(Upload("a", (wave, RATE)), 2.9)
    assert refused.value.status == 413


def test_limits_that_cannot_be() -> None:
    for limits, said in (
        ({"megabytes": 0.0}, r"the limit megabytes is 0\.0; it must be a number above 0"),
        ({"seconds": float("nan")}, "the limit seconds is nan"),
        ({"megabytes": float("inf")}, "the limit megabytes is inf"),
        ({"waiting": -1}, "waiting must be 0 or more"),
        ({"a_minute": 0}, "a_minute 1 or more"),
    ):
        with pytest.raises(ConfigError, match=said):
            Limits(**limits)
    assert Limits(megabytes=0.5).bytes == 500_000


def test_clients_are_not_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ced.sound.ffmpeg.find_spec", lambda name: None)
    with pytest.raises(RefusedError, match=r"a: .*cannot be decoded.*; readable are complete files of WAV") as refused:
        load(Upload("a", SoundBytes(b"\0\0\0\x20ftypM4A " + bytes(100), "a")), 1.0)
    assert "pip" not in str(refused.value)
