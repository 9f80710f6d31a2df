"""Train a classifier of your own classes on the embeddings of a tagger.

Here the classes are three kinds of generated sounds; replace `make_clips` by your own samples and class names.

python examples/train_probe.py
"""

import argparse

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ced

RATE = 16_000
CLASSES = ("clicks", "hum", "hiss")


def make_clips(count: int, rng: np.random.Generator) -> tuple[list[NDArray[np.float32]], list[str]]:
    """Return clips of 1 s and the class of each."""
    waves, names = [], []
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        wave = 0.02 * rng.standard_normal(RATE)
        if name == "clicks":
            wave[rng.integers(0, RATE, 8)] += 0.9
        elif name == "hum":
            wave += 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * np.arange(RATE) / RATE)
        else:
            wave += rng.uniform(0.05, 0.2) * rng.standard_normal(RATE)
        waves.append(wave.astype(np.float32))
        names.append(name)
    return waves, names


def main() -> None:
    """Embed the clips, measure a probe by cross-validation, then use it on new clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="esc10")
    args = parser.parse_args()
    tagger = ced.Tagger(args.model)
    rng = np.random.default_rng(0)
    waves, names = make_clips(60, rng)
    vectors = np.stack([tagger.embed((wave, RATE)).clip for wave in waves])  # (clips, width)

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    scores = cross_val_score(probe, vectors, names, cv=5)
    print(f"accuracy {scores.mean():.2f} in five folds, chance {1 / len(CLASSES):.2f}")

    probe.fit(vectors, names)
    for wave, name in zip(*make_clips(3, rng), strict=True):
        (found,) = probe.predict(tagger.embed((wave, RATE)).clip[None])
        print(f"{name}: tagged as {found}")


if __name__ == "__main__":
    main()
