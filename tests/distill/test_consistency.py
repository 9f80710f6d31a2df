"""The basis of the paper: teacher and student get the same mel, bit for bit."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from ced.config import StoreConfig, TrainConfig, check
from ced.distill.dataset import ViewDataset, chunks_of_rows, prefetch
from ced.distill.pack_reader import AudioPack
from ced.distill.store import store
from ced.distill.train import StoredViews, train
from ced.distill.view_store import ViewStore
from ced.distill.views import draw, mask
from ced.model.frontend import LogMel
from ced.model.vit import CED

_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "published_store"
PUBLISHED = Path(os.environ.get("CED_PUBLISHED_STORE", _BESIDE))

RECORDER = """
import torch

seen = []

def teach(mel):
    seen.append(mel.clone())
    return torch.sigmoid(mel.mean(2)[:, :10] / 20)
"""
SECONDS = [2.0, 5.0, 1.0, 3.3, 2.0, 1.7, 4.0001]  # whole chunks, with rests that are kept and rests that are dropped
ROWS = 12  # 1 + 3 + 1 + 2 + 1 + 1 + 2 chunks, and one of a clip kept in float32
BATCH = 5  # the teacher's


@pytest.fixture
def teacher_mels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Store two epochs; return the mel that the teacher got in each, (n, f, frames), in the order of the rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "recorder", raising=False)
    Path("recorder.py").write_text(RECORDER)
    rng = np.random.default_rng(0)
    with h5py.File("mine_0.h5", "w") as file:
        for clip, seconds in enumerate(SECONDS):
            wave = rng.normal(0, 0.1 * clip, round(seconds * 16_000))  # the first clip is silent
            file[f"clip{clip}.wav"] = np.round(wave * 32_768).clip(-32_768, 32_767).astype(np.int16)
        file["float.wav"] = rng.normal(0, 0.1, 32_000).astype(np.float32)
    names = [*(f"clip{clip}.wav" for clip in range(len(SECONDS))), "float.wav"]
    Path("mine.tsv").write_text("filename\thdf5path\n" + "".join(f"{name}\tmine_0.h5\n" for name in names))
    config = {"train_data": "mine.tsv", "outputpath": "out", "model": "recorder:teach", "topk": 3, "chunk_length": 2}
    config |= {"batch_size": BATCH, "epochs": 2, "num_workers": 2}
    assert store(check(StoreConfig, config, "test")) == Path("out/recorder_teach/mine/chunk_2")
    seen = importlib.import_module("recorder").seen[
        1:
    ]  # without the first call, which only finds out the number of classes
    assert [len(mel) for mel in seen] == 2 * [BATCH, BATCH, 2]
    return [torch.cat(seen[:3]), torch.cat(seen[3:])]


def train_config(**changes: Any) -> TrainConfig:
    values = {"logitspath": "out/recorder_teach/mine/chunk_2", "train_data": "mine.tsv", "num_classes": 10}
    return check(TrainConfig, values | {"model": "audiotransformer_tiny"} | changes, "test")


def student_views(epoch: int) -> ViewDataset:
    config = train_config()
    return StoredViews(ViewStore(config.logitspath), AudioPack(config.train_data)).epoch(epoch).dataset


def student_mel(views: ViewDataset, items: Sequence[int]) -> Tensor:
    waves, uniforms = views.__getitems__(items).to_device(torch.device("cpu"))
    return mask(LogMel()(waves), uniforms, views.recipe)


@pytest.mark.parametrize("batch_size", [1, 3, ROWS])
def test_the_student_gets_the_mel_of_the_teacher(teacher_mels: list[Tensor], batch_size: int) -> None:
    rng = np.random.default_rng(batch_size)
    for epoch, expected in enumerate(teacher_mels, start=1):
        views = student_views(epoch)
        assert len(views) == len(expected) == ROWS
        for order in (np.arange(ROWS), rng.permutation(ROWS)):
            for start in range(0, ROWS, batch_size):
                items = order[start : start + batch_size].tolist()
                assert torch.equal(student_mel(views, items), expected[items])


def test_the_two_epochs_are_different_views(teacher_mels: list[Tensor]) -> None:
    for row, (first, second) in enumerate(zip(*teacher_mels, strict=True)):
        assert not torch.equal(first, second), row


def test_training_gives_the_network_the_mel_of_the_teacher(
    teacher_mels: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real run of two epochs, every mel is one of the teacher, and all of them occur."""
    fed: list[Tensor] = []
    forward_mel = CED.forward_mel

    def record(network: CED, mel: Tensor) -> Tensor:
        if network.training:
            fed.append(mel.clone())
        return forward_mel(network, mel)

    monkeypatch.setattr(CED, "forward_mel", record)
    network = {"embed_dim": 16, "num_heads": 1, "depth": 1, "target_length": 208}
    config = train_config(pretrained=False, model_args=network, epochs=2, batch_size=ROWS, optimizer="Adam", mode="off")
    train(config, name="consistent")
    assert [len(mel) for mel in fed] == [ROWS, ROWS]
    for mels, expected in zip(fed, teacher_mels, strict=True):
        rows = [[torch.equal(mel, row) for row in expected] for mel in mels]
        assert torch.equal(torch.tensor(rows).sum(0), torch.ones(ROWS, dtype=torch.int64))


def test_a_short_chunk_is_padded_after_the_shift(teacher_mels: list[Tensor]) -> None:
    views = student_views(1)
    rows = ViewStore(Path("out/recorder_teach/mine/chunk_2")).rows(1)
    short = rows.filenames.tolist().index("clip2.wav")  # 1 s of a 2 s chunk
    wave = views.pack.read(2, 0, 16_000)
    view = draw(views.recipe, int(rows.seeds[short]), 16_000)
    batch = views[short].waves[0].numpy()
    assert np.array_equal(batch, np.concatenate([np.roll(wave, view.shift), np.zeros(16_000, np.int16)]))
    assert teacher_mels[0][short].shape == (64, 201)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published store here")
def test_views_of_a_published_store_are_reproduced() -> None:
    opened = ViewStore(PUBLISHED)
    pack = AudioPack(PUBLISHED / "pack" / "labels" / "mine.tsv")
    shifts: list[int] = []
    for epoch in (1, 2):
        rows = opened.rows(epoch)
        chunks = chunks_of_rows(pack, rows, opened.meta.chunk_length)
        assert chunks.clips.tolist() == [0, 0, 1, 2, 3, 4, 4, 5]
        assert chunks.starts.tolist() == [0, 32_000, 0, 0, 0, 0, 32_000, 0]
        assert chunks.stops.tolist() == [32_000, 48_000, 32_000, 16_000, 32_000, 32_000, 64_000, 31_000]
        views = ViewDataset(pack, chunks, opened.meta.recipe, rows.seeds, 32_000)
        mels = torch.cat([student_mel(views, batch.items.tolist()) for batch in prefetch(views, [range(8)], 1)])
        for item in range(8):
            start, stop = int(chunks.starts[item]), int(chunks.stops[item])
            view = draw(opened.meta.recipe, int(rows.seeds[item]), stop - start)
            shifts.append(view.shift)
            assert abs(view.shift) <= (stop - start) // 2
            with h5py.File(PUBLISHED / "pack" / "hdf5" / "mine_0.h5") as file:
                wave = np.roll(file[rows.filenames[item]][start:stop], view.shift)
            assert np.array_equal(views[item].waves[0, : stop - start].numpy(), wave)
            frames = int(np.float32(view.u1) * np.float32(192))
            blank = (mels[item] == 0).all(0)
            assert int(blank.sum()) == frames
    assert shifts == [486, 0, -5746, -2444, 1394, 15562, 0, 6266, -14246, 0, 0, 1564, 0, 0, -12949, 2737]
