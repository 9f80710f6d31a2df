"""The model that comes with the package, and what lies beside it."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.esc10 import box, split
from benchmarks.esc10.report import EXTRA_FOLD
from ced.demo.sounds import generate
from ced.model.runtime import open_model
from ced.model.zoo import BOXED
from ced.sound.audio import SAMPLE_RATE
from ced.sound.tables import read_table, write_table
from ced.tag.tagger import Tagger

GRAPH = BOXED["esc10"]
DATA = os.environ.get("CED_ESC10")


def test_size_and_classes() -> None:
    assert GRAPH.stat().st_size < 6e6
    labels = open_model("esc10").labels
    assert labels.names == (
        *("Dog bark", "Rain", "Sea waves", "Baby cry", "Clock tick"),
        *("Person sneeze", "Helicopter", "Chainsaw", "Rooster", "Fire crackling"),
    )


def test_a_generated_clock_is_a_clock() -> None:
    clock = generate("Clock", np.random.default_rng(5), 4.0)
    with Tagger("esc10") as tagger:
        (window,) = tagger.tag((clock, SAMPLE_RATE), top_k=1)
    assert window.tags[0].label == "Clock tick"


def test_the_sources_of_its_recordings_are_credited() -> None:
    credit = read_table(GRAPH.with_name("esc10_credits.tsv"), required=("filename", "author", "license", "source"))
    licences = credit.column("license")
    assert len(licences) == 318
    assert {name.partition("-")[0] for name in credit.column("filename")} == {"1", "2", "3", "4"}
    assert set(licences) == {"CC0", "CC-BY"}


@pytest.mark.skipif(DATA is None, reason="CED_ESC10 does not name the data set")
def test_accuracy_of_the_model_card(tmp_path: Path) -> None:
    clips, _ = split.read_clips(Path(str(DATA)))
    held_out = [clip for clip in clips if clip.fold == EXTRA_FOLD]
    columns = {
        "filename": [str((Path(str(DATA)) / "audio" / clip.filename).resolve()) for clip in held_out],
        "labels": [str(clip.label) for clip in held_out],
    }
    write_table(tmp_path / "judge.tsv", columns)
    found = box.examine(GRAPH, tmp_path / "judge.tsv")
    stated = re.search(r"accuracy ([\d.]+) %, mAP ([\d.]+)", GRAPH.with_suffix(".md").read_text())
    assert stated is not None
    # A processor may round products of 8 bits otherwise: one recording more or less.
    assert 100 * found.accuracy == pytest.approx(float(stated[1]), abs=1.3)
    assert found.map == pytest.approx(float(stated[2]), abs=0.01)
    assert found.accuracy >= 0.85
