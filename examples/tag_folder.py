"""Tag all sounds of a folder into a pandas table, and draw the scores of each sound over time.

python examples/tag_folder.py resources --out tags
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import ced


def tag(sounds: list[Path], model: str) -> pd.DataFrame:
    """Return a row for each tag: file, start, end, label, mid, prob."""
    options = ced.TagOptions(window=2.0, hop=1.0, top_k=10)
    rows = []
    with ced.Tagger(model, jobs=2) as tagger:
        for record in tagger.tag_many(sounds, options):
            if isinstance(record, ced.AudioError):  # the other sounds are still tagged
                print("left out:", record)
            else:
                rows += record.to_rows()
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw a heat map for each sound: labels over time."""
    groups = list(table.groupby("file"))
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 2.4 * len(groups)), squeeze=False, layout="constrained")
    for axis, (file, rows) in zip(axes[:, 0], groups, strict=True):
        scores = rows.pivot_table(index="label", columns="start", values="prob", fill_value=0.0)
        scores = scores.loc[scores.max(axis=1).nlargest(5).index]  # the five labels with the highest scores
        axis.imshow(scores, aspect="auto", vmin=0, vmax=1, cmap="magma")
        axis.set_yticks(range(len(scores)), scores.index)
        axis.set_xticks(range(len(scores.columns)), [f"{start:.1f}" for start in scores.columns])
        axis.set_title(f"{Path(str(file)).name}, seconds")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Read the command line, then tag and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-m", "--model", default="esc10")
    parser.add_argument("--out", type=Path, default=Path("tags"))
    args = parser.parse_args()
    sounds = sorted(path for path in args.folder.rglob("*") if path.suffix in {".ogg", ".wav", ".flac", ".mp3"})
    table = tag(sounds, args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "tags.csv", index=False)
    draw(table, args.out / "tags.png")
    best = table.loc[table.groupby("file")["prob"].idxmax(), ["file", "label", "prob"]]
    print(best.to_string(index=False))


if __name__ == "__main__":
    main()
