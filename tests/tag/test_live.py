"""Live tagging: what is reported, how soon, once, and in how much memory."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound import live, live_sources
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable
from ced.sound.live_sources import LiveSource
from ced.tag.events import events
from ced.tag.live import OPTIONS, Listener, LiveReport
from ced.tag.options import TagOptions
from ced.tag.records import Record, Tag, Tags
from ced.tag.tagger import Tagger

BLOCK = SAMPLE_RATE // 10
Waves = NDArray[np.float32]


class Loudness:
    """A tagger of two classes: how loud a wave is, and how quiet; it says when it has answered."""

    labels = ClassTable(("loud", "quiet"))

    def __init__(self, blocks: int = 3) -> None:
        self.answered = threading.Semaphore(blocks)  # so many may come before the first window is scored

    def __call__(self, waves: Waves, /) -> Waves:
        level = float(np.abs(waves[0]).mean())
        self.answered.release()
        return np.array([[level, 1 - level]], np.float32)


def sound(*pieces: tuple[float, float]) -> Waves:
    """Return a sound of pieces of so many seconds at so high a level."""
    return np.concatenate([np.full(round(seconds * SAMPLE_RATE), level, np.float32) for seconds, level in pieces])


def unhurried(wave: Waves, scorer: Loudness, hop: float) -> LiveSource:
    """Return a source that never comes faster than it is scored."""

    def blocks() -> Iterator[Waves]:
        size = round(hop * SAMPLE_RATE)
        for start in range(0, len(wave), size):
            assert scorer.answered.acquire(timeout=10)
            yield wave[start : start + size, None]

    return live_sources.blocks(blocks(), SAMPLE_RATE)


def heard(reports: Iterator[LiveReport], label: str = "loud") -> list[tuple[str, float]]:
    """Return what is said of a class: when it begins and ends."""
    return [
        (report.state, report.piece.start if report.state == "begin" else report.piece.end)
        for report in reports
        if report.piece.tags[0].label == label
    ]


@pytest.mark.parametrize(("gap", "shortest"), [(0.0, 0.0), (2.0, 0.0), (0.0, 1.5)])
def test_reported_events_are_those_of_the_tagged_sound(gap: float, shortest: float) -> None:
    wave = sound((3, 0), (2, 0.8), (1.5, 0), (1, 0.9), (4, 0.1), (0.75, 1), (3, 0), (2, 0.7))
    options = replace(OPTIONS, threshold=0.6, gap=gap, shortest=shortest, labels=("loud",))
    scorer = Loudness(8)  # six make the first window
    tagger = Tagger(scorer)
    reports = list(Listener(tagger, unhurried(wave, scorer, 0.25), options).reports())
    scored = tagger.score((wave, SAMPLE_RATE), window=1.5, hop=0.25)
    expected = list(events(scored, options.selection(scorer.labels), gap=gap, shortest=shortest))
    assert len(expected) == (2 if gap else 3 if not shortest else 1)
    assert [report.piece for report in reports if report.state == "end"] == expected
    begun = [report for report in reports if report.state == "begin"]
    assert [(report.event, report.piece.start) for report in begun] == [
        (number, piece.start) for number, piece in enumerate(expected, start=1)
    ]
    for report in begun:  # each ends once, later
        (end,) = (other for other in reports if other.state == "end" and other.event == report.event)
        assert reports.index(report) < reports.index(end)


def test_a_line_is_a_record() -> None:
    piece = Tags(1.5, 2.25, (Tag("loud", 0, None, 0.75),))
    stamp = datetime(2026, 1, 31, 12, 3, 11, 250_000).astimezone()
    values = LiveReport("end", 7, stamp.timestamp(), piece).to_json("the shed", "small.onnx")
    assert Record.from_json(values) == Record("the shed", "small.onnx", 2.25, (piece,), "events")
    assert (values["state"], values["event"]) == ("end", 7)
    assert datetime.fromisoformat(values["time"]) == stamp


def test_times_in_a_line_have_milliseconds() -> None:
    piece = Tags(7.098539215003257, 7.349000000000001, (Tag("loud", 0, None, 0.75),))
    values = LiveReport("begin", 1, 0.0, piece).to_json("the shed", "small.onnx")
    assert (values["pieces"][0]["start"], values["pieces"][0]["end"], values["seconds"]) == (7.099, 7.349, 7.349)


def test_an_event_is_reported_within_two_seconds_of_its_sound() -> None:
    """In real time, with blocks as a device gives them, for a sound that must fill a window to be known."""
    began = 0.0

    def blocks() -> Iterator[Waves]:
        nonlocal began
        due = time.monotonic()
        for number in range(60):
            due += 0.1
            time.sleep(max(0.0, due - time.monotonic()))  # a block comes when it is over
            if number == 13:
                began = time.time() - 0.1
            yield np.full((BLOCK, 1), number >= 13, np.float32)

    listener = Listener(
        Tagger(Loudness()),
        live_sources.blocks(blocks(), SAMPLE_RATE),
        replace(OPTIONS, threshold=0.99, labels=("loud",)),
    )
    report = next(listener.reports())
    assert time.time() - began < 2.0
    assert report.time == pytest.approx(began, abs=1.0)  # a window speaks for its middle


@pytest.mark.usefixtures("impatient")
def test_an_outage_ends_open_events_and_delays_later_ones() -> None:
    visits = 0

    def open_shed() -> Iterator[Waves]:
        nonlocal visits
        visits += 1
        for _ in range(10 if visits == 1 else 1000):
            time.sleep(0.01)
            yield np.ones(BLOCK, np.float32)
        time.sleep(1.5)
        raise AudioError("the cable is out")

    options = replace(OPTIONS, window=0.5, hop=0.5, gap=0.2, labels=("loud",))
    listener = Listener(Tagger(Loudness()), LiveSource("the shed", open_shed), options)
    found = []
    for report in listener.reports():
        found.append(report)
        listener.stopped |= len(found) == 3
    assert heard(iter(found[:2])) == [("begin", 0.0), ("end", 1.0)]
    assert [(report.state, report.event) for report in found] == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2)]
    assert 1.4 < found[2].piece.start < 5
    assert found[2].time - found[0].time == pytest.approx(found[2].piece.start, abs=1.0)


@pytest.mark.usefixtures("impatient")
def test_a_stream_that_stalls_is_reported_once() -> None:
    visits = 0

    def stalls() -> Iterator[Waves]:
        nonlocal visits
        visits += 1
        for _ in range(7):
            time.sleep(0.01)
            yield np.full(BLOCK, visits == 1, np.float32)
        if visits == 1:
            time.sleep(1.0)  # longer than what goes on is waited for; two blocks wait for a window to be full
            raise AudioError("nothing comes")
        listener.stopped = True

    options = replace(OPTIONS, window=0.5, hop=0.25, gap=0.2, labels=("loud",))
    listener = Listener(Tagger(Loudness()), LiveSource("the shed", stalls), options)
    assert [(report.state, report.event) for report in listener.reports()] == [("begin", 1), ("end", 1)]


def test_clock_times_of_an_event_differ_by_its_duration() -> None:
    def blocks() -> Iterator[Waves]:
        for number in range(50):
            time.sleep(0.01)  # ten times as fast as it sounds
            yield np.full((BLOCK, 1), number < 30, np.float32)

    options = replace(OPTIONS, window=0.5, hop=0.5, gap=0.0, labels=("loud",))
    begin, end = Listener(Tagger(Loudness()), live_sources.blocks(blocks(), SAMPLE_RATE), options).reports()
    assert (begin.state, end.state, end.piece.end - end.piece.start) == ("begin", "end", 3.0)
    assert end.time - begin.time == pytest.approx(3.0, abs=1e-3)


def test_a_listener_can_be_used_once() -> None:
    listener = Listener(Tagger(Loudness()), live_sources.blocks([], SAMPLE_RATE))
    assert list(listener.reports()) == []
    with pytest.raises(ConfigError, match="was used before; make a new one each time"):
        next(listener.reports())


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no window be left out because the machine is busy."""
    monkeypatch.setattr(live, "_WAITING", 60.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_DELAYS", (0.05,))
    monkeypatch.setattr("ced.tag.live.LULL", 0.3)


def test_a_slow_model_gets_the_newest_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_WAITING", 1.0)

    class Slow(Loudness):
        def __call__(self, waves: Waves, /) -> Waves:
            time.sleep(0.1)
            return super().__call__(waves)

    def blocks() -> Iterator[Waves]:
        for number in range(100):
            time.sleep(0.005)
            yield np.full((BLOCK, 1), number >= 60, np.float32)

    listener = Listener(
        Tagger(Slow()),
        live_sources.blocks(blocks(), SAMPLE_RATE),
        replace(OPTIONS, window=0.1, hop=0.1, labels=("loud",)),
    )
    reports = list(listener.reports())
    assert [report.state for report in reports] == ["begin", "end"]
    assert listener.left_out > 20
    assert reports[0].piece.start >= 6.0
    assert reports[1].piece.end == pytest.approx(10.0)


def test_options_without_events_are_refused() -> None:
    source = live_sources.blocks([], SAMPLE_RATE)
    for options in (TagOptions(), TagOptions(events=True, columns=True)):
        with pytest.raises(ConfigError, match="events of whole windows"):
            Listener(Tagger(Loudness()), source, options)


def resident() -> int:
    """Return the bytes of memory that this process uses."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is looked up as Linux has it")
def test_a_day_of_sound_needs_no_more_memory_than_an_hour() -> None:
    scorer = Loudness(2)
    windows, every = 24 * 360, 10  # of 10 s
    blocks = [np.full((10 * SAMPLE_RATE, 1), level, np.int16) for level in (0, 30_000)]
    memory = []

    def day() -> Iterator[NDArray[np.int16]]:
        for number in range(windows):
            assert scorer.answered.acquire(timeout=10)
            if number % 360 == 359:
                memory.append(resident())
            yield blocks[number % every == 0]

    options = replace(OPTIONS, window=10.0, hop=10.0, gap=0.0, labels=("loud",))
    listener = Listener(Tagger(scorer), live_sources.blocks(day(), SAMPLE_RATE), options)
    begun = ended = 0
    for report in listener.reports():
        begun += report.state == "begin"
        ended += report.state == "end"
        assert report.piece.start == (report.event - 1) * 10.0 * every
    assert begun == ended == windows // every
    assert listener.left_out == 0
    assert memory[-1] - memory[0] < 4 << 20
