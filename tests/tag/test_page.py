import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ced.sound.labels import ClassTable
from ced.tag import page
from ced.tag.hearing import Clip
from ced.tag.records import Scored
from ced.tag.shelf import Kept
from ced.tag.timeline import Filter, Timeline

EVIL = '<img src=x onerror="alert(1)">${`'


def kept(windows: int = 4, name: str = "a.wav", label: str = "bell") -> Kept:
    """A sound with a bark in every second of its windows, and a bell in the others."""
    scored = tuple(
        Scored(float(start), start + 1.0, np.array([0.875, 0.0] if start % 2 else [0.0, 0.75], np.float32))
        for start in range(windows)
    )
    mel = np.zeros((64, 10), np.float32)
    timeline = Timeline(name, "m", float(windows), ClassTable(("bark", label)), scored, mel)
    return Kept("token", Clip(name, Path("clip.flac"), float(windows), mel), timeline)


def shown(chosen: Filter, sound: Kept) -> str:
    return page.table(sound, sound.timeline.record(chosen), chosen)


class Elements(HTMLParser):
    """Collects the names of elements, and whether each of their attributes was ever one that runs something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.handlers: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}


def test_the_table_has_a_row_an_event() -> None:
    rows = re.findall(
        r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", shown(Filter(), kept())
    )
    assert [row[1:] for row in rows] == [
        ("0", "1", "bell", "0.750"),
        ("1", "2", "bark", "0.875"),
        ("2", "3", "bell", "0.750"),
        ("3", "4", "bark", "0.875"),
    ]
    assert 'data-from="1.0" data-to="2.0" aria-label="Play bark at 1"' in rows[1][0]


def test_the_links_carry_the_filter() -> None:
    text = shown(Filter(0.8, ("bark",)), kept())
    assert "2 events of probability 0.8 or more. Download:" in text
    assert re.findall('href="(.*?)"', text) == [
        f"sounds/token/{kind}?threshold=0.8&amp;only=bark" for kind in ("csv", "jsonl", "audacity")
    ]
    assert "1 event of" in shown(Filter(0.8), kept(2))


def test_more_events_than_a_page_can_bear_are_downloads() -> None:
    text = shown(Filter(), kept(page.MOST_EVENTS + 1))
    assert text.count("<tr><td>") == page.MOST_EVENTS
    assert "501 events of probability 0.5 or more; the first 500 are shown, downloads have all" in text


@pytest.mark.parametrize(
    ("seconds", "axis"), [(4, ["0", "0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4"]), (150, ["0:00", "0:15"])]
)
def test_the_axis_lies_where_its_times_are(seconds: int, axis: list[str]) -> None:
    sound = kept(seconds)
    chosen = Filter()
    drawn = page.picture(sound, sound.timeline.heat(chosen), chosen)
    places = re.findall(r'<i style="left:([\d.]+)%">(.*?)</i>', drawn)
    assert [said for _, said in places][: len(axis)] == axis
    step = 100 * (0.5 if seconds == 4 else 15) / seconds
    np.testing.assert_allclose([float(left) for left, _ in places], step * np.arange(len(places)), atol=1e-3)
    assert f'data-seconds="{seconds}.0"' in drawn
    assert ("<em>s</em>" in drawn, "<em>min</em>" in drawn) == (seconds < 120, seconds >= 120)


def test_classes_below_the_threshold_are_faint() -> None:
    sound, chosen = kept(), Filter(0.8)
    drawn = page.picture(sound, sound.timeline.heat(chosen), chosen)
    assert re.findall(r'<span title="(.*?)"(.*?)>', drawn) == [
        ("bark, at most 0.88", ""),
        ("bell, at most 0.75", ' class="ced-faint"'),
    ]


def test_names_of_strangers_stay_text() -> None:
    sound, chosen = kept(name=EVIL, label=EVIL), Filter()
    for text in (
        page.player(sound),
        shown(chosen, sound),
        page.picture(sound, sound.timeline.heat(chosen), chosen),
    ):
        found = Elements(text)
        assert found.names <= {
            "div",
            "strong",
            "span",
            "audio",
            "p",
            "a",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "button",
            "img",
            "b",
            "br",
            "em",
            "i",
        }
        assert not found.handlers
        assert not set("${}`") & set(re.sub('style="[^"]*"', "", text))
        assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&#36;&#123;&#96;" in text
