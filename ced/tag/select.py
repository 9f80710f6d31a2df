"""Select the tags of a window: thresholds, chosen labels, roll-up to parent classes, the most probable k."""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError
from ced.sound.labels import ClassTable, audioset_ontology
from ced.tag.records import Scored, Tag, Tags

_FEW = 20  # labels that a message lists in full


class Selection:
    """Selects the classes of a model that become tags.

    With roll-up, the probability of a class is the highest of its own and those of its descendants in AudioSet's
    ontology, and headings of the ontology above any class of the model are added as further classes. A class then
    reaches its threshold if it or one of its descendants reaches its own. Labels are chosen after the roll-up, so an
    excluded class still counts for its parents.

    A label is the name or mid of a class; case is ignored. A heading of the ontology that is not a class of the model
    stands for all classes below it, and for itself if the roll-up adds it.

    Args:
        labels: the classes of the model.
        top_k: the most tags of a window; None: no limit. Equal probabilities are ordered by index.
        thresholds: the least probability of a tag, one number or one for each class; above 1: never a tag.
        only: the labels to keep; empty: all.
        exclude: the labels to leave out.
        rollup: whether classes take the highest probability of their descendants.

    Attributes:
        labels: the classes of tags, (c'): those of the model, then those that the roll-up added.
        thresholds: the thresholds of the model's classes, (c,), or None.

    Raises:
        ConfigError: `top_k` is below 1, a threshold is negative, the number of thresholds is not c, a label is unknown,
            no label remains, or roll-up is applied to classes without AudioSet's mids.
    """

    def __init__(
        self,
        labels: ClassTable,
        *,
        top_k: int | None = 3,
        thresholds: float | tuple[float, ...] | None = None,
        only: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rollup: bool = False,
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k is {top_k}; it must be at least 1")
        self.top_k = top_k
        self.thresholds = _checked(thresholds, len(labels))
        self.labels = labels
        self._own = len(labels)  # classes of the model; added ones follow
        self._families: _Families | None = None
        if rollup:
            self.labels = _with_headings(labels)
            self._families = _Families(self.labels, len(labels))
        kept = _find(only, self.labels, self._own) if only else set(range(len(self.labels)))
        kept -= _find(exclude, self.labels, self._own) if exclude else set()
        if not kept:
            raise ConfigError(f"no label remains of {', '.join(only) or 'all'} without {', '.join(exclude)}")
        self._chosen = np.array(sorted(kept), np.intp)
        self._is_chosen = np.zeros(len(self.labels), np.bool_)
        self._is_chosen[self._chosen] = True

    def probs(self, probs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probabilities after roll-up, (c,) -> (c')."""
        return probs if self._families is None else self._families.highest(probs)

    def reached(self, probs: NDArray[np.float32], part: float = 1.0) -> NDArray[np.bool_]:
        """Return which chosen classes reach `part` of their threshold (all, without thresholds), (c,) -> (c')."""
        if self.thresholds is None:
            return self._is_chosen
        reached = probs >= part * self.thresholds
        if self._families is not None:
            reached = self._families.any(reached)
        return reached & self._is_chosen

    def tag(self, index: int, prob: float) -> Tag:
        """Return the tag of class `index` of `labels`."""
        mid = None if self.labels.mids is None else self.labels.mids[index]
        return Tag(self.labels.names[index], index if index < self._own else None, mid, prob)

    def tags(self, scored: Scored) -> Tags:
        """Return the tags of a window, most probable first; a silent window has none."""
        if scored.silent:
            return Tags(scored.start, scored.end, ())
        probs = self.probs(scored.probs)
        shown = self._chosen if self.thresholds is None else np.flatnonzero(self.reached(scored.probs))
        best = shown[np.argsort(-probs[shown], kind="stable")[: self.top_k]]
        tags = tuple(self.tag(int(index), float(probs[index])) for index in best)
        return Tags(scored.start, scored.end, tags)


class _Families:
    """Each class with its descendants among the model's classes, in one array, so that one pass covers all."""

    def __init__(self, labels: ClassTable, own: int) -> None:
        mids = labels.mids or ()
        index_of = {mid: index for index, mid in enumerate(mids[:own])}
        families = [
            sorted(index_of[kind] for kind in {mid, *audioset_ontology().descendants(mid)} & index_of.keys())
            for mid in mids
        ]
        self._members = np.concatenate([np.array(family, np.intp) for family in families])
        self._begins = np.cumsum([0, *map(len, families[:-1])])

    def highest(self, probs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the highest value of each family, (c,) -> (c')."""
        highest: NDArray[np.float32] = np.maximum.reduceat(probs[self._members], self._begins)
        return highest

    def any(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return in which families any flag is set, (c,) -> (c')."""
        found: NDArray[np.bool_] = np.logical_or.reduceat(flags[self._members], self._begins)
        return found


def _checked(thresholds: float | tuple[float, ...] | None, count: int) -> NDArray[np.float32] | None:
    if thresholds is None:
        return None
    values = np.asarray(thresholds, np.float32)
    if values.shape not in ((), (count,)):
        raise ConfigError(
            f"thresholds have shape {values.shape}; allowed: one number, or one for each of the {count} classes"
        )
    if not (values >= 0).all():  # also true of NaN
        raise ConfigError(f"a threshold is {values[~(values >= 0)].flat[0]}; it must be 0 or more")
    return np.broadcast_to(values, (count,))


def _with_headings(labels: ClassTable) -> ClassTable:
    """Return the classes, then the nodes above any of them that are not classes, in the order of the ontology."""
    nodes = audioset_ontology().nodes
    if labels.mids is None or not nodes.keys() & set(labels.mids):
        raise ConfigError("roll-up needs classes with AudioSet's mids; this model's have none")
    above = {parent for mid in labels.mids for parent in audioset_ontology().ancestors(mid)}.difference(labels.mids)
    added = [node for node in nodes.values() if node.mid in above]
    names, mids = (node.name for node in added), (node.mid for node in added)
    return ClassTable((*labels.names, *names), (*labels.mids, *mids))


def _find(wanted: Iterable[str], labels: ClassTable, own: int) -> set[int]:
    """Return the indices that names or mids stand for; the first `own` labels are classes of the model."""
    places: dict[str, set[int]] = {}
    for words in (labels.names, labels.mids or ()):
        for index, word in enumerate(words):
            places.setdefault(word.casefold(), set()).add(index)
    if labels.mids is not None:
        index_of = {mid: index for index, mid in enumerate(labels.mids)}
        for heading in audioset_ontology().nodes.values():
            if index_of.get(heading.mid, own) >= own:
                covered = {heading.mid, *audioset_ontology().descendants(heading.mid)} & index_of.keys()
                for word in (heading.name, heading.mid) if covered else ():
                    places.setdefault(word.casefold(), set()).update(index_of[mid] for mid in covered)
    found: set[int] = set()
    for word in wanted:
        if word.strip().casefold() not in places:
            raise ConfigError(f"there is no label {word!r}; {_nearest(word, places, labels)}")
        found |= places[word.strip().casefold()]
    return found


def _nearest(word: str, known: Iterable[str], labels: ClassTable) -> str:
    """Return a hint for an unknown label: one that contains the word, or that resembles it."""
    sought, known = word.strip().casefold(), list(known)
    holding = [name for name in known if sought and sought in name]
    near = holding or difflib.get_close_matches(sought, known, n=1, cutoff=0.5)
    if not near and len(labels) <= _FEW:
        return f"the labels are {', '.join(labels.names)}"
    if not near:
        return f"the {len(labels)} labels range from {labels.names[0]} to {labels.names[-1]}"
    nodes = audioset_ontology().nodes.values() if labels.mids is not None else ()
    spelt = {name.casefold(): name for name in (*(node.name for node in nodes), *labels.names)}
    best = min(near, key=len)
    return f"did you mean {spelt.get(best, best)!r}?"
