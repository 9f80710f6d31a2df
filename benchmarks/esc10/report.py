"""Write the results: a page with tables, a plot, and a file with every number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from benchmarks.esc10 import outside, plan, split
from benchmarks.esc10.judge import ENSEMBLE, Clips, Verdict
from ced.errors import ConfigError
from ced.files import written_aside

RESULTS, PAGE, PLOT = "results.json", "results.md", "results.svg"
COLUMNS = ("map", "divergence", "divergence_learned")  # after the accuracy
FOLDS = (1, 2, 3, 4, 5)
TRIED = "1 and 5"  # used in the trials that led to the plan
EXTRA_FOLD = 5  # the one of the extra arms and of the boxed model
TAUGHT = {
    "pictures": "convolutions over time and frequency",
    "series": "convolutions over time",
    "recurrent": "convolutions and a recurrent network",
    ENSEMBLE: "mean of the three",
}
ARMS = {
    "labels": "labels",
    "labels_views": "labels; shift and masks",
    "labels_mixup": "labels; shift, masks and mixup",
    "own_views": "stored scores; masks of its own, no shift",
    "ced": "stored scores; the teachers' views",
    "ced_mixup": "stored scores; the teachers' views and mixup",
    "own_recordings": "stored scores of the recordings alone; masks of its own, no shift",
    "ced_recordings": "stored scores of the recordings alone; the teachers' views",
}
DRAWN = {**ARMS, ENSEMBLE: "the teachers together"}
CED = ("ced", "ced_recordings")  # consistent distillation, which the tables of differences compare with all others
BRIEF_STORED = {
    "short": "`ced`",
    "ced": f"{plan.BRIEF} times the steps, as in the table above",
    "longer": f"{plan.BRIEF * plan.LONGER} times the steps",
    "masked": "weights of a masked pre-training on the recordings instead of random ones",
    "unmixed": "no mixtures",
    "stored_1": f"1 stored epoch instead of {plan.STORED}",
    "stored_5": "5 stored epochs",
    "top_3": f"3 stored scores instead of all {plan.CLASSES}, the rest filled with zero",
    **{f"top_3_{fill}": f"3 stored scores, filled with `{fill}`" for fill in plan.FILLS},
    "top_1": "1 stored score",
    **{f"only_{name}": f"the teacher `{name}` alone" for name in plan.TEACHERS},
}
BRIEF_LABELS = {
    "labels_short": "`labels_views`",
    "labels_views": f"{plan.BRIEF} times the steps, as in the table above",
    "cross_entropy": "softmax and cross-entropy",
    "labels_mixtures": "mixtures beside the recordings, which have the labels of both",
}
OUTSIDE = {
    outside.TEACHER: "the teacher itself, without training",
    "outside_labels": "labels",
    "outside_labels_views": "labels; shift and masks",
    "outside_labels_mixup": "labels; shift, masks and mixup",
    outside.OWN: "stored scores; masks of its own, no shift",
    outside.CED: "stored scores; the teacher's views",
    outside.CED_ALL: "stored scores of this teacher and the three small ones; the teachers' views",
    outside.RECORDINGS: "stored scores of the recordings alone, without mixtures; the teacher's views",
    "outside_labels_mixtures": "labels, also of the mixtures; shift and masks",
    "outside_labels_double": "labels; shift and masks; twice the steps",
    "outside_labels_masked": "labels; shift and masks; first weights of the masked pre-training",
    outside.TUNED: f"labels; shift and masks; first weights of `{outside.CED}`, so twice the steps in all",
}
OUTSIDE_CHANGED = {
    outside.FRESH: "random first weights",
    "outside_ced_half": "half of the steps",
    "outside_ced_double": "twice the steps",
    "outside_ced_fourfold": "four times the steps",
    "outside_ced_wide": "random first weights, width 192",
    "outside_ced_deep": "random first weights, depth 12",
    "outside_ced_one_view": "1 stored view of each clip",
    "outside_ced_topk_5": "5 stored scores of each view",
    "outside_ced_last_half": "classes outside the stored ones filled with half of the last stored score",
    "outside_ced_freq_8": "masks of up to 8 mel bins instead of 24",
}
OUTSIDE_PAIRS = [
    *((outside.CED, other) for other in (outside.OWN, *outside.LABELS, outside.RECORDINGS)),
    (outside.CED_ALL, outside.CED),
    *((outside.TUNED, other) for other in outside.LABELS),
]
_FRESH = ("outside_ced_wide", "outside_ced_deep")  # they have no pre-training of their shape
CHANGED_PAIRS = [(arm, outside.FRESH if arm in _FRESH else outside.CED) for arm in OUTSIDE_CHANGED]
DRAWS = 10_000  # of the bootstrap
OTHERS = {"human": 95.7, "first CNN": 80.3, "random forest": 72.7}  # accuracy as published with the data set, percent


class Results:
    """All verdicts so far, in a file that is rewritten with each new one.

    Raises:
        ConfigError: the file is damaged, or of an earlier version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verdicts: list[Verdict] = []
        if path.exists():
            try:
                self.verdicts = TypeAdapter(list[Verdict]).validate_json(path.read_bytes())
            except ValueError as error:
                raise ConfigError(
                    f"{path} was written by an earlier version; delete it, and all networks are evaluated again"
                ) from error

    def of(self, arm: str, fold: int | None = None, seed: int | None = None) -> list[Verdict]:
        """Return the verdicts on an arm, in the order of seeds and folds."""
        return [
            one for one in self.verdicts if one.arm == arm and fold in (None, one.fold) and seed in (None, one.seed)
        ]

    def add(self, verdict: Verdict) -> None:
        """Add a verdict, or replace an earlier one of the same arm, seed and fold, and write all."""
        others = [one for one in self.verdicts if _place(one) != _place(verdict)]
        self._write([*others, verdict])

    def forget(self, fold: int, arms: Sequence[str], seed: int) -> None:
        """Remove the verdicts on arms that are trained again."""
        gone = {(arm, seed, fold) for arm in arms}
        kept = [one for one in self.verdicts if _place(one) not in gone]
        if len(kept) < len(self.verdicts):
            self._write(kept)

    def _write(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts = sorted(verdicts, key=_place)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(self.path) as path:
            path.write_text(json.dumps([asdict(one) for one in self.verdicts], indent=1) + "\n", encoding="utf-8")


def _place(verdict: Verdict) -> tuple[str, int, int]:
    return verdict.arm, verdict.seed, verdict.fold


def write(results: Results, out: Path) -> None:
    """Write the page, its plot and the numbers."""
    with written_aside(out / RESULTS) as path:
        path.write_bytes(results.path.read_bytes())
    with written_aside(out / PAGE) as path:
        path.write_text("\n".join(_page(results)) + "\n", encoding="utf-8")
    if rows := [(arm, what) for arm, what in DRAWN.items() if results.of(arm)]:
        _draw(results, rows, out / PLOT)


def _page(results: Results) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield (
        "Does a student learn more from the scores of teachers for the same views than from labels? The 400 recordings "
        "of ESC-10 have five folds: each is held out once, as the test set of networks that are trained on the other "
        "four. Of these, one source per class and fold is set aside to choose checkpoints. One clip is 1.25 points of "
        "accuracy in its fold. Recordings under CC Sampling+ are used for tests only. The size of the student, the "
        f"length of its training and its data were chosen in trials with folds {TRIED}, so the other folds are the "
        "fairer test."
    )
    yield ""
    yield (
        f"All students are one network (width {plan.WIDTH}, depth {plan.DEPTH}; {_size(results.of('ced'))}). They "
        "start from random weights, and are trained for the same "
        f"{plan.EPOCHS * plan.STEPS} steps of 32 clips with the same loss, binary cross-entropy. Those that are "
        "trained on stored scores use no labels except to choose checkpoints, as in every arm; their data has, beside "
        f"each recording, {split.MIXTURES} mixtures of two recordings, which the teachers have scored as well "
        "(`own_recordings` and `ced_recordings` have no mixtures). Every number is in [results.json](results.json); "
        "`python -m benchmarks.esc10 --data ESC10` computes them again, in hours on two cores."
    )
    if missing := _missing(results):
        yield ""
        yield f"**Still to be run:** {'; '.join(missing)}. Until then, differences of a few clips are not significant."
    if any(results.of(arm) for arm in DRAWN):
        yield ""
        yield f"![accuracy of every student and its teachers]({PLOT})"
    yield ""
    yield from _table("teacher, trained on labels | network", TAUGHT, results)
    yield ""
    yield from _table("student | trained on", ARMS, results)
    yield ""
    others = ", ".join(f"{name} {value}" for name, value in OTHERS.items())
    yield (
        "Accuracy in percent: mean and standard deviation over folds, then each fold. Divergence: from the ensemble's "
        "scores on the held-out fold, which distillation minimises (Kullback-Leibler, in nats, mean over clips and "
        "classes); on training data: the same on the recordings that the network was trained on. Published accuracies: "
        f"{others}."
    )
    yield ""
    yield from _differences(results)
    if any(results.of(arm) for arm in OUTSIDE):
        yield ""
        yield from _outside(results)
    for title, arms in (("stored scores", BRIEF_STORED), ("labels", BRIEF_LABELS)):
        if results.of(next(iter(arms)), EXTRA_FOLD):
            yield ""
            yield from _brief(title, arms, results)


def _outside(results: Results) -> Iterator[str]:
    """Yield the section about students of an outside teacher."""
    verdicts = [one for arm in OUTSIDE for one in results.of(arm)]
    names = sorted({one.teacher for one in verdicts if one.teacher})
    size = next((f"; {one.parameters / 1e6:.2f} M parameters" for one in results.of(outside.CED) if one.parameters), "")
    yield "## A teacher trained on AudioSet"
    yield ""
    yield (
        f"The teacher {', '.join(f'`{name}`' for name in names)} scores the recordings in AudioSet's 527 classes. The "
        f"students take CED's mel (width {outside.WIDTH}, depth {outside.DEPTH}{size}) and are trained for "
        f"{outside.EPOCHS * outside.STEPS} steps of {outside.BATCH} clips. Those of the teacher are trained on "
        f"{outside.STORED} stored views of {outside.TOPK} scores each, of the recordings of the other four folds and "
        f"{outside.MIXTURES} mixtures for each, whose parts are played at up to {split.FASTEST:g} times their speed "
        "or down to its inverse. They begin with the weights of a masked pre-training on the same sounds, of "
        f"{outside.MASKED_EPOCHS * outside.STEPS} steps, once a fold. Students that are trained on labels have the "
        "recordings alone, except for `outside_labels_mixtures`, and random first weights, unless the table names "
        "others. No labelled clips are used to choose checkpoints: the last weights are evaluated. "
        "The views are those of the tables above: masks of up to 160 frames and 24 mel bins. This teacher was trained "
        "without masks in frequency and makes more errors under them (`benchmarks/teacher_masks.py`)."
    )
    yield ""
    yield (
        "The score of a class of ESC-10 is the highest of its AudioSet classes "
        "(`benchmarks/esc10/audioset.tsv`). The teacher's scores of some classes are much lower than those of others, "
        "which then win too often; adjusted scores are divided by the mean of their class over the recordings that the "
        "student was trained on, which needs no labels. The probe is a logistic regression on the embeddings of these "
        "recordings, and needs their labels. Divergence is from the teacher, over 527 classes."
    )
    yield ""
    yield from _outside_table("student", OUTSIDE, results)
    yield ""
    yield (
        "Differences in the folds and seeds that both have, with 95 % intervals of a bootstrap over the recordings "
        "that clips were cut from; they do not include the variation between trainings."
    )
    yield ""
    yield from _outside_differences(OUTSIDE_PAIRS, results)
    if any(results.of(arm) for arm in OUTSIDE_CHANGED):
        yield ""
        yield f"One setting of `{outside.CED}` changed:"
        yield ""
        yield from _outside_table("change", OUTSIDE_CHANGED, results)
        yield ""
        yield from _outside_differences(CHANGED_PAIRS, results)


def _outside_table(title: str, arms: Mapping[str, str], results: Results) -> Iterator[str]:
    folds = " | ".join(f"fold {fold}" for fold in FOLDS)
    yield f"| {title} | | seeds | accuracy | adjusted | probe | divergence | on training data | {folds} |"
    yield "|---" * (8 + len(FOLDS)) + "|"
    for arm, what in arms.items():
        if not (verdicts := results.of(arm)):
            continue
        accuracies = _by_fold(results, arm, "accuracy")
        cells = [f"{100 * accuracies[fold]:.1f}" if fold in accuracies else "" for fold in FOLDS]
        means = [
            str(len({one.seed for one in verdicts})),
            *(
                _spread([100 * value for value in _by_fold(results, arm, name).values()], 1)
                for name in ("accuracy", "adjusted", "probe")
            ),
            *(_spread(list(_by_fold(results, arm, name).values()), 4) for name in COLUMNS[1:]),
        ]
        yield f"| `{arm}` | {what} | {' | '.join([*means, *cells])} |"


def _outside_differences(pairs: Sequence[tuple[str, str]], results: Results) -> Iterator[str]:
    yield "| | points of accuracy | adjusted | of the probe | divergence, percent |"
    yield "|---|---|---|---|---|"
    for one, other in pairs:
        if both := _pairs(results, one, other):
            yield f"| `{one}` against `{other}` | {' | '.join(bootstrapped(both))} |"


def _pairs(results: Results, one: str, other: str) -> list[tuple[Clips, Clips]]:
    """Return the clips of two arms in the folds and seeds that both have."""
    both = [(a.clips, b.clips) for a in results.of(one) for b in results.of(other, a.fold, a.seed)]
    return [(a, b) for a, b in both if a is not None and b is not None]


def bootstrapped(pairs: Sequence[tuple[Clips, Clips]]) -> list[str]:
    """Return the differences of the three accuracies, in points, and of divergence, in percent, with intervals."""
    cells = []
    for name in ("right", "adjusted", "probe", "divergence"):
        sums: dict[str, list[float]] = {}  # by source: of the first, of the second, and the number of clips
        for a, b in pairs:
            first, second = getattr(a, name), getattr(b, name)
            if first is None or second is None:
                break
            for source, one, other in zip(a.source, first, second, strict=True):
                row = sums.setdefault(source, [0.0, 0.0, 0.0])
                row[0], row[1], row[2] = row[0] + float(one), row[1] + float(other), row[2] + 1
        else:
            cells.append(_interval(np.array(list(sums.values())), relative=name == "divergence"))
            continue
        cells.append("")
    return cells


def _interval(sums: NDArray[np.float64], relative: bool) -> str:
    """Return a difference with its 95 % interval; `sums` (sources, 3) of two arms, and numbers of clips."""
    draws = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    means = np.concatenate([sums.sum(0, keepdims=True), sums[draws].sum(1)])
    change = means[:, 0] - means[:, 1]
    values = 100 * (change / means[:, 1] if relative else change / means[:, 2])
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:+.1f} [{low:+.1f}, {high:+.1f}]"


def _missing(results: Results) -> list[str]:
    """Return the folds that the two large tables lack, each with the arms that lack it."""
    lacking: dict[str, list[str]] = {}
    for arm in (*TAUGHT, *ARMS):
        known = _by_fold(results, arm, "accuracy")
        if folds := [str(fold) for fold in FOLDS if fold not in known]:
            lacking.setdefault(", ".join(folds), []).append(f"`{arm}`")
    return [f"fold {folds} of {', '.join(arms)}" for folds, arms in lacking.items()]


def _table(title: str, arms: dict[str, str], results: Results) -> Iterator[str]:
    folds = " | ".join(f"fold {fold}" for fold in FOLDS)
    yield f"| {title} | accuracy | mAP | divergence | on training data | {folds} |"
    yield "|---" * (6 + len(FOLDS)) + "|"
    for arm, what in arms.items():
        if not results.of(arm):
            continue
        accuracies = _by_fold(results, arm, "accuracy")
        cells = [f"{100 * accuracies[fold]:.1f}" if fold in accuracies else "" for fold in FOLDS]
        means = [
            _spread([100 * value for value in accuracies.values()], 1),
            *(_spread(list(_by_fold(results, arm, name).values()), 3) for name in COLUMNS),
        ]
        yield f"| `{arm}` | {what} | {' | '.join([*means, *cells])} |"


def _brief(title: str, arms: dict[str, str], results: Results) -> Iterator[str]:
    """Yield the table of arms of one fold: the first, and those that differ from it in one thing."""
    yield f"## One thing changed: {title}, with 1/{plan.BRIEF} of the steps, on fold {EXTRA_FOLD}"
    yield ""
    yield "| | accuracy | mAP | divergence | on training data |"
    yield "|---|---|---|---|---|"
    for arm, what in arms.items():
        for one in results.of(arm, EXTRA_FOLD, seed=1):
            apart = f"{one.divergence:.3f} | {one.divergence_learned:.3f}"
            yield f"| {what} | {100 * one.accuracy:.1f} | {one.map:.3f} | {apart} |"
    yield ""
    yield "One run each: differences of a few clips, of 1.25 points each, are not significant."


def _by_fold(results: Results, arm: str, name: str) -> dict[int, float]:
    """Return a number of an arm, by fold: the mean over seeds."""
    found = {fold: [getattr(one, name) for one in results.of(arm, fold)] for fold in FOLDS}
    return {fold: mean(values) for fold, values in found.items() if values and None not in values}


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def _size(verdicts: Sequence[Verdict]) -> str:
    count = verdicts[0].parameters if verdicts else None
    return f"{count / 1e6:.2f} M parameters" if count else "under a million parameters"


def _differences(results: Results) -> Iterator[str]:
    """Yield the table of differences between consistent distillation and the other arms, in the same folds."""
    yield "| | " + " | ".join(f"`{arm}`: points of accuracy | divergence" for arm in CED) + " |"
    yield "|---" * (1 + 2 * len(CED)) + "|"
    for other in (*ARMS, ENSEMBLE):
        cells = [
            _signed(_apart(results, arm, other, name, scale), digits) if arm != other else ""
            for arm in CED
            for name, scale, digits in (("accuracy", 100, 1), ("divergence", 1, 3))
        ]
        yield f"| against `{other}` | {' | '.join(cells)} |"


def _apart(results: Results, arm: str, other: str, name: str, scale: float) -> list[float]:
    """Return the difference between two arms, in each fold that both have."""
    one, two = (_by_fold(results, each, name) for each in (arm, other))
    return [scale * (one[fold] - two[fold]) for fold in one.keys() & two.keys()]


def _signed(values: Sequence[float], digits: int) -> str:
    text = _spread(values, digits) if values else ""
    return text if text.startswith("-") or not text else f"+{text}"


def _draw(results: Results, rows: list[tuple[str, str]], path: Path) -> None:
    """Draw each arm as a row: folds as dots, their mean as a bar."""
    from scripts.drawing import figure

    with figure(path, 9, 0.5 * len(rows) + 1) as (axes,):
        for place, (arm, _) in enumerate(rows):
            accuracies = [100 * value for value in _by_fold(results, arm, "accuracy").values()]
            colour = "tab:blue" if arm in plan.LABELS else "tab:grey" if arm == ENSEMBLE else "tab:orange"
            axes.plot(accuracies, [place] * len(accuracies), "o", color=colour, alpha=0.5)
            axes.plot([mean(accuracies)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3)
        axes.set_yticks(range(len(rows)), [what for _, what in rows])
        axes.invert_yaxis()
        axes.axvline(OTHERS["human"], color="black", linestyle=":", linewidth=1)
        axes.annotate("human", (OTHERS["human"], -0.6), ha="center", annotation_clip=False)
        axes.set_xlabel("accuracy, percent; bar: mean of folds")
