"""Writers: what a timeline of tags looks like on paper."""

from collections.abc import Iterable, Iterator

from ced.tag.tagger import Tags


def text(name: str, timeline: Iterable[Tags]) -> Iterator[str]:
    """Yield lines for a reader: a heading with the name, then each window's tags, a blank line between windows.

    The heading comes with the first window, so a sound that cannot be read leaves none behind.
    """
    for number, window in enumerate(timeline):
        yield "" if number else f"===== {name} ====="
        for rank, tag in enumerate(window.tags, start=1):
            yield f"[{window.start:.1f}s]-[{window.end:.1f}s] Topk-{rank} {tag.label} {tag.prob:.4f}"
