import io

import numpy as np
import pytest
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.sound.labels import ClassTable
from ced.tag.records import Scored
from ced.tag.timeline import (
    WIDTH,
    Filter,
    Heat,
    Overview,
    Timeline,
    clock,
    heat_picture,
    mel_picture,
    over_time,
    png,
    ticks,
    unit,
)


def array(*rows: list[float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def made(*probs: list[float]) -> Timeline:
    """A sound of overlapping windows of 2 s, one a second."""
    scored = tuple(Scored(float(start), start + 2.0, np.array(row, np.float32)) for start, row in enumerate(probs))
    return Timeline("a.wav", "m", len(probs) + 1.0, ClassTable(("bark", "bell", "rain")), scored, array([0.0]))


@pytest.mark.parametrize("at_once", [1, 3, 4, 10])
def test_an_overview_holds_the_loudest_of_neighbours_however_it_is_fed(at_once: int) -> None:
    overview = Overview(width=2)  # at most 4 columns
    frames = np.stack([np.arange(10), -np.arange(10)]).astype(np.float32)
    for begin in range(0, 10, at_once):
        overview.add(frames[:, begin : begin + at_once])
    np.testing.assert_array_equal(overview.columns(), array([3, 7, 9], [0, -4, -8]))


def test_an_overview_stays_small() -> None:
    overview = Overview(width=8)
    for _ in range(1000):
        overview.add(np.zeros((1, 7), np.float32))
        assert overview.columns().shape[1] <= 17


def test_values_are_spread_over_time() -> None:
    values = array([0.1, 0.9], [0.5, 0.2])
    np.testing.assert_array_equal(
        over_time(values, np.array([0.0, 0.5, 2.0]), 2.0), array([0.1] * 4 + [0.9] * 12, [0.5] * 4 + [0.2] * 12)
    )


def test_a_short_peak_is_seen_in_a_long_sound() -> None:
    values = np.zeros((1, 10_000), np.float32)
    values[0, 5_000] = 1.0
    spread = over_time(values, np.linspace(0.0, 10_000.0, 10_001), 10_000.0)
    assert spread.shape == (1, WIDTH)
    np.testing.assert_array_equal(np.flatnonzero(spread[0]), [600])


def test_the_heat_map_has_the_highest_first_and_windows_meet_half_way() -> None:
    timeline = made([0.1, 0.2, 0.6], [0.7, 0.2, 0.1])  # 0 to 2 and 1 to 3 s: they meet at 1.5
    heat = timeline.heat(Filter(rows=2))
    assert heat.labels == ("bark", "rain")
    np.testing.assert_array_equal(heat.peaks, np.array([0.7, 0.6], np.float32))
    np.testing.assert_array_equal(heat.values, array([0.1] * 4 + [0.7] * 4, [0.6] * 4 + [0.1] * 4))
    assert timeline.heat(Filter(only=("bell",))).labels == ("bell",)


def test_events_follow_the_filter() -> None:
    timeline = made([0.1, 0.2, 0.6], [0.7, 0.2, 0.1])

    def found(chosen: Filter) -> list[tuple[float, float, str]]:
        return [(piece.start, piece.end, piece.tags[0].label) for piece in timeline.record(chosen).pieces]

    assert found(Filter(0.5)) == [(0.0, 1.5, "rain"), (1.5, 3.0, "bark")]
    assert found(Filter(0.65)) == [(1.5, 3.0, "bark")]
    assert found(Filter(0.5, only=("rain",))) == [(0.0, 1.5, "rain")]
    with pytest.raises(ConfigError, match="cat"):
        timeline.heat(Filter(only=("cat",)))


def test_what_does_not_reach_the_threshold_is_dim() -> None:
    heat = Heat(("bark",), array([1.0])[0], array([0.0, 0.5, 1.0]))
    np.testing.assert_array_equal(heat_picture(heat, 0.5), [[(3, 3, 14), (160, 42, 98), (252, 254, 190)]])


def test_low_frequencies_are_at_the_bottom_and_80_db_are_told_apart() -> None:
    drawn = mel_picture(array([0.0, -80.0], [-200.0, -40.0]))
    np.testing.assert_array_equal(drawn, [[(8, 8, 32), (160, 42, 98)], [(252, 254, 190), (8, 8, 32)]])


def test_pictures_are_files_that_others_read() -> None:
    image = pytest.importorskip("PIL.Image")
    drawn = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with image.open(io.BytesIO(png(drawn))) as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), drawn)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.25, [0, 0.1, 0.2]),
        (4.0, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]),
        (59.0, [0, 10, 20, 30, 40, 50]),
        (600.0, list(range(0, 601, 60))),
        (100 * 3600.0, [3600 * hour for hour in range(0, 101, 10)]),
    ],
)
def test_the_axis_has_round_times(seconds: float, expected: list[float]) -> None:
    assert list(ticks(seconds)) == expected


@pytest.mark.parametrize(
    ("seconds", "whole", "said"),
    [
        (0.0, 4.0, "0"),
        (2.25, 4.0, "2.25"),
        (90.0, 119.0, "90"),
        (0.0, 120.0, "0:00"),
        (90.0, 120.0, "1:30"),
        (125.5, 4000.0, "2:05.5"),
        (3599.99, 4000.0, "60:00"),
    ],
)
def test_all_times_of_a_sound_are_in_one_unit(seconds: float, whole: float, said: str) -> None:
    assert clock(seconds, whole) == said
    assert unit(whole) == ("min" if ":" in said else "s")
