"""What several teachers answer together: their scores under one view, brought to one class table, and averaged."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ced.config import Mode
from ced.distill.precision import autocast
from ced.distill.teachers import Teacher
from ced.distill.views import SoundView, ViewRecipe, mask, sound_views
from ced.errors import CedError, ConfigError, StoreError
from ced.model.frontend import LogMel
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable, audioset
from ced.text import quoted

_log = logging.getLogger(__name__)

SHOWN = 20  # classes that a warning names before the rest is counted


class Ensemble:
    """Teachers that score the same views.

    The classes of the answer are those of `classes`. Without it they are those of the teachers if all have the same,
    and otherwise, or where a teacher's are AudioSet's in another order or most of them, AudioSet's; failing that, those
    of the first teacher that has a table.

    Raises:
        ConfigError: a teacher does not answer with scores (b, c), or has no class in common with the table.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        mode: Mode,
        recipe: ViewRecipe,
        samples: int,
        device: torch.device,
        classes: ClassTable | None = None,
    ) -> None:
        """Make an ensemble.

        Args:
            teachers: its members.
            mode: the precision in which those compute that have none of their own.
            recipe: what views do.
            samples: of every chunk, 16 kHz.
            device: where the waves are.
            classes: the class table of the scores.
        """
        self.teachers, self.mode, self.recipe, self.samples = teachers, mode, recipe, samples
        self._front_end = LogMel().to(device)
        self._counts: dict[int, int] = {}  # classes of each teacher
        silence, no_masks = torch.zeros(2, samples, device=device), torch.zeros(2, 2, device=device)
        self._counts = {number: one.shape[1] for number, one in enumerate(self._answers(silence, no_masks))}
        self.labels = _store_classes(teachers, classes)
        self.num_classes = len(self.labels) if self.labels else self._same_count()
        self._columns = [self._columns_of(number) for number in range(len(teachers))]
        weights = torch.tensor([teacher.weight for teacher in teachers], device=device)
        known = torch.tensor([[column >= 0 for column in columns] for columns in self._columns], device=device)
        self._shares = known * weights[:, None]  # (teachers, c)
        own_order = [columns == list(range(self._counts[number])) for number, columns in enumerate(self._columns)]
        self._plain = all(own_order) and len(set(weights.tolist())) == 1
        self._report()

    @property
    def known(self) -> int:
        """How many classes at least one teacher knows."""
        return int((self._shares > 0).any(0).sum())

    def __call__(self, waves: Tensor, uniforms: Tensor) -> Tensor:
        """Return the weighted mean of the teachers' probabilities, (b, t), (b, 2) -> (b, c) float32.

        The mean of a class is that of the teachers that know it; a class that no teacher knows has the probability 0.

        Args:
            waves: of chunks, shifted, in [-1, 1], 16 kHz.
            uniforms: the draws that place the masks.

        Raises:
            StoreError: a teacher fails, or its scores are not (b, c) probabilities.
        """
        answers = self._answers(waves, uniforms)
        for teacher, scores in zip(self.teachers, answers, strict=True):
            if not ((scores >= 0) & (scores <= 1)).all():  # false for NaN, too
                raise StoreError(f"teacher {teacher.name} gave scores that are not probabilities in [0, 1]")
        if self._plain:
            return torch.stack(answers).mean(0)
        total = torch.zeros(len(waves), self.num_classes, device=waves.device)
        for scores, columns, share in zip(answers, self._columns, self._shares, strict=True):
            total += scores[:, columns] * share  # the share of an unknown class is 0
        return total / self._shares.sum(0).clamp_min(torch.finfo(torch.float32).tiny)

    def _answers(self, waves: Tensor, uniforms: Tensor) -> list[Tensor]:
        """Return the scores of each teacher, (b, its classes) float32 on the device of the waves."""
        with torch.inference_mode():
            takes = {teacher.takes for teacher in self.teachers}
            mel = mask(self._front_end(waves), uniforms, self.recipe) if "mel" in takes else waves
            views = sound_views(uniforms, self.recipe, self.samples) if "waves" in takes else []
            return [self._ask(number, waves, mel, views) for number in range(len(self.teachers))]

    def _ask(self, number: int, waves: Tensor, mel: Tensor, views: Sequence[SoundView]) -> Tensor:
        teacher = self.teachers[number]
        answers = []
        for at in range(0, len(waves), teacher.batch_size or len(waves)):
            here = slice(at, at + (teacher.batch_size or len(waves)))
            try:
                with autocast(teacher.mode or self.mode, teacher.device):
                    if teacher.takes == "mel":
                        answer = teacher.score(mel[here].to(teacher.device))
                    else:
                        answer = teacher.score(waves[here].to(teacher.device), SAMPLE_RATE, views[here])
            except CedError:
                raise
            except Exception as error:  # code of others, which may fail in any way
                reason = " ".join(str(error).split())
                raise StoreError(f"teacher {teacher.name} failed: {type(error).__name__}: {reason}") from error
            answers.append(self._checked(number, answer, len(waves[here])).to(waves.device).float())
        return torch.cat(answers)

    def _checked(self, number: int, answer: object, clips: int) -> Tensor:
        name, expected = self.teachers[number].name, self._counts.get(number)
        if not isinstance(answer, Tensor) or answer.ndim != 2 or (expected is None and len(answer) != clips):
            came = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ConfigError(f"teacher {name} answered {clips} clips with {came}; expected (b, classes)")
        if expected is not None and answer.shape != (clips, expected):
            raise StoreError(f"teacher {name} gave scores {tuple(answer.shape)}, expected {(clips, expected)}")
        return answer

    def _same_count(self) -> int:
        """Return the number of classes of teachers none of which has a table."""
        if len(set(self._counts.values())) > 1:
            counts = ", ".join(f"{quoted(self.teachers[number].name)} {one}" for number, one in self._counts.items())
            raise ConfigError(f"teachers have different numbers of classes: {counts}")
        return self._counts[0]

    def _columns_of(self, number: int) -> list[int]:
        """Return, for each class of the answer, its column in a teacher's scores; -1 if the teacher lacks it."""
        teacher, count = self.teachers[number], self._counts[number]
        if teacher.labels is not None and len(teacher.labels) != count:
            raise ConfigError(f"teacher {teacher.name} gives {count} scores; its class table has {len(teacher.labels)}")
        if teacher.labels is None or self.labels is None:
            if count != self.num_classes:
                raise ConfigError(
                    f"teachers have different numbers of classes: {teacher.name} has {count} without a class table, "
                    f"the store {self.num_classes}"
                )
            return list(range(count))
        columns = matched(teacher.labels, self.labels)
        if max(columns) < 0:
            raise ConfigError(f"teacher {teacher.name} has no class in common with the class table of the store")
        return columns

    def _report(self) -> None:
        """Name the classes that have no counterpart, in one warning."""
        parts = []
        for teacher, columns in zip(self.teachers, self._columns, strict=True):
            names = teacher.labels.names if teacher.labels else ()
            if left := [name for index, name in enumerate(names) if index not in columns]:
                parts.append(f"{len(left)} of {len(names)} of teacher {teacher.name} are left out: {_some(left)}")
        names = self.labels.names if self.labels else ()
        known = (self._shares > 0).any(0).tolist()
        if unknown := [name for name, yes in zip(names, known, strict=bool(names)) if not yes]:
            parts.append(f"{len(unknown)} of {len(names)} of the store are known to no teacher: {_some(unknown)}")
        if parts:
            _log.warning("classes are matched by mid or name; %s", "; ".join(parts))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(quoted, names[:SHOWN])) + more


def _store_classes(teachers: Sequence[Teacher], asked: ClassTable | None) -> ClassTable | None:
    tables = [teacher.labels for teacher in teachers if teacher.labels is not None]
    if asked is not None or not tables:
        return asked
    if any(map(_mostly_audioset, tables)):
        return audioset()
    return tables[0]


def _mostly_audioset(table: ClassTable) -> bool:
    """Return whether a table has most of AudioSet's classes, in any order, and no others."""
    found = sum(column >= 0 for column in matched(table, audioset()))
    return found == len(table) and 2 * found > len(audioset())


def matched(table: ClassTable, target: ClassTable) -> list[int]:
    """Return the index in `table` of each class of `target`, (len(target),); -1 for a class that it lacks.

    Classes are the same if they have the same mid; otherwise if their names have the same words, upper and lower case
    and punctuation aside; otherwise if the names do up to the first comma, as in published configurations. What is
    ambiguous does not match.
    """
    if table.names == target.names:
        return list(range(len(target)))
    columns = [-1] * len(target)
    keys: list[Callable[[ClassTable], list[str]]] = [
        lambda one: list(one.mids or [""] * len(one)),
        lambda one: [_words(name) for name in one.names],
        lambda one: [_words(name.partition(",")[0]) for name in one.names],
    ]
    for key in keys:
        ours, theirs = key(table), key(target)
        once = {word for words in (ours, theirs) for word, count in Counter(words).items() if word and count == 1}
        once -= {word for words in (ours, theirs) for word, count in Counter(words).items() if count > 1}
        places = {word: index for index, word in enumerate(ours) if word in once}
        taken = set(columns)
        for index, word in enumerate(theirs):
            if columns[index] < 0 and (place := places.get(word, -1)) not in taken:
                columns[index] = place
    return columns


def _words(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.casefold()))
