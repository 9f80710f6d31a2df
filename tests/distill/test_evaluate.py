import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from ced.distill.evaluate import Evaluator, evaluate, probs_in_blocks
from ced.distill.pack_reader import AudioPack
from ced.errors import ConfigError, PackError, TableError, TrainingError
from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.metrics import average_precision
from ced.model.vit import CED
from ced.sound.labels import ClassTable

RATE = 16_000
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def test_average_precision_of_a_small_example() -> None:
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
def test_average_precision_equals_that_of_scikit_learn(case: tuple[NDArray[np.bool_], NDArray[np.float32]]) -> None:
    targets, scores = case
    found = average_precision(targets, scores)
    for column in range(targets.shape[1]):
        if targets[:, column].any():
            assert found[column] == pytest.approx(
                average_precision_score(targets[:, column], scores[:, column]), abs=1e-12
            )
        else:
            assert np.isnan(found[column])


def test_a_nan_score_is_refused_with_its_clip_and_class() -> None:
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


def test_the_score_of_a_clip_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """Clips of several lengths, some longer than one forward pass, in batches of any size."""
    seconds, labels = [1.0, 0.5, 1.0, 2.5, 0.05, 2.5, 1.0], ["0", "1", "0;1", "", "1", "0", "1"]
    table, model = write_labelled(tmp_path, seconds, labels), network()
    pack = AudioPack(table)
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
    reports: list[tuple[str, int, int]] = []
    evaluate(network(), table, batch_size=4, progress=lambda *report: reports.append(report))
    # 112 frames are 17,920 samples: of 48,000 samples, one clip at a time fills a batch of 4 * 17,920.
    assert reports == [("evaluate", done, 5) for done in range(1, 6)]


@pytest.mark.parametrize(
    ("pieces", "rest"), [(32, 0), (32, 1), (33, 0), (64, 0), (64, 1), (64, 111), (65, 0), (65, 1), (40, 50)]
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eval_avg": "max"},
        {"pad_last": False},
        {"pooling": "logit"},
        {"activation": "softmax"},
        {"pooling": "dm", "center": False},
        {"hop_size": 320, "n_fft": 1024, "win_size": 800},
    ],
)
def test_a_long_clip_in_blocks_scores_as_it_does_whole(pieces: int, rest: int, changes: dict[str, Any]) -> None:
    """Lengths near multiples of blocks and pieces; digital silence shows at which level features are clamped."""
    config = ModelConfig(**{"embed_dim": 16, "num_heads": 1, "depth": 1, "target_length": 32, "outputdim": 3} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CED(config, ClassTable(("a", "b", "c"))).eval()
        torch.nn.init.normal_(model.get_parameter("outputlayer.1.weight"))
        samples = (pieces * 32 + rest) * config.hop_size + (0 if config.center else config.n_fft - config.hop_size)
        wave = torch.randn(1, samples) * torch.linspace(0.001, 0.5, samples)
    wave[:, samples // 3 : samples // 2] = 0
    with torch.inference_mode():
        found = probs_in_blocks(model, lambda start, stop: wave[:, start:stop], samples)
        torch.testing.assert_close(found, model.probs(wave)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_an_hour_long_clip_takes_little_memory(tmp_path: Path) -> None:
    """In one piece, its spectra alone would take 1.5 GB."""
    table = write_labelled(tmp_path, [1.0, 1.0, 1.0], ["0", "1", "2"])
    with h5py.File(tmp_path / "clips.h5", "a") as file:
        second = file["0.wav"][:]
        del file["0.wav"]
        file["0.wav"] = np.tile(second, 3600)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ced.distill.evaluate import evaluate\n"
        "from ced.model.loading import load_model\n"
        "model = load_model('model.safetensors')\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "before = peak()\n"
        "found = evaluate(model, Path(sys.argv[1]))\n"
        "print(found.clips, (peak() - before) // 1024)\n"
    )
    loading.save(tmp_path / "model.safetensors", network())
    words = [sys.executable, "-c", code, str(table)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    clips, megabytes = map(int, done.stdout.split())
    assert clips == 3
    assert megabytes < 400  # of which 115 are the mapped file


def test_accuracy_is_measured_when_each_clip_has_one_label(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("outputlayer.1.weight").zero_()
        model.get_parameter("outputlayer.1.bias").copy_(torch.tensor([0.0, 1.0, 0.5]))
    found = evaluate(model, write_labelled(tmp_path, [0.5] * 4, ["1", "1", "1", "2"]))
    assert found.accuracy == 0.75
    assert found.positives.tolist() == [0, 3, 1]
    assert found.recall is not None
    np.testing.assert_array_equal(found.recall, [np.nan, 1, 0])
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
def test_invalid_labels_are_refused(tmp_path: Path, labels: list[str], message: str) -> None:
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
