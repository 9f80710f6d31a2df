from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from ced.distill.evaluate import Evaluator, evaluate
from ced.distill.wavpack import WavPack
from ced.errors import ConfigError, PackError, TableError, TrainingError
from ced.model.config import ModelConfig
from ced.model.metrics import average_precision
from ced.model.vit import CED
from ced.sound.labels import ClassTable

RATE = 16_000


def test_average_precision_of_a_written_out_case() -> None:
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    scores = np.array([[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.7, 0.5, 0.3], [0.6, 0.5, 0.4]], np.float32)
    # Class 0: hits at ranks 1 and 3. Class 1: all scores equal, so one step of precision 2 / 4.
    found = average_precision(targets, scores)
    assert found[:2] == pytest.approx([(1 + 2 / 3) / 2, 0.5])
    assert np.isnan(found[2])


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    clips, classes = draw(st.integers(1, 30)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    distinct = draw(st.sampled_from([1, 2, 5, 1000]))  # few distinct scores make many ties
    targets = rng.random((clips, classes)) < draw(st.sampled_from([0.05, 0.5, 0.95]))
    return targets, (rng.integers(0, distinct, (clips, classes)) / distinct).astype(np.float32)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_average_precision_is_that_of_scikit_learn(case: tuple[NDArray[np.bool_], NDArray[np.float32]]) -> None:
    targets, scores = case
    found = average_precision(targets, scores)
    for column in range(targets.shape[1]):
        if targets[:, column].any():
            assert found[column] == pytest.approx(
                average_precision_score(targets[:, column], scores[:, column]), abs=1e-12
            )
        else:
            assert np.isnan(found[column])


def test_a_nan_score_is_refused_by_its_place() -> None:
    scores = np.array([[0.1, 0.2], [0.3, np.nan]])
    with pytest.raises(TrainingError, match=r"clip 1 for class 1 is NaN"):
        average_precision(np.ones((2, 2), bool), scores)


def write_labelled(folder: Path, seconds: list[float], labels: list[str]) -> Path:
    """Write a labelled pack of noise clips of several lengths."""
    rng = np.random.default_rng(3)
    with h5py.File(folder / "clips.h5", "w") as file:
        for number, length in enumerate(seconds):
            wave = rng.normal(0, 3000 * (number + 1) ** 0.5, round(length * RATE)).astype(np.int16)
            file.create_dataset(f"{number}.wav", data=wave)
    rows = [f"{number}.wav\t{label}\t{folder / 'clips.h5'}\n" for number, label in enumerate(labels)]
    table = folder / "clips.tsv"
    table.write_text("filename\tlabels\thdf5path\n" + "".join(rows))
    return table


def network(classes: tuple[str, ...] = ("a", "b", "c"), seed: int = 0) -> CED:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ModelConfig(embed_dim=32, num_heads=2, depth=1, target_length=112, outputdim=len(classes))
        model = CED(config, ClassTable(classes))
        with torch.no_grad():
            model.get_parameter("outputlayer.1.weight").normal_()  # scores far apart
        return model.eval()


def test_scores_are_those_of_each_clip_alone(tmp_path: Path) -> None:
    """Clips of several lengths, some longer than one forward pass, in batches of any size."""
    seconds, labels = [1.0, 0.5, 1.0, 2.5, 0.05, 2.5, 1.0], ["0", "1", "0;1", "", "1", "0", "1"]
    table, model = write_labelled(tmp_path, seconds, labels), network()
    pack = WavPack(table)
    with torch.inference_mode():
        waves = [torch.tensor(pack.read(row, 0, pack.samples(row))).float() / 32768 for row in range(len(pack))]
        scores = torch.cat([model.probs(wave[None]) for wave in waves]).numpy()
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]], bool)
    expected = average_precision(targets, scores)
    for batch_size in (1, 4):
        found = evaluate(model, table, batch_size=batch_size, num_workers=batch_size)
        np.testing.assert_array_equal(found.per_class, expected)
        assert found.map == pytest.approx(np.nanmean(expected))
        assert (found.clips, found.missing, found.accuracy) == (7, ("c",), None)
        assert found.summary == f"mAP {found.map:.4f} (7 clips, 2 of 3 classes)"


def test_long_clips_go_into_smaller_batches(tmp_path: Path) -> None:
    table = write_labelled(tmp_path, [1.0] * 4 + [3.0] * 4, ["0"] * 8)
    told: list[tuple[str, int, int]] = []
    evaluate(network(), table, batch_size=4, progress=lambda *report: told.append(report))
    # 112 frames are 17,920 samples: of 48,000 samples, one clip at a time fills a batch of 4 * 17,920.
    assert told == [("evaluate", done, 5) for done in range(1, 6)]


def test_accuracy_is_told_when_each_clip_has_one_label(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("outputlayer.1.weight").zero_()
        model.get_parameter("outputlayer.1.bias").copy_(torch.tensor([0.0, 1.0, 0.5]))
    found = evaluate(model, write_labelled(tmp_path, [0.5] * 4, ["1", "1", "1", "2"]))
    assert found.accuracy == 0.75
    assert found.missing == ("a",)
    assert "accuracy 0.7500" in found.summary


def test_several_taggers_are_evaluated_by_their_mean(tmp_path: Path) -> None:
    table = write_labelled(tmp_path, [0.5] * 6, ["0", "1", "2", "0", "1", "2"])
    members = [network(seed=seed) for seed in (0, 1)]
    mean = Evaluator(table, members[0].labels)
    alone = [mean.scores([member]) for member in members]
    np.testing.assert_allclose(mean.scores(members), (alone[0] + alone[1]) / 2, rtol=1e-6)


def test_a_clip_that_is_not_in_its_pack_is_named(tmp_path: Path) -> None:
    table = write_labelled(tmp_path, [0.5] * 2, ["0", "1", "2", "0"])
    with pytest.raises(PackError, match=r"lacks clip 2\.wav"):
        evaluate(network(), table)


@pytest.mark.parametrize(
    ("labels", "message"), [(["", ""], "no clip of .* has a class"), (["0", "3"], "label '3' is not one of 0 to 2")]
)
def test_labels_that_make_no_sense_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
    with pytest.raises(TableError, match=message):
        evaluate(network(), write_labelled(tmp_path, [0.5] * 2, labels))


def test_a_network_of_broken_weights_is_refused(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="NaN"):
        evaluate(model, write_labelled(tmp_path, [0.5] * 2, ["0", "1"]))


def test_taggers_must_have_the_classes_of_the_table(tmp_path: Path) -> None:
    evaluator = Evaluator(write_labelled(tmp_path, [0.5] * 2, ["0", "1"]), ClassTable(("a", "b", "c")))
    with pytest.raises(ConfigError, match="classes"):
        evaluator(network(("a", "b", "d")))
