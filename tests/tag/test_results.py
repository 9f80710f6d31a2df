from collections.abc import Iterator

import pytest

from ced.errors import AudioError
from ced.tag.results import text
from ced.tag.tagger import Tag, Tags

TIMELINE = [
    Tags(0.0, 10.0, (Tag("Speech", 0, 0.98765), Tag("Dog", 74, 0.01))),
    Tags(10.0, 12.34, (Tag("Dog", 74, 0.5), Tag("Speech", 0, 0.00004))),
]


def test_text_is_what_readers_of_the_published_program_know() -> None:
    assert list(text("sounds/dog.wav", TIMELINE)) == [
        "===== sounds/dog.wav =====",
        "[0.0s]-[10.0s] Topk-1 Speech 0.9877",
        "[0.0s]-[10.0s] Topk-2 Dog 0.0100",
        "",
        "[10.0s]-[12.3s] Topk-1 Dog 0.5000",
        "[10.0s]-[12.3s] Topk-2 Speech 0.0000",
    ]


def test_a_sound_that_cannot_be_read_has_no_heading() -> None:
    def broken() -> Iterator[Tags]:
        raise AudioError("empty")
        yield TIMELINE[0]

    lines = text("broken.wav", broken())
    with pytest.raises(AudioError):
        next(lines)
