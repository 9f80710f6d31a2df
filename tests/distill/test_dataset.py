import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ced.distill.dataset import (
    Chunks,
    ViewDataset,
    chunks_of_rows,
    crop,
    cut_chunks,
    in_batches,
    prefetch,
    shuffled,
    weighted,
    whole_clips,
)
from ced.distill.pack_reader import AudioPack
from ced.distill.view_store import Rows
from ced.distill.views import ViewRecipe, draw
from ced.errors import PackError

SECOND = 16_000


def make_pack(folder: Path, clips: Mapping[str, NDArray[np.generic]]) -> AudioPack:
    """Write a pack by hand, as another program would."""
    with h5py.File(folder / "p_0.h5", "w") as file:
        for name, wave in clips.items():
            file.create_dataset(name, data=wave)
    table = folder / "p.tsv"
    table.write_text("filename\thdf5path\n" + "".join(f"{name}\t{folder / 'p_0.h5'}\n" for name in clips))
    return AudioPack(table)


def ramp(seconds: float) -> NDArray[np.int16]:
    return (np.arange(round(seconds * SECOND)) % 30_000 + 1).astype(np.int16)


def rows(names: list[str], starts: list[float], ends: list[float]) -> Rows:
    count = len(names)
    return Rows(
        np.full((count, 1), 0.5, np.float16),
        np.zeros((count, 1), np.int16),
        np.arange(count, dtype=np.int32),
        np.array(names, dtype=object),
        np.array(starts, np.float32),
        np.array(ends, np.float32),
    )


def test_a_rest_of_half_a_chunk_is_kept_and_a_shorter_one_dropped(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"a": ramp(5), "b": ramp(4.9), "c": ramp(1), "d": ramp(0.99), "e": ramp(4)})
    chunks = cut_chunks(pack.lengths(), 2.0)
    assert chunks.clips.tolist() == [0, 0, 0, 1, 1, 2, 4, 4]
    assert chunks.starts.tolist() == [0, 32000, 64000, 0, 32000, 0, 0, 32000]
    assert chunks.stops.tolist() == [32000, 64000, 80000, 32000, 64000, 16000, 32000, 64000]


def test_rows_of_a_store_are_mapped_to_the_chunks_that_were_cut(tmp_path: Path) -> None:
    """In a clip of 20 minutes, seconds in float32 are the same for neighbouring samples."""
    pack = make_pack(tmp_path, {"a": ramp(2.5), "long": np.zeros(1200 * SECOND + 5 * SECOND + 1, np.int16)})
    chunks = cut_chunks(pack.lengths(), 10.0)
    seconds = [(array / SECOND).astype(np.float32).tolist() for array in (chunks.starts, chunks.stops)]
    assert float(np.float32(chunks.stops[-1] / SECOND)) * SECOND != chunks.stops[-1]
    again = chunks_of_rows(pack, rows(pack.names(chunks.clips).tolist(), *seconds), 10.0)
    for one, other in zip(
        (again.clips, again.starts, again.stops), (chunks.clips, chunks.starts, chunks.stops), strict=True
    ):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("starts", "ends", "message"),
    [
        ([0.0], [1.9], "1.90000 s .* 2.00000 s"),
        ([0.0], [2.0 - 1 / SECOND], "1.99994 s .* 2.00000 s"),
        ([0.7], [2.7], "0.70000 s .* 0.00000 s"),
    ],
)
def test_a_store_of_another_pack_is_refused(
    tmp_path: Path, starts: list[float], ends: list[float], message: str
) -> None:
    pack = make_pack(tmp_path, {"a": ramp(5)})
    with pytest.raises(PackError, match=f"clip a: .* {message} in the pack"):
        chunks_of_rows(pack, rows(["a"], starts, ends), 2.0)


def test_a_store_whose_pack_lacks_a_clip_is_refused(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"a": ramp(5)})
    with pytest.raises(PackError, match="gone"):
        chunks_of_rows(pack, rows(["a", "gone"], [0.0, 0.0], [2.0, 2.0]), 2.0)


def test_waves_of_a_batch_are_shifted_and_padded_in_any_order(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"a": ramp(2), "b": ramp(1.5)})
    seeds = np.array([2, 0, 5], np.int32)
    chunks = Chunks(np.array([0, 1, 0]), np.array([0, 8000, 16000]), np.array([16000, 24000, 32000]))
    dataset = ViewDataset(pack, chunks, ViewRecipe(), seeds, SECOND)
    batch = dataset.__getitems__([2, 1])
    assert batch.items.tolist() == [2, 1]
    assert batch.waves.dtype == torch.int16
    for wave, uniforms, item in zip(batch.waves, batch.uniforms, (2, 1), strict=True):
        clip, start, stop = (int(column[item]) for column in (chunks.clips, chunks.starts, chunks.stops))
        view = draw(ViewRecipe(), int(seeds[item]), stop - start)
        expected = np.zeros(SECOND, np.int16)
        expected[: stop - start] = np.roll(pack.read(clip, start, stop), view.shift)
        assert wave.tolist() == expected.tolist()
        assert uniforms.tolist() == [view.u1, view.u2]


def test_float_and_integer_clips_share_a_batch_on_one_scale(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"i": np.full(SECOND, 16384, np.int16), "f": np.full(SECOND, 0.25, np.float32)})
    both = ViewDataset(pack, whole_clips(pack, [0, 1])).__getitems__([0, 1])
    alone = ViewDataset(pack, whole_clips(pack, [0, 1]))[0]
    device = torch.device("cpu")
    assert both.to_device(device)[0][:, 7].tolist() == [0.5, 0.25]
    assert alone.to_device(device)[0][0, 7].item() == 0.5


def test_whole_clips_come_without_a_view(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"a": ramp(1.25), "b": ramp(1)})
    batch = ViewDataset(pack, whole_clips(pack, [1, 0]))[1]
    assert batch.waves[0].tolist() == ramp(1.25).tolist()


def test_crops_lie_inside_and_short_clips_are_whole(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"long": ramp(3), "short": ramp(0.5)})
    places = {tuple(crop(pack, SECOND, np.random.default_rng(seed)).starts.tolist()) for seed in range(20)}
    assert len(places) > 10
    for seed in range(20):
        chunks = crop(pack, SECOND, np.random.default_rng(seed))
        assert 0 <= chunks.starts[0] <= chunks.stops[0] - SECOND == chunks.starts[0] <= 2 * SECOND
        assert (chunks.starts[1], chunks.stops[1]) == (0, SECOND // 2)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetching_keeps_the_order_and_the_batches(tmp_path: Path, workers: int) -> None:
    pack = make_pack(tmp_path, {"a": ramp(2), "b": ramp(3)})
    dataset = ViewDataset(pack, cut_chunks(pack.lengths(), 0.2), ViewRecipe(), np.arange(25, dtype=np.int32), 3200)
    batches = list(prefetch(dataset, in_batches(25, 7), workers))
    assert [batch.items.tolist() for batch in batches] == [list(range(i, min(i + 7, 25))) for i in range(0, 25, 7)]
    expected = dataset.__getitems__(range(25))
    assert torch.equal(torch.cat([batch.waves for batch in batches]), expected.waves)


def test_prefetching_raises_errors_and_stops_when_closed(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"a": ramp(2)})
    dataset = ViewDataset(pack, whole_clips(pack, [0] * 50))
    with pytest.raises(IndexError):
        list(prefetch(dataset, [[0], [99]], 2))
    asked: list[int] = []

    def forever() -> Iterator[list[int]]:
        while True:
            asked.append(0)
            yield [0]

    batches = prefetch(dataset, forever(), 2)
    next(batches)
    batches.close()
    assert len(asked) < 20


def test_a_dataset_survives_pickling(tmp_path: Path) -> None:
    pack = make_pack(tmp_path, {"a": ramp(2)})
    dataset = ViewDataset(pack, cut_chunks(pack.lengths(), 0.5), ViewRecipe(), np.arange(4, dtype=np.int32), 8000)
    expected = dataset[3]
    again = pickle.loads(pickle.dumps(dataset))[3]
    assert torch.equal(again.waves, expected.waves)


def test_shuffled_batches_cover_all_items_in_each_round_and_depend_only_on_the_seed() -> None:
    batches = shuffled(10, 4, [1, 2])
    drawn = np.concatenate([next(batches) for _ in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    again = shuffled(10, 4, [1, 2])
    assert np.concatenate([next(again) for _ in range(5)]).tolist() == drawn.tolist()
    assert next(shuffled(10, 10, [1, 3])).tolist() != drawn[:10].tolist()


def test_items_are_drawn_in_proportion_to_their_weights() -> None:
    weights = np.array([1.0, 0.0, 2.5, 0.5])
    batches = list(weighted(weights, 8, 50, [1, 2]))
    assert [len(batch) for batch in batches] == [8] * 50
    assert np.bincount(np.concatenate(batches), minlength=4).tolist() == [100, 0, 250, 50]
    assert len({tuple(batch.tolist()) for batch in batches}) > 40  # not in order
    again, other = (list(weighted(weights, 8, 50, [1, seed])) for seed in (2, 3))
    np.testing.assert_array_equal(batches, again)
    assert not np.array_equal(batches, other)
    # With fewer draws than items, each one comes up at most once where the weights are equal.
    few = np.concatenate([np.concatenate(list(weighted(np.ones(10), 3, 1, [seed]))) for seed in range(200)])
    assert np.bincount(few).min() > 30
