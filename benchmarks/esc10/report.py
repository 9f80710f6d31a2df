"""The results as a page: tables, a plot, and every single number beside them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from benchmarks.esc10 import plan, split
from benchmarks.esc10.judge import ENSEMBLE, Verdict
from ced.files import written_aside

RESULTS, PAGE, PLOT = "results.json", "results.md", "results.svg"
FOLDS = 5
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
    "own_views": "stored scores; masks of its own",
    "ced": "stored scores; the teachers' views",
    "ced_mixup": "stored scores; the teachers' views and mixup",
}
EXTRA = {
    "short": "a third of the steps",
    "labels_short": "`labels_views` with a third of the steps",
    "cross_entropy": "`labels_mixup` with softmax and cross-entropy",
    "scratch": "fresh weights instead of pre-trained ones",
    "unmixed": "no mixtures",
    "labels_mixtures": "`labels_views` with mixtures, which have the labels of both",
    "stored_1": f"1 stored epoch instead of {plan.STORED}",
    "stored_5": "5 stored epochs",
    "top_3": f"3 stored scores instead of all {plan.CLASSES}, the rest filled with zero",
    **{f"top_3_{fill}": f"3 stored scores, filled with `{fill}`" for fill in plan.FILLS},
    "top_1": "1 stored score",
    **{f"only_{name}": f"the teacher `{name}` alone" for name in plan.TEACHERS},
}
OTHERS = {"human": 95.7, "first CNN": 80.3, "random forest": 72.7}  # accuracy as published with the data set, percent


class Results:
    """All verdicts so far, in a file that is rewritten with each new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verdicts: list[Verdict] = []
        if path.exists():
            self.verdicts = [Verdict(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def of(self, arm: str, fold: int | None = None, seed: int | None = None) -> list[Verdict]:
        """Return what is known of an arm, in the order of seeds and folds."""
        return [
            one for one in self.verdicts if one.arm == arm and fold in (None, one.fold) and seed in (None, one.seed)
        ]

    def add(self, verdict: Verdict) -> None:
        """Take up a verdict, and write all."""
        self.verdicts = sorted([*self.verdicts, verdict], key=lambda one: (one.arm, one.seed, one.fold))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(self.path) as path:
            path.write_text(json.dumps([asdict(one) for one in self.verdicts], indent=1) + "\n", encoding="utf-8")


def write(results: Results, out: Path) -> None:
    """Write the page and its plot."""
    (out / PAGE).write_text("\n".join(_page(results)) + "\n", encoding="utf-8")
    _draw(results, out / PLOT)


def _page(results: Results) -> Iterator[str]:
    folds = sorted({one.fold for one in results.verdicts})
    yield "# Results"
    yield ""
    yield (
        "Does a student learn more from teachers that heard the same views than from labels? The 400 recordings of "
        "ESC-10 have five folds: each is held out once, and judges networks that learned from the other four. One "
        "source a class and fold of those is set aside to choose checkpoints by. One clip is 1.25 points of accuracy "
        "in its fold. Recordings under CC Sampling+ only judge. How long to train, and on what, was settled in trials "
        f"with fold {EXTRA_FOLD}, so the other folds are the fairer judges."
    )
    yield ""
    yield (
        f"All students are one network (width 128, depth 4; {_size(results.of('ced'))}). They start from masked "
        f"pre-training on the clips they learn from, and take the same {plan.EPOCHS * plan.STEPS} steps of 32 clips "
        "with the same loss, binary cross-entropy. Those that learn from stored scores need no labels: beside each "
        f"recording they hear {split.MIXTURES} mixtures of two, to which the teachers have listened as well. Every "
        "number is in [results.json](results.json); `python -m benchmarks.esc10 --data ESC10` makes them anew, in "
        "hours on two cores."
    )
    if len(folds) < FOLDS:
        yield ""
        yield (
            f"**Not all of it has been run: what is here is of fold {', '.join(map(str, folds))} alone,** where a "
            "difference of a few clips says little."
        )
    yield ""
    yield f"![accuracy of every student and its teachers]({PLOT})"
    yield ""
    yield from _table("teacher, on labels", TAUGHT, results, folds)
    yield ""
    yield from _table("student", ARMS, results, folds)
    yield ""
    others = ", ".join(f"{name} {value}" for name, value in OTHERS.items())
    yield f"Accuracy in percent: mean and deviation over folds, then each fold. Others, as published: {others}."
    yield ""
    yield from _differences(results)
    if any(results.of(arm) for arm in EXTRA):
        yield ""
        yield f"## One thing changed about `ced`, on fold {EXTRA_FOLD}"
        yield ""
        yield "| | accuracy | mAP |"
        yield "|---|---|---|"
        for arm, what in {"ced": "`ced` itself", **EXTRA}.items():
            for one in results.of(arm, EXTRA_FOLD):
                yield f"| {what} | {100 * one.accuracy:.1f} | {one.map:.3f} |"
        yield ""
        yield "One run each: differences of a few clips, of 1.25 points each, say little."


def _table(title: str, arms: dict[str, str], results: Results, folds: Sequence[int]) -> Iterator[str]:
    yield f"| {title} | | accuracy | mAP | " + " | ".join(f"fold {fold}" for fold in folds) + " |"
    yield "|---" * (4 + len(folds)) + "|"
    for arm, what in arms.items():
        if verdicts := results.of(arm):
            accuracies = [100 * one.accuracy for one in verdicts]
            cells = [
                f"{mean([100 * one.accuracy for one in here]):.1f}" if (here := results.of(arm, fold)) else ""
                for fold in folds
            ]
            precision = _spread([one.map for one in verdicts], 3)
            yield f"| `{arm}` | {what} | {_spread(accuracies, 1)} | {precision} | " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def _size(verdicts: Sequence[Verdict]) -> str:
    return f"{verdicts[0].parameters / 1e6:.2f} M parameters" if verdicts else "0.8 M parameters"


def _differences(results: Results) -> Iterator[str]:
    """Yield what the claim comes down to, fold against fold."""
    taught = [arm for arm in ("ced", "ced_mixup") if results.of(arm)]
    labelled = [arm for arm in plan.LABELS if results.of(arm)]
    if not taught or not labelled:
        return
    best = max(taught, key=lambda arm: _mean(results, arm))
    for other in (max(labelled, key=lambda arm: _mean(results, arm)), "own_views", ENSEMBLE):
        pairs = [
            100 * (one.accuracy - two.accuracy)
            for one in results.of(best)
            for two in results.of(other, one.fold, None if other == ENSEMBLE else one.seed)
        ]
        if pairs:
            yield f"- `{best}` against `{other}`: {_signed(pairs)} points of accuracy."


def _mean(results: Results, arm: str) -> float:
    return mean(one.accuracy for one in results.of(arm))


def _signed(values: Sequence[float]) -> str:
    text = _spread(values, 1)
    return text if text.startswith("-") else f"+{text}"


def _draw(results: Results, path: Path) -> None:
    """Draw each arm as a row: folds as dots, their mean as a bar."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "ced", "svg.fonttype": "none"})  # the same figures give the same file
    from matplotlib import pyplot

    rows = [(arm, what) for arm, what in {**ARMS, ENSEMBLE: "the teachers together"}.items() if results.of(arm)]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.5 * len(rows) + 1), layout="constrained")
    for place, (arm, _) in enumerate(rows):
        accuracies = [100 * one.accuracy for one in results.of(arm)]
        colour = "tab:orange" if arm in plan.DISTILLED else "tab:grey" if arm == ENSEMBLE else "tab:blue"
        axes.plot(accuracies, [place] * len(accuracies), "o", color=colour, alpha=0.5)
        axes.plot([mean(accuracies)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3)
    axes.set_yticks(range(len(rows)), [what for _, what in rows])
    axes.invert_yaxis()
    axes.axvline(OTHERS["human"], color="black", linestyle=":", linewidth=1)
    axes.annotate("human", (OTHERS["human"], -0.6), ha="center", annotation_clip=False)
    axes.set_xlabel("accuracy on the held-out fold, percent; bars are means")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
