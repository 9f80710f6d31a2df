import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ced.errors import ConfigError
from ced.sound.labels import ClassTable, numbered
from ced.tag.events import Event, Merging, events
from ced.tag.records import Scored, Tag, Tags
from ced.tag.select import Selection

AB = ClassTable(("a", "b"))
Found = tuple[float, float, str, float]


def windows(times: Sequence[tuple[float, float]], *probs: Sequence[float]) -> list[Scored]:
    """Return windows with the probabilities of each class, a sequence a class."""
    columns = np.array(probs, np.float32).T
    return [Scored(start, end, row) for (start, end), row in zip(times, columns, strict=True)]


def end_to_end(count: int) -> list[tuple[float, float]]:
    return [(float(second), second + 1.0) for second in range(count)]


def heard(pieces: Iterator[Tags]) -> list[Found]:
    return [(piece.start, piece.end, piece.tags[0].label, round(piece.tags[0].prob, 6)) for piece in pieces]


def test_an_event_continues_above_the_release_threshold() -> None:
    scored = windows(end_to_end(8), [0.3, 0.75, 0.4, 0.2, 0.1, 0.4, 0.5, 0.0])
    found = list(events(scored, Selection(numbered(1), thresholds=0.5), release=0.5))
    assert found == [
        Tags(1.0, 3.0, (Tag("class 0", 0, None, 0.75),)),
        Tags(6.0, 7.0, (Tag("class 0", 0, None, 0.5),)),
    ]


def test_near_events_merge_and_short_ones_are_dropped() -> None:
    scored = windows(end_to_end(9), [0.9, 0, 0.8, 0, 0, 0.7, 0.7, 0, 0])
    selection = Selection(numbered(1), thresholds=0.5)
    one = "class 0"
    assert heard(events(scored, selection)) == [(0, 1, one, 0.9), (2, 3, one, 0.8), (5, 7, one, 0.7)]
    assert heard(events(scored, selection, gap=1.0)) == [(0, 3, one, 0.9), (5, 7, one, 0.7)]
    assert heard(events(scored, selection, gap=1.9)) == [(0, 3, one, 0.9), (5, 7, one, 0.7)]
    assert heard(events(scored, selection, gap=2.0)) == [(0, 7, one, 0.9)]
    assert heard(events(scored, selection, shortest=2.0)) == [(5, 7, one, 0.7)]
    assert heard(events(scored, selection, gap=1.0, shortest=3.0)) == [(0, 3, one, 0.9)]


def test_overlapping_windows_meet_half_way() -> None:
    times = [(0.0, 4.0), (1.0, 5.0), (2.0, 6.0), (3.0, 7.0), (4.0, 7.5)]
    scored = windows(times, [0, 0.9, 0.9, 0, 0], [0.9, 0, 0, 0, 0.8])
    found = heard(events(scored, Selection(AB, thresholds=0.5)))
    assert found == [(0, 2.5, "b", 0.9), (2.5, 4.5, "a", 0.9), (5.5, 7.5, "b", 0.8)]


def test_windows_with_a_pause_between_them_do_not_adjoin() -> None:
    scored = windows([(0, 1), (10, 11), (20, 21)], [0.9, 0.4, 0.9])
    selection = Selection(numbered(1), thresholds=0.5)
    assert heard(events(scored, selection)) == [(0, 1, "class 0", 0.9), (20, 21, "class 0", 0.9)]
    assert heard(events(scored, selection, gap=19)) == [(0, 21, "class 0", 0.9)]


def test_silent_windows_end_events() -> None:
    scored = windows(end_to_end(3), [0.9, 0, 0.9])
    scored[1] = Scored(1.0, 2.0, scored[1].probs, silent=True)
    always = Selection(numbered(1), thresholds=0.0)
    assert heard(events(scored, always)) == [(0, 1, "class 0", 0.9), (2, 3, "class 0", 0.9)]
    assert heard(events(scored, always, gap=1.0)) == [(0, 3, "class 0", 0.9)]


def test_rounding_of_times_splits_no_event() -> None:
    times = [(step * 0.1, step * 0.1 + 0.1) for step in range(50)]
    scored = windows(times, [0.9] + [0.3] * 49)
    (event,) = events(scored, Selection(numbered(1), thresholds=0.5))
    assert (event.start, event.end) == pytest.approx((0.0, 5.0))


def test_order_is_by_onset_then_class_and_early() -> None:
    scored = windows(end_to_end(6), [0, 0.9, 0.9, 0.9, 0, 0], [0.9, 0, 0.9, 0, 0, 0.9], [0, 0.9, 0, 0, 0, 0.9])
    taken = 0

    def count() -> Iterator[Scored]:
        nonlocal taken
        for window in scored:
            taken += 1
            yield window

    known = [
        (*found, taken)
        for piece in events(count(), Selection(numbered(3), thresholds=0.5))
        for found in heard(iter([piece]))
    ]
    assert known == [
        (0, 1, "class 1", 0.9, 3),  # the second window may still have been joined by the third
        (1, 4, "class 0", 0.9, 6),
        (1, 2, "class 2", 0.9, 6),
        (2, 3, "class 1", 0.9, 6),
        (5, 6, "class 1", 0.9, 6),
        (5, 6, "class 2", 0.9, 6),
    ]


def test_labels_roll_up_and_thresholds_of_classes() -> None:
    classes = ClassTable(("Bark", "Purr"), ("/m/05tny_", "/m/02yds9"))
    scored = windows(end_to_end(3), [0.3, 0.3, 0.1], [0.1, 0.7, 0.7])
    thresholds = (0.3, 0.6)
    assert heard(events(scored, Selection(classes, thresholds=thresholds))) == [
        (0, 2, "Bark", 0.3),
        (1, 3, "Purr", 0.7),
    ]
    rolled = Selection(classes, top_k=1, thresholds=thresholds, rollup=True, only=["Dog", "Purr"])
    assert heard(events(scored, rolled)) == [(0, 2, "Bark", 0.3), (0, 2, "Dog", 0.3), (1, 3, "Purr", 0.7)]
    parent = Selection(
        ClassTable(("Dog", "Bark"), ("/m/0bt9lr", "/m/05tny_")), thresholds=0.3, rollup=True, only=["Dog"]
    )
    assert heard(events(scored, parent)) == [(0, 3, "Dog", 0.7)]


def test_memory_does_not_grow_with_the_length_of_an_event() -> None:
    probs = np.array([0.9], np.float32)

    def endless() -> Iterator[Scored]:
        for second in range(40_000):
            yield Scored(float(second), second + 1.0, probs)
            if second == 20_000 or second == 39_999:
                blocks.append(sys.getallocatedblocks())

    blocks: list[int] = []
    assert heard(events(endless(), Selection(numbered(1), thresholds=0.5))) == [(0, 40_000, "class 0", 0.9)]
    assert blocks[1] - blocks[0] < 1000


def test_invalid_windows_and_selections_are_refused() -> None:
    selection = Selection(AB, thresholds=0.5)
    with pytest.raises(ConfigError, match="events need a threshold"):
        events([], Selection(AB))
    for name, value in (("release", 0), ("release", 1.1), ("gap", -1), ("shortest", -0.5), ("gap", np.nan)):
        with pytest.raises(ConfigError, match=f"{name} is {value}; it must be"):
            events([], selection, **{name: value})
    assert list(events([], selection)) == []
    for times in ([(0, 2), (0, 3)], [(1, 2), (0, 3)], [(0, 5), (1, 4)]):
        with pytest.raises(ConfigError, match="must be in order of time"):
            list(events(windows(times, [1, 1], [0, 0]), selection))


@st.composite
def scored_sounds(draw: st.DrawFn) -> list[Scored]:
    """Draw windows with or without overlap and pauses, times in quarters of a second."""
    count = draw(st.integers(0, 12))
    steps = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    probability = st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0])
    times, start, end = [], 0, 0
    for step, length in zip(steps, lengths, strict=True):
        start += step
        end = max(end, start + length)
        times.append((start / 4, end / 4))
    rows = draw(st.lists(st.lists(probability, min_size=3, max_size=3), min_size=count, max_size=count))
    return windows(times, *np.array(rows, np.float32).reshape(count, 3).T) if count else []


def stretches(scored: list[Scored]) -> list[tuple[float, float]]:
    bounds = []
    for place, window in enumerate(scored):
        start, end = window.start, window.end
        if place and scored[place - 1].end > start:
            start = (scored[place - 1].end + start) / 2
        if place + 1 < len(scored) and scored[place + 1].start < end:
            end = (end + scored[place + 1].start) / 2
        bounds.append((start, end))
    return bounds


def whole(
    scored: list[Scored], thresholds: Sequence[float], release: float, gap: float, shortest: float
) -> list[Found]:
    """Return the same events from all windows at once, class by class."""
    found = []
    bounds = stretches(scored)
    for index, threshold in enumerate(thresholds):
        pieces: list[list[float]] = []
        going = False
        for place, window in enumerate(scored):
            prob, (start, end) = float(window.probs[index]), bounds[place]
            pause = place > 0 and scored[place - 1].end < window.start
            if going and not pause and prob >= release * threshold:
                pieces[-1] = [pieces[-1][0], end, max(pieces[-1][2], prob)]
            else:
                going = prob >= threshold
                if going:
                    pieces.append([start, end, prob])
        merged: list[list[float]] = []
        for start, end, prob in pieces:
            if merged and start - merged[-1][1] <= gap:
                merged[-1] = [merged[-1][0], end, max(merged[-1][2], prob)]
            else:
                merged.append([start, end, prob])
        found += [(start, index, end, prob) for start, end, prob in merged if end - start >= shortest]
    return [(start, end, f"class {index}", prob) for start, index, end, prob in sorted(found)]


@settings(max_examples=300, deadline=None)
@given(
    scored_sounds(),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 2.0, 4.25]),
    st.sampled_from([0.0, 1.0, 3.0]),
)
def test_streaming_equals_the_brute_force_result(
    scored: list[Scored], release: float, gap: float, shortest: float
) -> None:
    thresholds = (0.5, 0.375, 0.75)
    selection = Selection(numbered(3), thresholds=thresholds)
    found = heard(events(iter(scored), selection, release=release, gap=gap, shortest=shortest))
    assert found == whole(scored, list(thresholds), release, gap, shortest)


def test_an_event_begins_with_its_first_window() -> None:
    times = [(0.5 * place, 0.5 * place + 1.5) for place in range(5)]
    merging = Merging(Selection(numbered(1), thresholds=0.5))
    told = []
    for window in windows(times, [0.1, 0.9, 0.95, 0.1, 0.1]):
        over = merging.add(window)
        told.append((merging.begun(), over))
    first = Event(1.0, 0, 2.0, np.float32(0.9).item())
    whole_event = Event(1.0, 0, 2.0, np.float32(0.95).item())
    assert told == [([], []), ([first], []), ([], []), ([], []), ([], [whole_event])]
    assert merging.finish() == []


def test_a_pause_without_windows_ends_events() -> None:
    merging = Merging(Selection(numbered(1), thresholds=0.5), gap=2.0)
    (first, second) = windows([(0, 1), (8, 9)], [0.9, 0.4])
    merging.add(first)
    assert [event.onset for event in merging.begun()] == [0]
    assert merging.pass_to(3.0) == []
    assert [(event.onset, event.offset) for event in merging.pass_to(3.1)] == [(0, 1)]
    assert merging.add(second) == merging.begun() == merging.finish() == []  # held, but nothing was there to hold


def test_an_event_is_reported_once_it_is_certain_to_be_long_enough() -> None:
    merging = Merging(Selection(numbered(1), thresholds=0.5), shortest=2.0)
    told = []
    for window in windows(end_to_end(6), [0.9, 0.9, 0.9, 0, 0.9, 0]):
        over = merging.add(window)
        told.append((len(merging.begun()), len(over)))
    assert told == [(0, 0), (0, 0), (1, 0), (0, 0), (0, 1), (0, 0)]


@settings(max_examples=200, deadline=None)
@given(scored_sounds(), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.0, 1.0, 3.0]))
def test_each_reported_event_begins_and_ends_once(scored: list[Scored], gap: float, shortest: float) -> None:
    selection = Selection(numbered(3), thresholds=0.5)
    merging = Merging(selection, gap=gap, shortest=shortest)
    begun: set[tuple[float, int]] = set()
    over: list[Event] = []
    for window in scored:
        over += merging.add(window)
        now = {(event.onset, event.index) for event in merging.begun()}
        assert not now & begun  # nobody is told twice
        begun |= now
    over += merging.finish()
    found = list(events(scored, selection, gap=gap, shortest=shortest))
    assert [event.piece(selection) for event in sorted(over)] == found
    assert begun <= {(event.onset, event.index) for event in over}


@settings(max_examples=200, deadline=None)
@given(scored_sounds(), st.sampled_from([0.0, 0.5, 2.0]))
def test_properties_of_all_events(scored: list[Scored], gap: float) -> None:
    found = heard(events(iter(scored), Selection(numbered(3), thresholds=0.5), gap=gap))
    assert found == sorted(found, key=lambda event: (event[0], event[2]))
    bounds = stretches(scored)
    for index in range(3):
        own = [event for event in found if event[2] == f"class {index}"]
        assert all(later[0] - earlier[1] > gap for earlier, later in pairwise(own))
        reaching = [bound for bound, window in zip(bounds, scored, strict=True) if window.probs[index] >= 0.5]
        for start, end in reaching:  # each window at or above the threshold is in an event
            assert any(event[0] <= start and end <= event[1] for event in own)
        assert {event[0] for event in own} <= {start for start, _ in reaching}  # and each event begins with one
