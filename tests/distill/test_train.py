import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from ced.config import TrainConfig, check, dump, load_config
from ced.distill.dataset import chunks_of_rows, fingerprint
from ced.distill.evaluate import evaluate
from ced.distill.experiment import create_folder, load_state
from ced.distill.pack_reader import AudioPack
from ced.distill.recorder import Recorder
from ced.distill.train import StoredViews, train
from ced.distill.view_store import ViewStore, write_meta
from ced.distill.views import ViewRecipe
from ced.errors import ConfigError, PackError, TrainingError
from ced.model.loading import load_model
from ced.model.weights import average
from tests.distill.trainings import free_ports, measurements, settings

REPOSITORY = Path(__file__).parents[2]


def config_of(sounds: Path, out: Path, **changes: Any) -> TrainConfig:
    values = settings(sounds, out, eval_data=sounds / "eval.tsv", logitspath=sounds / "store", num_classes=4)
    return check(TrainConfig, values | changes, "test")


def test_a_student_learns_from_stored_views_without_labels(sounds: Path, tmp_path: Path) -> None:
    """Its mAP on the labels of other clips is far above chance (0.25)."""
    reports: list[tuple[str, int, int]] = []
    config = config_of(sounds, tmp_path, epochs=14, batch_size=8, valid_every=5, n_saved=2, warmup_epochs=1)
    folder = train(config, name="tiny", progress=lambda *report: reports.append(report))
    metrics = measurements(folder)
    assert [line["epoch"] for line in metrics] == list(range(1, 15))
    assert [line["epoch"] for line in metrics if "mAP" in line] == [5, 10, 14]
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert reports[:6] == [("epoch 1 of 14", step, 6) for step in range(1, 7)]

    model = load_model(folder)
    assert (model.config.pooling, model.labels.names) == ("mean", ("low", "middle", "high", "noise"))
    found = evaluate(model, sounds / "eval.tsv")
    assert found.map > 0.8
    kept = sorted(folder.glob("best_*.safetensors"))
    by_map = sorted((line["mAP"] for line in metrics if "mAP" in line), reverse=True)
    assert sorted(float(path.stem.split("_")[-1]) for path in kept) == pytest.approx(sorted(by_map[:2]), abs=6e-5)
    best_first = sorted(kept, key=lambda path: -float(path.stem.split("_")[-1]))  # a count of steps is the best's
    mean = average(best_first).arrays
    for key, value in load_file(folder / "averaged.safetensors").items():
        np.testing.assert_array_equal(value.numpy(), mean[key])


def test_an_experiment_has_configuration_log_and_measurements(sounds: Path, tmp_path: Path) -> None:
    logger = logging.getLogger("ced")
    before = (logger.level, list(logger.handlers))
    config = config_of(sounds, tmp_path, logfile="my.log", mixup=0.5, label_type="last_random")
    folder = train(config, name="tiny")
    assert folder.parent == tmp_path / "tiny"
    assert load_config(TrainConfig, folder / "config.yaml") == config
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = (folder / "my.log").read_text()
    assert "epoch 2 of 2: loss" in log
    assert "averaged.safetensors is the mean of the best 2: mAP" in log
    assert (logger.level, logger.handlers) == before
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1  # two may be read in the wrong order
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("mAP")] == pytest.approx(
        [line["mAP"] for line in measurements(folder)]
    )


def test_without_labels_the_last_network_is_the_result(sounds: Path, tmp_path: Path) -> None:
    folder = train(config_of(sounds, tmp_path, eval_data=None), name="tiny")
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    assert names == {"config.yaml", "train.log", "metrics.jsonl", "curves.png", "last.safetensors", "resume.pt"}
    assert load_model(folder).config.embed_dim == 32
    assert "mAP" not in measurements(folder)[-1]


def test_the_best_network_is_the_result_when_none_are_averaged(sounds: Path, tmp_path: Path) -> None:
    folder = train(config_of(sounds, tmp_path, average=False, epochs=3), name="tiny")
    best = min(folder.glob("best_*"), key=lambda path: (-float(path.stem.split("_")[-1]), path.name))
    result = load_file(folder / "averaged.safetensors")
    assert all(torch.equal(value, result[key]) for key, value in load_file(best).items())


def test_training_stops_early_without_gain_in_validation(sounds: Path, tmp_path: Path) -> None:
    config = config_of(sounds, tmp_path, early_stop=2, epochs=9, optimizer_args={"lr": 1e-12})
    folder = train(config, name="tiny")
    assert [line["epoch"] for line in measurements(folder)] == [1, 2, 3]


def test_stored_epochs_are_used_in_turn(sounds: Path) -> None:
    store, pack = ViewStore(sounds / "store"), AudioPack(sounds / "train.tsv")
    first, second = (store.rows(epoch).seeds.tolist() for epoch in (1, 2))

    def seeds(max_epochs: int | None = None) -> list[list[int]]:
        views = StoredViews(store, pack, max_epochs=max_epochs)
        return [np.asarray(views.epoch(epoch).dataset.seeds).tolist() for epoch in (1, 2, 3)]

    assert seeds() == [first, second, first]
    assert seeds(max_epochs=1) == [first] * 3


def test_targets_are_the_stored_scores_of_the_items(sounds: Path) -> None:
    views = StoredViews(ViewStore(sounds / "store"), AudioPack(sounds / "train.tsv"))
    draw = views.epoch(1).targets
    assert draw is not None
    targets = draw(np.array([3, 0]), torch.Generator())
    expected = torch.tensor([[0.0625, 0, 0, 0.9], [0.9, 0.0625, 0, 0]]).half().float()
    assert torch.equal(targets, expected)


def test_without_consistency_the_student_draws_its_own_masks_and_no_shift(sounds: Path) -> None:
    store, pack = ViewStore(sounds / "store"), AudioPack(sounds / "train.tsv")

    def view(epoch: int, seed: int = 42) -> tuple[ViewRecipe, list[int]]:
        data = StoredViews(store, pack, consistent=False, seed=seed).epoch(epoch).dataset
        return data.recipe, np.asarray(data.seeds).tolist()

    recipe, seeds = view(1)
    assert recipe == ViewRecipe(shift=None, time_mask=20, freq_mask=8)
    assert view(1) == (recipe, seeds)  # from (seed, epoch) alone
    others = [view(2)[1], view(3)[1], view(1, seed=1)[1], store.rows(1).seeds.tolist()]
    assert all(other != seeds for other in others)


def test_published_configurations_train_on_a_published_store(tmp_path: Path) -> None:
    published = Path(os.environ.get("CED_PUBLISHED_STORE", REPOSITORY.parent / "shared/data/published_store"))
    if not published.is_dir():
        pytest.skip("no published store")
    words = ["--logitspath", published, "--train_data", published / "pack/labels/mine.tsv", "--eval_data", "null"]
    words += ["--outputpath", tmp_path, "--pretrained", "false", "--epochs", "2", "--batch_size", "4"]
    words += ["--epoch_length", "1", "--model_args.target_length", "208"]
    path = REPOSITORY / "trainconfig/balanced_mixup_tiny_T_ensemble5014_chunk10.yaml"
    folder = train(load_config(TrainConfig, path, [str(word) for word in words]), name=path.stem)
    assert [line["lr"] for line in measurements(folder)] == pytest.approx([0.0, 0.001 / 5000])
    log = (folder / "train.log").read_text()
    for warning in ("mode amp needs a GPU", "Adam8bit needs a CUDA GPU", "warm-up of 5000 steps"):
        assert warning in log


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 5}, ConfigError, "num_classes is 5, but .* has 4 classes; set num_classes to 4"),
        (
            {"model_args": {"pooling": "token"}},
            ConfigError,
            "model_args.pooling is 'token'; .* needs 'logit'",
        ),
        (
            {"model_args": {"embed_dim": 32, "num_heads": 2, "depth": 1, "hop_size": 320}},
            ConfigError,
            "the student has hop_size 320 instead of 160",
        ),
        ({"train_data": Path("eval.tsv")}, PackError, "has no clip train0.wav"),
    ],
)
def test_contradicting_settings_are_refused_before_anything_is_written(
    sounds: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    changes = {key: sounds / value if isinstance(value, Path) else value for key, value in changes.items()}
    with pytest.raises(error, match=message):
        train(config_of(sounds, tmp_path / "out", **changes), name="tiny")
    assert not (tmp_path / "out").exists()


def with_fingerprint(sounds: Path, folder: Path) -> Path:
    """Return a copy of the store with the digest of its audio."""
    store = ViewStore(shutil.copytree(sounds / "store", folder))
    pack, rows = AudioPack(sounds / "train.tsv"), store.rows(1)
    print_of = fingerprint(pack, chunks_of_rows(pack, rows, 1.0), rows.filenames, rows.starts, rows.ends)
    write_meta(folder, replace(store.meta, chunks=print_of))
    return folder


def test_other_audio_under_the_same_names_and_lengths_is_refused(sounds: Path, tmp_path: Path) -> None:
    store = with_fingerprint(sounds, tmp_path / "store")
    train(config_of(sounds, tmp_path / "out", logitspath=store, epochs=1, eval_data=None), name="tiny")
    shutil.copy(sounds / "train.h5", tmp_path / "train.h5")
    with h5py.File(tmp_path / "train.h5", "a") as file:
        for name in file:
            file[name][...] = file[name][:][::-1]
    table = tmp_path / "train.tsv"
    table.write_text((sounds / "train.tsv").read_text().replace(str(sounds / "train.h5"), str(tmp_path / "train.h5")))
    with pytest.raises(PackError, match="the audio differs"):
        train(config_of(sounds, tmp_path / "out", logitspath=store, train_data=table), name="tiny")


def test_a_store_of_blanked_views_is_warned_of(sounds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(sounds / "store", tmp_path / "store")
    meta = ViewStore(folder).meta
    write_meta(folder, replace(meta, recipe=replace(meta.recipe, time_mask=192)))
    train(config_of(sounds, tmp_path, logitspath=folder, epochs=1, eval_data=None), name="tiny")
    assert "the mask blanks 47% of the views" in caplog.text


def test_a_warm_up_longer_than_the_run_is_warned_of_with_a_value_to_use(sounds: Path, tmp_path: Path) -> None:
    folder = train(config_of(sounds, tmp_path, warmup_iters=5000, epochs=10, epoch_length=2, eval_data=None), name="a")
    assert "set warmup_iters to 2, a tenth" in (folder / "train.log").read_text()


def test_a_loss_that_is_not_finite_stops_training_at_its_step(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d of epoch [12]"):
        train(config_of(sounds, tmp_path, optimizer_args={"lr": 1e30}), name="tiny")


def test_bf16_computes_nearly_the_same(sounds: Path, tmp_path: Path) -> None:
    modes = ("off", "amp_bf16")
    losses = [
        measurements(train(config_of(sounds, tmp_path, epochs=1, mode=mode), name=mode))[0]["loss"] for mode in modes
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# Resuming -------------------------------------------------------------------------------------------------------------


def run_elsewhere(code: str, **environment: str) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | threads | environment)


TRAIN = """
from pathlib import Path
from ced.config import TrainConfig, load_config
from ced.distill.train import train
train(load_config(TrainConfig, Path({path!r})), name="run")
"""


def test_a_killed_run_resumes_to_the_same_weights(sounds: Path, tmp_path: Path) -> None:
    config = config_of(sounds, tmp_path / "killed", epochs=6, mixup=0.5, n_saved=2)
    (tmp_path / "config.yaml").write_text(dump(config))
    process = run_elsewhere(TRAIN.format(path=str(tmp_path / "config.yaml")))
    deadline = time.monotonic() + 120
    while not any('epoch": 2' in path.read_text() for path in tmp_path.glob("killed/run/*/metrics.jsonl")):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (tmp_path / "killed/run").iterdir()
    assert 2 <= len(measurements(folder)) < 6
    assert not (folder / "averaged.safetensors").exists()
    # What an epoch cut short may leave behind.
    (folder / "best_ep005_mAP_1.0000.safetensors").write_bytes(b"unfinished")
    (folder / "resume.pt.partial").write_bytes(b"unfinished")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "lo')

    assert train(load_config(TrainConfig, folder / "config.yaml"), name="other", resume=folder) == folder
    unbroken = train(config.model_copy(update={"outputpath": tmp_path / "unbroken"}), name="run")
    names = [sorted(path.name for path in one.glob("*.safetensors")) for one in (folder, unbroken)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    for before, after in zip(measurements(unbroken), measurements(folder), strict=True):
        assert before | {"seconds": 0} == after | {"seconds": 0}
    assert not list(folder.glob("*.partial"))
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1  # two may be read in the wrong order
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_changes_nothing(
    sounds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(sounds, tmp_path, epochs=1)
    folder = train(config, name="tiny")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with caplog.at_level(logging.WARNING):
        assert train(config, name="tiny", resume=folder) == folder
    assert "is finished after 1 epochs" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_killed_before_its_last_record_is_recorded(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(recorder: Recorder) -> None:
        raise KeyboardInterrupt

    config = config_of(sounds, tmp_path, epochs=1, eval_data=None)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "epoch", kill)
        with pytest.raises(KeyboardInterrupt):
            train(config, name="tiny")
    (folder,) = (tmp_path / "tiny").iterdir()
    assert measurements(folder) == []
    train(config, name="tiny", resume=folder)
    assert [line["epoch"] for line in measurements(folder)] == [1]
    assert (folder / "curves.png").exists()


def test_a_run_begun_on_other_hardware_is_refused(sounds: Path, tmp_path: Path) -> None:
    config = config_of(sounds, tmp_path)
    folder = train(config, name="tiny")
    state = torch.load(folder / "resume.pt", weights_only=True)
    state["finished"], state["epoch"] = False, 1
    state["stepper"]["kind"] = {"optimizer": "Adam8bit", "precision": "float16"}
    torch.save(state, folder / "resume.pt")
    with pytest.raises(TrainingError, match=r"Adam8bit in float16, .* Adam in float32"):
        train(config, name="tiny", resume=folder)


def test_a_run_is_resumed_only_from_an_undamaged_experiment(sounds: Path, tmp_path: Path) -> None:
    folder = train(config_of(sounds, tmp_path, epochs=1), name="tiny")
    train(config_of(sounds, tmp_path, epochs=1, num_workers=0), name="tiny", resume=folder)
    with pytest.raises(TrainingError, match="is not an experiment"):
        train(config_of(sounds, tmp_path), name="tiny", resume=tmp_path)
    (folder / "resume.pt").write_bytes(b"PK damaged")
    with pytest.raises(TrainingError, match=r"resume\.pt is damaged"):
        train(config_of(sounds, tmp_path, epochs=1), name="tiny", resume=folder)


def test_a_result_is_trained_further_in_a_new_experiment(sounds: Path, tmp_path: Path) -> None:
    """The error about changed settings has the command for it."""
    folder = train(config_of(sounds, tmp_path, epochs=1), name="tiny run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"epochs is 2, but .* was begun with 1") as caught:
        train(config_of(sounds, tmp_path, epochs=2), name="tiny run", resume=folder)
    command = str(caught.value).partition("begin a new experiment: ")[2]
    assert shlex.split(command)[:3] == ["ced", "train", str(folder / "config.yaml")]
    ran = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    further = Path(ran.stdout.strip())
    assert further.parent == folder.parent
    assert [line["epoch"] for line in measurements(further)] == [1, 2]
    assert measurements(further)[0]["loss"] < measurements(folder)[0]["loss"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "changes", [{"optimizer_args": {"lr": 0.001}}, {"eval_data": None}, {"average": False}, {"logfile": "my log.txt"}]
)
def test_the_command_in_the_error_has_the_changed_settings(
    sounds: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    begun = config_of(sounds, tmp_path)
    folder = create_folder(begun, "tiny")
    with pytest.raises(ConfigError) as caught:
        train(config_of(sounds, tmp_path, **changes), name="tiny", resume=folder)
    _, _, path, *words = shlex.split(str(caught.value).partition("begin a new experiment: ")[2])
    asked = load_config(TrainConfig, Path(path), words)
    assert asked == config_of(sounds, tmp_path, **changes, pretrained=str(folder))


def test_results_are_not_overwritten_when_the_state_is_missing(sounds: Path, tmp_path: Path) -> None:
    config = config_of(sounds, tmp_path, epochs=2)
    folder = train(config, name="tiny")
    (folder / "resume.pt").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TrainingError, match=r"has no resume\.pt, but it has results.*--pretrained"):
        train(config, name="tiny", resume=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_killed_in_its_first_epoch_is_resumed(sounds: Path, tmp_path: Path) -> None:
    """Even if it has saved a network, as long as no epoch was recorded."""
    config = config_of(sounds, tmp_path / "killed", epochs=1)
    unbroken = train(config_of(sounds, tmp_path / "unbroken", epochs=1), name="tiny")
    folder = create_folder(config, "tiny")
    (folder / "metrics.jsonl").touch()
    for name in ("best_ep001_mAP_0.9000.safetensors", "last.safetensors"):
        (folder / name).write_bytes(b"of an epoch that was cut short")
    train(config, name="tiny", resume=folder)
    assert (folder / "averaged.safetensors").read_bytes() == (unbroken / "averaged.safetensors").read_bytes()
    assert not (folder / "best_ep001_mAP_0.9000.safetensors").exists()


def test_a_configuration_changed_during_a_run_is_refused(sounds: Path, tmp_path: Path) -> None:
    folder = train(config_of(sounds, tmp_path, epochs=1), name="tiny")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.005", "lr: 0.004"))
    with pytest.raises(TrainingError, match=r"config\.yaml .* damaged, or edited"):
        train(load_config(TrainConfig, path), name="tiny", resume=folder)


def test_a_flipped_bit_in_the_state_is_named(sounds: Path, tmp_path: Path) -> None:
    config = config_of(sounds, tmp_path, epochs=1, eval_data=None)
    folder = train(config, name="tiny")
    path = folder / "resume.pt"
    content, state = path.read_bytes(), load_state(folder)
    assert state is not None
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for place in rng.integers(len(content), size=60).tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = load_state(folder)
        except TrainingError as error:
            refused.append(str(error))
        else:  # a bit of the archive itself, of which there are two copies
            assert found is not None
            assert (found.history, found.epoch) == (state.history, state.epoch)
            for key, value in state.stepper["network"].items():
                assert torch.equal(found.stepper["network"][key], value)
    assert all("resume.pt is damaged" in message and "\n" not in message for message in refused)
    assert len(refused) > 50


def test_a_state_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "resume.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(TrainingError, match=r"resume\.pt is damaged: archive/data/0 is compressed"):
        load_state(tmp_path)


# Jobs of torchrun ----------------------------------------------------------------------------------------------------


def test_a_job_of_torchrun_resumes_its_own_run(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torchrun repeats the command without --resume, and may reset the count of restarts."""

    def kill(task: str, done: int, total: int, _: str = "") -> None:
        if (task, done) == ("epoch 3 of 4", 1):
            raise KeyboardInterrupt

    config = config_of(sounds, tmp_path / "job", epochs=4, mixup=0.5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with pytest.raises(KeyboardInterrupt):
        train(config, name="run", progress=kill)
    (begun,) = (tmp_path / "job/run").iterdir()
    assert len(measurements(begun)) == 2
    assert train(config, name="run") == begun
    whole = train(config.model_copy(update={"outputpath": tmp_path / "whole"}), name="run")
    for name in ("last.safetensors", "averaged.safetensors"):
        assert (begun / name).read_bytes() == (whole / name).read_bytes()
    # Once more, as after a kill at the end.
    with caplog.at_level(logging.WARNING):
        assert train(config, name="run") == begun
    assert "is finished after 4 epochs" in caplog.text
    # Another configuration, or another job, begins a run of its own.
    assert train(config.model_copy(update={"seed": 1, "epochs": 1}), name="run") != begun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "8")
    assert train(config, name="run") != begun
    assert len(list((tmp_path / "job/run").iterdir())) == 3


def test_a_job_without_an_id_finds_its_own_runs_only(
    sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that fails before it has an experiment must not take an earlier one for its own when it is restarted."""
    config = config_of(sounds, tmp_path, epochs=1, eval_data=None)
    found = {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for agent in ("none_a", "none_b"):
        for attempt in (0, 1):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/t/{agent}/attempt_{attempt}/0/error.json")
            found[agent, attempt] = train(config, name="run")
    assert found["none_a", 0] == found["none_a", 1] != found["none_b", 0] == found["none_b", 1]


# Several processes ----------------------------------------------------------------------------------------------------

# Resumes the experiment `plain`; then trains `whole` and, as of its second epoch, leaves a copy of it in `killed`,
# which is resumed. Each run joins at a port of its own.
TWO = """
import os, shutil
from pathlib import Path
from ced.config import TrainConfig, load_config
from ced.distill.train import train

def copy(task, step, steps):
    if task == "epoch 2 of 2" and step == 1:
        (folder,) = (here / "whole").iterdir()
        shutil.copytree(folder, here / "killed")

here, ports = Path({here!r}), {ports!r}
for port, config, folder in zip(ports, ("plain", "whole", "whole"), ("plain", None, "killed")):
    os.environ["MASTER_PORT"] = port
    resume = here / folder if folder else None
    if folder == "plain":
        (resume,) = resume.iterdir()
    values = load_config(TrainConfig, here / (config + ".yaml"))
    train(values, name="whole", resume=resume, **({{}} if resume else {{"progress": copy}}))
"""
PLAIN = {"mixup": 0.5, "label_type": "last_random", "epochs": 6}


@pytest.fixture(scope="module")
def by_two(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiments that two processes trained: see TWO."""
    here = tmp_path_factory.mktemp("two")
    plain, whole = config_of(sounds, here, **PLAIN), config_of(sounds, here, mixup=0.5)
    for config, name in ((plain, "plain"), (whole, "whole")):
        (here / f"{name}.yaml").write_text(dump(config))
    create_folder(plain, "plain")  # as a run that is killed in its first epoch leaves it
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    code = TWO.format(here=str(here), ports=free_ports(3))
    processes = [run_elsewhere(code, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return here


def test_two_processes_train_as_one_does(sounds: Path, tmp_path: Path, by_two: Path) -> None:
    """A step's gradient is that of the whole batch, and so are the statistics of the BatchNorm."""
    alone = train(config_of(sounds, tmp_path, **PLAIN), name="run")
    (together,) = (by_two / "plain").iterdir()
    for one, two in zip(measurements(alone), measurements(together), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["mAP"] == pytest.approx(one["mAP"], abs=0.02)
    first, second = (load_file(folder / "last.safetensors") for folder in (alone, together))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-2, atol=1e-3)


def test_two_processes_resume_to_the_same_weights(by_two: Path) -> None:
    killed, (unbroken,) = by_two / "killed", (by_two / "whole").iterdir()
    for name in ("last.safetensors", "averaged.safetensors"):
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes()
    assert [line["loss"] for line in measurements(killed)] == [line["loss"] for line in measurements(unbroken)]
    assert "resuming after epoch 1" in (killed / "train.log").read_text()


def test_resuming_a_run_without_a_complete_epoch_counts_as_its_begin(by_two: Path) -> None:
    (folder,) = (by_two / "plain").iterdir()
    assert "begun with" not in (folder / "train.log").read_text()
    state = load_state(folder)
    assert state is not None
    assert (state.world_size, state.finished) == (2, True)
