"""A small sound set that a small network learns in seconds."""

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from ced.distill.view_store import Rows, StoreMeta, write_meta, write_part
from ced.distill.views import ViewRecipe
from ced.sound.labels import ClassTable

RATE = 16_000
CLASSES = ("low", "middle", "high", "noise")
TRAIN, EVAL = 48, 20  # clips


def wave_of(label: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """Make a second of one class: a tone in noise, or noise alone."""
    seconds = np.arange(RATE) / RATE
    noise = rng.normal(0, 0.02, RATE)
    if label < 3:
        pitch = (250, 1000, 3500)[label] * rng.uniform(0.9, 1.1)
        noise += 0.3 * np.sin(2 * np.pi * pitch * seconds + rng.uniform(0, 6))
    return (noise * 32767).clip(-32768, 32767).astype(np.int16)


def write_pack(table: Path, clips: Mapping[str, NDArray[np.generic]], labels: list[str]) -> None:
    """Write a pack and its labelled table by hand, as another program would."""
    packed = table.with_suffix(".h5")
    with h5py.File(packed, "w") as file:
        for name, wave in clips.items():
            file.create_dataset(name, data=wave)
    rows = [f"{name}\t{label}\t{packed}\n" for name, label in zip(clips, labels, strict=True)]
    table.write_text("filename\tlabels\thdf5path\n" + "".join(rows))


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv and eval.tsv (labelled packs of 1 s clips), classes.tsv, and store/, their views.

    The store has two epochs of one view a clip; its top 2 say 0.9 for the clip's class and 0.0625 for the next one.
    """
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(7)
    for stem, count in (("train", TRAIN), ("eval", EVAL)):
        labels = [number % len(CLASSES) for number in range(count)]
        clips = {f"{stem}{number}.wav": wave_of(label, rng) for number, label in enumerate(labels)}
        write_pack(folder / f"{stem}.tsv", clips, [str(label) for label in labels])
    lines = [f"{index}\t{name}\n" for index, name in enumerate(CLASSES)]
    (folder / "classes.tsv").write_text("index\tname\n" + "".join(lines))
    store = folder / "store"
    recipe = ViewRecipe(shift=(-0.5, 0.5), time_mask=20, freq_mask=8)
    write_meta(store, StoreMeta(recipe, 2, len(CLASSES), 1.0, ("by hand",), ClassTable(CLASSES)))
    first = np.arange(TRAIN) % len(CLASSES)
    for epoch in (1, 2):
        rows = Rows(
            values=np.tile(np.array([0.9, 0.0625], np.float16), (TRAIN, 1)),
            indexes=np.stack([first, (first + 1) % len(CLASSES)], axis=1).astype(np.int16),
            seeds=rng.integers(2**31, size=TRAIN, dtype=np.int32),
            filenames=np.array([f"train{number}.wav" for number in range(TRAIN)], dtype=object),
            starts=np.zeros(TRAIN, np.float32),
            ends=np.ones(TRAIN, np.float32),
        )
        write_part(store, epoch, 0, rows)
    return folder
