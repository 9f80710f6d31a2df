"""What the page shows of a timeline, as HTML without anything from elsewhere; names of strangers are escaped."""

import base64
import html
from collections.abc import Mapping
from urllib.parse import urlencode

from ced.tag.records import Record
from ced.tag.shelf import Kept
from ced.tag.timeline import Filter, Heat, Picture, clock, heat_picture, png, ticks, unit

MOST_EVENTS = 500  # rows of the table
DOWNLOADS: Mapping[str, str] = {"csv": "CSV", "jsonl": "JSON lines", "audacity": "Audacity labels"}
_TEMPLATES = str.maketrans({"$": "&#36;", "{": "&#123;", "}": "&#125;", "`": "&#96;"})


def escaped(text: str) -> str:
    """Return text for HTML, also for HTML that is used as a template."""
    return html.escape(text).translate(_TEMPLATES)


def player(kept: Kept) -> str:
    """Return the name of a sound and what plays it."""
    timeline = kept.timeline
    whole = timeline.seconds
    return (
        f'<div class="ced-player"><strong>{escaped(timeline.name)}</strong> <span>{clock(whole, whole)} {unit(whole)}, '
        f"{escaped(timeline.model)}</span>"
        f'<audio controls preload="auto" src="sounds/{kept.token}/clip.flac"></audio></div>'
    )


def picture(kept: Kept, heat: Heat, chosen: Filter) -> str:
    """Return the heat map of classes above the log-mel picture, on one axis; a click in it plays from there.

    The log-mel picture has an address of its own: it stays when filters change, and is larger than all else.
    """
    seconds = kept.timeline.seconds
    names = "".join(
        f'<span title="{escaped(name)}, at most {peak:.2f}"{_faint(float(peak), chosen)}>{escaped(name)}</span>'
        for name, peak in zip(heat.labels, heat.peaks, strict=True)
    )
    said = ", ".join(f"{name} {peak:.2f}" for name, peak in zip(heat.labels, heat.peaks, strict=True))
    axis = "".join(f'<i style="left:{100 * time / seconds:.3f}%">{clock(time, seconds)}</i>' for time in ticks(seconds))
    return (
        f'<div class="ced-picture"><div class="ced-names" style="--rows:{len(heat.labels)}">{names}'
        f"<b>log-mel<br>0 to 8 kHz</b><em>{unit(seconds)}</em></div>"
        f'<div class="ced-plot" style="--rows:{len(heat.labels)}" data-seconds="{seconds}">'
        f"{_image(_inline(heat_picture(heat, chosen.threshold)), 'ced-heat', f'Highest of each class: {said}')}"
        f"{_image(f'sounds/{kept.token}/mel.png', 'ced-mel', 'Log-mel picture of the sound')}"
        f'<div class="ced-axis">{axis}</div><div class="ced-now"></div></div></div>'
    )


def _faint(peak: float, chosen: Filter) -> str:
    return ' class="ced-faint"' if peak < chosen.threshold else ""


def _image(address: str, kind: str, said: str) -> str:
    return f'<img class="{kind}" alt="{escaped(said)}" draggable="false" src="{address}">'


def _inline(drawn: Picture) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(drawn)).decode()}"


def table(kept: Kept, record: Record, chosen: Filter) -> str:
    """Return the events, each with a button that plays it, and the links that download them all."""
    whole = record.seconds
    rows = "".join(
        f'<tr><td><button type="button" data-from="{piece.start}" data-to="{piece.end}" '
        f'aria-label="Play {escaped(tag.label)} at {clock(piece.start, whole)}">&#9654;</button></td>'
        f"<td>{clock(piece.start, whole)}</td><td>{clock(piece.end, whole)}</td><td>{escaped(tag.label)}</td>"
        f"<td>{tag.prob:.3f}</td></tr>"
        for piece in record.pieces[:MOST_EVENTS]
        for tag in piece.tags
    )
    count = len(record.pieces)
    what = f"{count} event{'' if count == 1 else 's'} of probability {chosen.threshold:g} or more"
    more = f"; the first {MOST_EVENTS} are shown, downloads have all" if count > MOST_EVENTS else ""
    query = escaped(urlencode({"threshold": chosen.threshold, "only": chosen.only}, doseq=True))
    links = " ".join(
        f'<a href="sounds/{kept.token}/{kind}?{query}" download>{title}</a>' for kind, title in DOWNLOADS.items()
    )
    head = "<tr><th></th><th>from</th><th>to</th><th>label</th><th>probability</th></tr>"
    return (
        f'<div class="ced-events"><p>{what}{more}. Download: {links}</p>'
        f"<div><table><thead>{head}</thead><tbody>{rows}</tbody></table></div></div>"
    )


CSS = """
.ced-player { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: center; }
.ced-player audio { width: 100%; height: 2.5rem; }
.ced-picture { display: grid; grid-template-columns: minmax(5rem, 11rem) 1fr; gap: .5rem; font-size: .85rem; }
.ced-names span { display: block; height: 1.6rem; line-height: 1.6rem; text-align: right; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.ced-names b { display: flex; height: 128px; align-items: center; justify-content: right; text-align: right;
  font-weight: normal; opacity: .7; margin-top: 4px; }
.ced-names em { display: block; text-align: right; opacity: .7; font-style: normal; }
.ced-faint { opacity: .5; }
.ced-plot { position: relative; cursor: pointer; user-select: none; }
.ced-plot img { display: block; width: 100%; max-width: none; margin: 0; border-radius: 2px; }
.ced-heat { height: calc(1.6rem * var(--rows)); image-rendering: pixelated; }
.ced-mel { height: 128px; margin-top: 4px !important; }
.ced-axis { position: relative; height: 1.4rem; overflow: hidden; }
.ced-axis i { position: absolute; border-left: 1px solid currentColor; padding-left: .2rem; font-style: normal;
  opacity: .7; }
.ced-now { position: absolute; top: 0; bottom: 1.4rem; left: 0; width: 2px; background: #fff;
  mix-blend-mode: difference; pointer-events: none; }
.ced-events div { max-height: 24rem; overflow: auto; }
.ced-events table { width: 100%; border-collapse: collapse; }
.ced-events td, .ced-events th { text-align: left; padding: .15rem .5rem; }
.ced-events button { cursor: pointer; padding: 0 .4rem; }
.ced-events a { text-decoration: underline; margin-left: .5rem; }
"""

# One listener for all: what is shown is replaced while the page stays. Events of players do not bubble: captured.
JAVASCRIPT = """
(() => {
  let stop = Infinity;
  const sound = () => document.querySelector(".ced-player audio");
  const play = (from, to) => {
    const audio = sound();
    if (audio) { stop = to; audio.currentTime = from; audio.play(); }
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-from]");
    const plot = event.target.closest(".ced-plot");
    if (button) play(+button.dataset.from, +button.dataset.to);
    else if (plot) {
      const box = plot.getBoundingClientRect();
      play((event.clientX - box.left) / box.width * plot.dataset.seconds, Infinity);
    }
  });
  const follow = () => {
    const audio = sound(), plot = document.querySelector(".ced-plot");
    if (!audio || !plot) return;
    if (audio.currentTime >= stop) audio.pause();
    plot.querySelector(".ced-now").style.left = `${100 * audio.currentTime / plot.dataset.seconds}%`;
  };
  document.addEventListener("pause", () => { stop = Infinity; }, true);
  for (const kind of ["timeupdate", "seeked"]) document.addEventListener(kind, follow, true);
})();
"""
