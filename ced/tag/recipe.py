"""How sounds are tagged: the choices that a record depends on, besides the sound and the model."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ced.errors import ConfigError
from ced.sound import audio
from ced.sound.labels import ClassTable
from ced.tag.defaults import TOP_K
from ced.tag.events import events
from ced.tag.inputs import Input
from ced.tag.records import Record, Scored
from ced.tag.select import Selection
from ced.tag.tagger import Tagger


@dataclass(frozen=True)
class Recipe:
    """Windows, what is kept of their scores, and whether they become events; all as `Tagger.score`, `Selection` and
    `events` have it.
    """

    window: float = 10.0  # seconds
    hop: float | None = None
    columns: bool = False
    silence: float | None = None  # dB of full scale
    top_k: int | None = TOP_K
    thresholds: float | tuple[float, ...] | None = None
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rollup: bool = False
    events: bool = False
    release: float = 0.5
    gap: float = 0.0  # seconds
    shortest: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Return the choices as JSON has them."""
        return asdict(self)

    def selection(self, labels: ClassTable) -> Selection:
        """Return what is kept of the scores of these classes.

        Raises:
            ConfigError: the recipe does not fit the classes.
        """
        given = self.thresholds
        return Selection(
            labels,
            top_k=self.top_k,
            thresholds=np.array(given, np.float32) if isinstance(given, tuple) else given,
            only=self.only,
            exclude=self.exclude,
            rollup=self.rollup,
        )


def recording(tagger: Tagger, recipe: Recipe, model: str) -> Callable[[Input], Record]:
    """Return what makes a record of a sound, by a recipe; several threads may call it at once.

    Args:
        tagger: who scores.
        recipe: what is made of the scores.
        model: what records call the tagger's model.

    Raises:
        ConfigError: the recipe contradicts itself or does not fit the model's classes.
        CheckpointError: the model cannot score columns.
        AudioError: by what is returned: the sound cannot be read.
    """
    merging = (recipe.release, recipe.gap, recipe.shortest)
    if not recipe.events and merging != (Recipe.release, Recipe.gap, Recipe.shortest):
        raise ConfigError("release, gap and shortest are of events, which are not asked for")
    selection = recipe.selection(tagger.labels)

    def scores(source: audio.Source) -> Iterator[Scored]:
        return tagger.score(
            source, window=recipe.window, hop=recipe.hop, columns=recipe.columns, silence=recipe.silence
        )

    def record(sound: Input) -> Record:
        end = 0.0

        def scored() -> Iterator[Scored]:
            nonlocal end
            for one in scores(sound.source):
                end = one.end
                yield one

        if recipe.events:
            merged = events(scored(), selection, release=recipe.release, gap=recipe.gap, shortest=recipe.shortest)
            pieces = tuple(merged)
        else:
            pieces = tuple(map(selection.tags, scored()))
        return Record(sound.name, model, end, pieces)

    nothing = (np.zeros(1, np.float32), audio.SAMPLE_RATE)
    scores(nothing)  # refuses now what every sound would be refused for
    if recipe.events:
        events((), selection, release=recipe.release, gap=recipe.gap, shortest=recipe.shortest)
    return record
