import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ced.config import DecoderArgs, FinetuneConfig, PretrainConfig, TrainConfig, check, dump, load_config
from ced.distill.finetune import finetune
from ced.distill.pack_reader import AudioPack
from ced.distill.pretrain import Crops, make_autoencoder, pretrain
from ced.distill.train import train
from ced.distill.trainer import seeded
from ced.errors import CedError, ConfigError
from ced.model import loading, weights
from ced.model.config import ModelConfig
from ced.model.loading import load_model
from ced.model.vit import CED
from tests.distill.trainings import SMALL, free_ports, measurements, settings

REPOSITORY = Path(__file__).parents[2]


def values_of(sounds: Path, out: Path, **changes: Any) -> dict[str, Any]:
    values = settings(sounds, out, chunk_length=1, warmup_epochs=1, optimizer_args={"lr": 0.003})
    return values | {"decoder_args": {"embed_dim": 24, "num_heads": 2, "depth": 1}} | changes


def config_of(sounds: Path, out: Path, **changes: Any) -> PretrainConfig:
    return check(PretrainConfig, values_of(sounds, out, **changes), "test")


@pytest.fixture(scope="module")
def learned(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of a short run."""
    return pretrain(config_of(sounds, tmp_path_factory.mktemp("learned"), epochs=8, picture_every=4), name="tiny")


def test_hidden_patches_are_filled_in_better_with_training(learned: Path) -> None:
    """Predicting the mean of each patch has a loss of 1."""
    losses = [line["loss"] for line in measurements(learned)]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(1, abs=0.05)
    assert losses[-1] < 0.9
    assert [line["lr"] for line in measurements(learned)][-1] < 0.0003


def test_an_experiment_has_the_network_and_a_picture(learned: Path) -> None:
    names = {path.name for path in learned.iterdir() if "tfevents" not in path.name}
    records = {"config.yaml", "train.log", "metrics.jsonl", "curves.png", "resume.pt"}
    assert names == records | {"last.safetensors", "reconstruction.png"}
    assert (learned / "reconstruction.png").read_bytes().startswith(b"\x89PNG")
    assert "warning" not in (learned / "train.log").read_text().lower()
    state = load_file(learned / "last.safetensors")
    assert not [key for key in state if key.startswith(("decoder", "mask_token", "outputlayer", "encoder"))]
    assert {"cls_token", "token_pos_embed", "blocks.1.mlp.fc2.weight"} <= state.keys()


def test_the_result_is_a_network_without_a_trained_head(learned: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not weights.read(learned).has_head
    model = load_model(learned)
    assert (model.config.pooling, model.labels.names) == ("mean", ("untrained",))
    assert "has no output layer (masked pre-training)" in caplog.text
    key = "blocks.0.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(key), load_file(learned / "last.safetensors")[key])


def starts_from(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """Check that all weights but the head's are still those of pre-training, after a training at a rate of almost 0."""
    for key in after.keys() - {key for key in after if key.startswith(("outputlayer.", "init_bn."))}:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-8)
    moved = after["init_bn.1.running_var"] / before["init_bn.1.running_var"]
    assert 0.8 < float(moved.min()) < float(moved.max()) < 1.25
    assert int(after["init_bn.1.num_batches_tracked"]) == int(before["init_bn.1.num_batches_tracked"]) + 3


@pytest.mark.parametrize("by", ["pretrained", "model"])
def test_a_teacher_and_a_student_start_from_pre_trained_weights(
    sounds: Path, tmp_path: Path, learned: Path, by: str
) -> None:
    start: dict[str, Any] = {"pretrained": str(learned), "model": "ced_tiny", "model_args": SMALL}
    if by == "model":
        start = {"pretrained": True, "model": str(learned)}
    still = {"outputpath": tmp_path, "epochs": 1, "batch_size": 16, "optimizer": "Adam", "mode": "off"}
    still |= {"optimizer_args": {"lr": 1e-12}, "train_data": sounds / "train.tsv"}
    teaching = {"classes": sounds / "classes.tsv", "chunk_length": 1}
    teacher = finetune(check(FinetuneConfig, start | still | teaching, "test"), name="teacher")
    distilling = {"logitspath": sounds / "store", "num_classes": 4}
    student = train(check(TrainConfig, start | still | distilling, "test"), name="student")
    before = load_file(learned / "last.safetensors")
    for folder in (teacher, student):
        after = load_file(folder / "last.safetensors")
        starts_from(after, before)
        assert after["outputlayer.1.weight"].shape == (4, 32)
        assert "cls_token" not in after


def test_pre_training_starts_from_any_weights(sounds: Path, tmp_path: Path, learned: Path) -> None:
    """From those of another pre-training with the class token, from those of a tagger without the head."""
    still = {"epochs": 1, "optimizer_args": {"lr": 1e-12}}
    again = pretrain(config_of(sounds, tmp_path, pretrained=str(learned), **still), name="again")
    starts_from(load_file(again / "last.safetensors"), load_file(learned / "last.safetensors"))
    tagger = CED(ModelConfig(32, 2, depth=2, target_length=112))
    loading.save(tmp_path / "tagger.safetensors", tagger)
    other = pretrain(
        config_of(sounds, tmp_path, pretrained=str(tmp_path / "tagger.safetensors"), **still), name="other"
    )
    found = load_file(other / "last.safetensors")
    key = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(found[key], tagger.get_parameter(key).detach())


def test_each_epoch_has_crops_of_its_own_and_needs_no_labels(sounds: Path, tmp_path: Path) -> None:
    rows = [line.split("\t") for line in (sounds / "train.tsv").read_text().splitlines()]
    (tmp_path / "plain.tsv").write_text("".join(f"{name}\t{packed}\n" for name, _, packed in rows))
    pack = AudioPack(tmp_path / "plain.tsv")
    crops = Crops(pack, 6_400, seed=42)
    first, second, again = (crops.epoch(epoch).dataset.chunks.starts for epoch in (1, 2, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    long = Crops(pack, 24_000, seed=42).epoch(1).dataset[0].waves
    assert long.shape == (1, 24_000)
    assert not long[0, 16_000:].any()


def test_random_weights_are_drawn_from_the_seed() -> None:
    def decoder(seed: int) -> torch.Tensor:
        with seeded(0):
            network = CED(ModelConfig(outputdim=1, pooling="token", **SMALL))  # type: ignore[arg-type]
        decoder = DecoderArgs(embed_dim=24, num_heads=2, depth=1)
        return make_autoencoder(network, 16_000, 0.75, decoder, seed).decoder_pred.weight

    before = torch.random.get_rng_state()
    assert torch.equal(decoder(1), decoder(1))
    assert not torch.equal(decoder(1), decoder(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bf16_computes_nearly_the_same(sounds: Path, tmp_path: Path) -> None:
    modes = ("off", "amp_bf16")
    losses = [
        measurements(pretrain(config_of(sounds, tmp_path, epochs=1, mode=mode), name=mode))[0]["loss"] for mode in modes
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_length": 10}, "62 patch columns are more than the 7 of target_length 112; shorten chunk_length"),
        ({"chunk_length": 0.1}, "chunk_length is 0.1 s; the shortest"),
        ({"chunk_length": 0.15, "mask_ratio": 0.9}, "mask_ratio 0.9 leaves 0 of 4 patches visible"),
        ({"model_args": SMALL | {"pooling": "mean"}}, "model_args.pooling is 'mean'; this training needs 'token'"),
        ({"train_data": Path("nowhere.tsv")}, "nowhere.tsv"),
        ({"pretrained": "nowhere.safetensors"}, "no checkpoint at nowhere.safetensors"),
    ],
)
def test_impossible_settings_are_refused_in_one_line_before_anything_is_written(
    sounds: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CedError) as caught:
        pretrain(config_of(sounds, tmp_path / "out", **changes), name="tiny")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["eval_data", "early_stop", "mixup", "average"])
def test_keys_that_need_labels_are_refused_with_the_reason(sounds: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: pre-training uses no labels") as caught:
        config_of(sounds, sounds, **{key: 1, "mask_ratio": 1})
    assert "2 error(s)" in str(caught.value)


# Resuming, several processes ------------------------------------------------------------------------------------------

PRETRAIN = """
from pathlib import Path
from ced.config import PretrainConfig, load_config
from ced.distill.pretrain import pretrain
pretrain(load_config(PretrainConfig, Path({path!r})), name="run")
"""


def run_elsewhere(path: Path, **environment: str) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = PRETRAIN.format(path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | threads | environment)


def test_a_run_interrupted_in_an_epoch_resumes_to_the_same_bytes(sounds: Path, tmp_path: Path) -> None:
    def kill(task: str, done: int, total: int, _: str = "") -> None:
        if (task, done) == ("epoch 3 of 4", 2):
            raise KeyboardInterrupt

    config = config_of(sounds, tmp_path / "killed", epochs=4, picture_every=1)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, name="run", progress=kill)
    (folder,) = (tmp_path / "killed/run").iterdir()
    assert len(measurements(folder)) == 2
    assert pretrain(load_config(PretrainConfig, folder / "config.yaml"), name="other", resume=folder) == folder
    unbroken = pretrain(config.model_copy(update={"outputpath": tmp_path / "unbroken"}), name="run")
    for name in ("last.safetensors", "reconstruction.png"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    assert [line["loss"] for line in measurements(folder)] == [line["loss"] for line in measurements(unbroken)]


def test_two_processes_pre_train_as_one_does(sounds: Path, tmp_path: Path) -> None:
    """With the statistics of the whole batch, and the same patches hidden in each clip."""
    config = config_of(sounds, tmp_path / "two", epochs=1)
    (tmp_path / "config.yaml").write_text(dump(config))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    processes = [
        run_elsewhere(tmp_path / "config.yaml", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (together,) = (tmp_path / "two/run").iterdir()
    alone = pretrain(config.model_copy(update={"outputpath": tmp_path / "one"}), name="run")
    assert measurements(together)[0]["loss"] == pytest.approx(measurements(alone)[0]["loss"], rel=1e-4)
    first, second = (load_file(folder / "last.safetensors") for folder in (alone, together))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-2, atol=1e-3)
