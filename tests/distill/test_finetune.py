from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ced.config import FinetuneConfig, check
from ced.distill.evaluate import evaluate
from ced.distill.finetune import LabelledClips, balancing, finetune
from ced.distill.recorder import Recorder
from ced.errors import ConfigError, TableError
from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.loading import load_model
from ced.model.vit import CED
from ced.sound.labels import ClassTable, read_classes
from tests.distill.trainings import MASKS, SMALL, settings

CLASSES = ClassTable(("low", "middle", "high", "noise"))


def config_of(sounds: Path, out: Path, **changes: Any) -> FinetuneConfig:
    values = settings(sounds, out, eval_data=sounds / "eval.tsv", classes=sounds / "classes.tsv", optimizer="AdamW")
    values |= {"chunk_length": 1, "spectransforms": MASKS}
    return check(FinetuneConfig, values | changes, "test")


def save_tagger(path: Path, classes: tuple[str, ...] = ("one", "two")) -> dict[str, torch.Tensor]:
    """Save a network with other classes and its own BatchNorm statistics, and return its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = CED(ModelConfig(outputdim=len(classes), **SMALL), ClassTable(classes))  # type: ignore[arg-type]
    network.get_buffer("init_bn.1.running_mean").fill_(-40)
    network.get_buffer("init_bn.1.running_var").fill_(400)
    network.get_buffer("init_bn.1.num_batches_tracked").fill_(1000)
    loading.save(path, network)
    return load_file(path)


@pytest.mark.parametrize("task", ["multi", "single"])
def test_a_tagger_learns_labels_from_scratch(sounds: Path, tmp_path: Path, task: str) -> None:
    config = config_of(sounds, tmp_path, task=task, epochs=14, batch_size=8, valid_every=7, mixup=0.3)
    model = load_model(finetune(config, name="tiny"))
    assert model.labels == read_classes(sounds / "classes.tsv")
    assert (model.config.pooling, model.config.activation) == ("mean", "softmax" if task == "single" else "sigmoid")
    found = evaluate(model, sounds / "eval.tsv")
    assert found.map > 0.8
    assert found.accuracy is not None
    assert found.accuracy > 0.5
    if task == "single":
        probs = model.probs(torch.randn(2, 16_000))
        torch.testing.assert_close(probs.sum(1), torch.ones(2))


def test_only_the_head_is_trained_with_trainable_head(sounds: Path, tmp_path: Path) -> None:
    before = save_tagger(tmp_path / "start.safetensors")
    config = config_of(sounds, tmp_path, model=str(tmp_path / "start.safetensors"), pretrained=True, trainable="head")
    after = load_file(finetune(config, name="tiny") / "last.safetensors")
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"outputlayer.0.weight", "outputlayer.0.bias", "outputlayer.1.weight", "outputlayer.1.bias"}
    assert after["outputlayer.1.weight"].shape == (4, 32)


def test_all_weights_but_the_head_are_taken_from_a_checkpoint_with_other_classes(sounds: Path, tmp_path: Path) -> None:
    before = save_tagger(tmp_path / "start.safetensors")
    changes = {"pretrained": str(tmp_path / "start.safetensors"), "optimizer_args": {"lr": 1e-12}, "epochs": 1}
    after = load_file(finetune(config_of(sounds, tmp_path, **changes), name="tiny") / "last.safetensors")
    for key in ("blocks.1.mlp.fc2.weight", "time_pos_embed", "patch_embed.proj.weight"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-8)
    assert int(after["init_bn.1.num_batches_tracked"]) == 1003


def test_epochs_have_crops_and_views_of_their_own(sounds: Path) -> None:
    config = config_of(sounds, sounds, chunk_length=0.4)
    clips = LabelledClips(config, CLASSES)
    first, second, again = (clips.epoch(epoch) for epoch in (1, 2, 1))
    data = first.dataset
    assert data.samples == 6400
    lengths = data.chunks.stops - data.chunks.starts
    assert set(lengths.tolist()) == {6400}
    assert len(set(data.chunks.starts.tolist())) > 40
    for name in ("starts", "clips"):
        np.testing.assert_array_equal(getattr(data.chunks, name), getattr(again.dataset.chunks, name))
    assert data.seeds is not None
    assert second.dataset.seeds is not None
    np.testing.assert_array_equal(data.seeds, np.asarray(again.dataset.seeds))
    assert not np.array_equal(data.chunks.starts, second.dataset.chunks.starts)
    assert not np.array_equal(data.seeds, second.dataset.seeds)
    targets = clips.targets(np.array([0, 5]), torch.Generator())
    assert targets.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


def test_rare_classes_are_drawn_as_often_as_common_ones(sounds: Path, tmp_path: Path) -> None:
    """Of 48 clips, 12 have each class; most clips of one class are removed, and the others drawn more often."""
    rows = (sounds / "train.tsv").read_text().splitlines()
    rare = [row for row in rows if "\t3\t" in row]
    table = tmp_path / "rare.tsv"
    table.write_text("\n".join(row for row in rows if row not in rare[3:]) + "\n")
    clips = LabelledClips(config_of(sounds, tmp_path, train_data=table, balanced=True), CLASSES)
    weights = clips.epoch(1).weights
    assert weights is not None
    labels = np.array([row[0] for row in clips.labels])
    np.testing.assert_allclose([weights[labels == label].sum() for label in range(4)], 1)
    folder = finetune(config_of(sounds, tmp_path, train_data=table, balanced=True), name="tiny")
    assert (folder / "averaged.safetensors").exists()


def test_balancing_counts_each_label_of_a_clip_and_clips_without_any() -> None:
    found = balancing([(0,), (0, 1), (), (0,), (2,), ()])
    np.testing.assert_allclose(found, [1 / 3, 1 / 3 + 1, 1 / 2, 1 / 3, 1, 1 / 2])


@pytest.mark.parametrize(
    ("task", "expected"), [("multi", [0.05, 0.95, 0.05, 0.05]), ("single", [0.025, 0.925, 0.025, 0.025])]
)
def test_labels_are_smoothed(sounds: Path, task: str, expected: list[float]) -> None:
    config = config_of(sounds, sounds, task=task, label_smoothing=0.1)
    targets = LabelledClips(config, CLASSES).targets(np.array([5]), torch.Generator())
    torch.testing.assert_close(targets, torch.tensor([expected]))
    if task == "single":  # torch's own
        logits = torch.randn(1, 4)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1]), label_smoothing=0.1)
        torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), loss)


def test_short_clips_are_padded(sounds: Path) -> None:
    batch = LabelledClips(config_of(sounds, sounds, chunk_length=1.5), CLASSES).epoch(1).dataset[0]
    assert batch.waves.shape == (1, 24_000)
    assert batch.waves[0, :16_000].any()
    assert not batch.waves[0, 16_000:].any()


def relabelled(sounds: Path, folder: Path, label: str) -> Path:
    """Return a copy of the training table whose third row has another label."""
    rows = (sounds / "train.tsv").read_text().splitlines()
    name, _, packed = rows[3].split("\t")
    rows[3] = f"{name}\t{label}\t{packed}"
    table = folder / "relabelled.tsv"
    table.write_text("\n".join(rows) + "\n")
    return table


@pytest.mark.parametrize(
    ("label", "task", "message"),
    [
        ("1;2", "single", r"row 3 \(train2.wav\) has 2 labels; task single needs exactly one"),
        ("", "single", r"row 3 \(train2.wav\) has 0 labels"),
        ("4", "multi", r"row 3: label '4' is not one of 0 to 3"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(
    sounds: Path, tmp_path: Path, label: str, task: str, message: str
) -> None:
    with pytest.raises(TableError, match=message):
        finetune(config_of(sounds, tmp_path, train_data=relabelled(sounds, tmp_path, label), task=task), name="tiny")


def test_a_table_without_labels_is_refused(sounds: Path, tmp_path: Path) -> None:
    rows = [line.split("\t") for line in (sounds / "train.tsv").read_text().splitlines()]
    table = tmp_path / "unlabelled.tsv"
    table.write_text("".join(f"{name}\t{packed}\n" for name, _, packed in rows))
    message = r"unlabelled\.tsv has no column 'labels'; its columns are filename, hdf5path"
    for changes in ({"train_data": table}, {"eval_data": table}):
        with pytest.raises(TableError, match=message):
            finetune(config_of(sounds, tmp_path, **changes), name="tiny")


def test_a_frozen_network_resumes_to_the_same_weights(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with random weights: its BatchNorm statistics do not change, whatever the first batch is."""
    config = config_of(sounds, tmp_path / "unbroken", trainable="head")
    unbroken = finetune(config, name="tiny")
    killed = config.model_copy(update={"outputpath": tmp_path / "killed"})
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(killed, name="tiny")
    (folder,) = (tmp_path / "killed/tiny").iterdir()
    finetune(killed, name="tiny", resume=folder)
    assert (folder / "last.safetensors").read_bytes() == (unbroken / "last.safetensors").read_bytes()


def interrupt(recorder: Recorder) -> None:
    raise KeyboardInterrupt


def test_task_multi_accepts_clips_with_several_labels_or_none(sounds: Path, tmp_path: Path) -> None:
    for label in ("0;3", ""):
        table = relabelled(sounds, tmp_path, label)
        finetune(config_of(sounds, tmp_path, train_data=table, eval_data=None, epochs=1), name="tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 0.1}, "chunk_length is 0.1 s; the shortest input of a model is 0.15 s"),
        ({"task": "single", "model_args": {"activation": "sigmoid"}}, "model_args.activation is 'sigmoid'"),
    ],
)
def test_impossible_settings_are_refused(sounds: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(config_of(sounds, tmp_path, **changes), name="tiny")
