import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from ced.errors import AudioError, CheckpointError, ClosedError, ConfigError
from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.graph.export import export
from ced.model.loading import TorchScorer, weights_of
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.sound.audio import Source, Window, open_sound
from ced.sound.labels import ClassTable
from ced.tag.options import TagOptions
from ced.tag.records import Record, Tag, Tags
from ced.tag.tagger import Tagger

RATE = 16_000


class Levels:
    """Scores a wave by its mean: class 0 rises with it, class 1 falls, class 2 is always in the middle."""

    labels = ClassTable(("high", "low", "middle"))

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        self.lengths.append(waves.shape[1])
        mean = waves.mean(1)
        return np.stack([mean, 1 - mean, np.full_like(mean, 0.5)], axis=1)


class Fine(Levels):
    """Scores columns of 2,560 samples, too, and remembers a wave by its length and its mean."""

    def columns(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        whole = waves[:, : waves.shape[1] // 2560 * 2560].reshape(len(waves), -1, 2560)
        return np.stack([self(column) for column in whole])

    def column_starts(self, count: int) -> NDArray[np.float64]:
        return 0.16 * np.arange(count, dtype=np.float64)

    def embed(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        return np.stack([np.full(len(waves), waves.shape[1]), waves.mean(1)], axis=1).astype(np.float32)


def small_network() -> CED:
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=32, num_heads=2, depth=1, outputdim=4, target_length=112)
    return CED(config, ClassTable(("a", "b", "c", "d"))).eval()


def spread(network: CED) -> CED:
    """Give a network random statistics and weights whose scores differ from class to class."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.fill_(225.0)
            elif name.endswith("running_mean"):
                value.fill_(-30.0)
            elif value.is_floating_point():
                value += 0.1 * torch.randn(value.shape, generator=generator)
    return network.eval()


def test_windows_are_tagged_best_first() -> None:
    wave = np.concatenate([np.full(RATE, 0.75, np.float32), np.full(RATE // 2, 0.25, np.float32)])
    first, second = Tagger(Levels()).tag((wave, RATE), top_k=2, window=1.0, tail="short")
    assert (first.start, first.end) == (0.0, 1.0)
    assert first.tags == (Tag("high", 0, None, 0.75), Tag("middle", 2, None, 0.5))
    assert (second.start, second.end) == (1.0, 1.5)
    assert second.tags == (Tag("low", 1, None, 0.75), Tag("middle", 2, None, 0.5))


def test_a_short_sound_is_scored_at_its_own_length_and_a_rest_as_asked() -> None:
    scorer = Levels()
    sound = (np.zeros(25_000, np.float32), RATE)
    Tagger(scorer).tag((np.zeros(RATE, np.float32), RATE))
    aligned = Tagger(scorer).tag(sound, window=1.0)
    short = Tagger(scorer).tag(sound, window=1.0, tail="short")
    assert scorer.lengths == [16_000, 16_000, 16_000, 16_000, 9_000]
    assert [(piece.start, piece.end) for piece in aligned] == [(0.0, 1.0), (0.5625, 1.5625)]
    assert [(piece.start, piece.end) for piece in short] == [(0.0, 1.0), (1.0, 1.5625)]


def test_padding_behind_a_sound_is_not_tagged() -> None:
    """Decoders of AAC, MP3 and Opus leave a few hundredths of a second behind a clip."""
    record = Tagger(Levels()).tag((np.zeros(round(10.052 * RATE), np.float32), RATE))
    assert [(piece.start, piece.end) for piece in record] == [(0.0, 10.0)]


def test_a_sound_shorter_than_a_patch_has_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Tagger(Levels()).tag((np.zeros(2_399, np.float32), RATE), name="click.wav")
    (warning,) = caplog.records
    assert "click.wav: only 0.150 s long, too short" in warning.getMessage()
    Tagger(Levels()).tag((np.zeros(2_400, np.float32), RATE))
    assert len(caplog.records) == 1


def test_hop_makes_windows_overlap() -> None:
    timeline = Tagger(Levels()).tag((np.zeros(2 * RATE, np.float32), RATE), window=1.0, hop=0.5)
    assert [(tags.start, tags.end) for tags in timeline] == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)]


def test_equal_scores_keep_the_order_of_the_classes() -> None:
    (tags,) = Tagger(Levels()).tag((np.full(100, 0.5, np.float32), RATE))
    assert [tag.index for tag in tags.tags] == [0, 1, 2]


def test_more_tags_than_classes_are_all_classes() -> None:
    (tags,) = Tagger(Levels()).tag((np.zeros(100, np.float32), RATE), top_k=10)
    assert len(tags.tags) == 3


def test_a_tagger_returns_the_scores_of_a_torch_network(tmp_path: Path) -> None:
    network = small_network()
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 8_000)).astype(np.float32)
    with torch.inference_mode():
        expected = network.probs(torch.from_numpy(wave)).numpy()
    scores = TorchScorer(network)(wave)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_allclose(TorchScorer(network)(wave[:1]), expected[:1], atol=1e-6)  # whatever the batch

    loading.save(tmp_path / "model.safetensors", network)
    for model in (network, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        (tags,) = Tagger(model).tag((wave[0], RATE), top_k=4)
        assert {tag.label for tag in tags.tags} == {"a", "b", "c", "d"}
        for tag in tags.tags:
            assert tag.prob == pytest.approx(expected[0, tag.index], abs=1e-5)


def test_a_sound_shorter_than_a_patch_is_tagged() -> None:
    (tags,) = Tagger(small_network()).tag((np.full(160, 0.1, np.float32), RATE))
    assert tags.end == 0.01
    assert all(0 < tag.prob < 1 for tag in tags.tags)


def test_a_file_has_the_tags_of_its_bytes_and_samples(tmp_path: Path) -> None:
    wave = np.random.default_rng(1).uniform(-0.5, 0.5, 12_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    tagger = Tagger(small_network())
    (by_path,), (by_bytes,), (by_samples,) = (
        list(tagger.tag(source)) for source in (tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes(), (wave, RATE))
    )
    assert by_path == by_bytes == by_samples


def test_columns_of_a_window_of_several_pieces_keep_time(tmp_path: Path) -> None:
    """A network of 112 frames has 7 columns in each 1.12 s; one of 120 frames leaves 0.08 s without a column."""
    export(weights_of(CED(replace(small_network().config, target_length=120)).eval()), tmp_path / "a.onnx")
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * RATE).astype(np.float32)
    starts = [one.start for one in Tagger(tmp_path / "a.onnx").score((wave, RATE), window=10.0, columns=True)]
    expected = [piece * 1.2 + column * 0.16 for piece in range(5) for column in range(7)]
    assert starts == pytest.approx(expected[: len(starts)])
    assert len(starts) == 4 * 7 + 1  # and what is left of 501 frames has one whole column


def test_a_closed_tagger_stops() -> None:
    for jobs in (1, 2):
        with Tagger(Levels(), jobs=jobs) as tagger:
            timeline = tagger.stream((np.zeros(100 * RATE, np.float32), RATE), window=1.0)
            next(timeline)
        with pytest.raises(ClosedError, match="closed"):
            list(timeline)
    with pytest.raises(ConfigError, match="jobs is 0"):
        Tagger(Levels(), jobs=0)


@pytest.mark.parametrize("wrong", [{"window": 0.0}, {"window": float("nan")}, {"hop": -1.0}])
def test_invalid_windows_are_refused_at_once(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        Tagger(Levels()).tag("never-opened.wav", **wrong)  # type: ignore[arg-type]


def test_scores_are_of_all_classes() -> None:
    (scored,) = Tagger(Levels()).score((np.full(100, 0.25, np.float32), RATE))
    assert (scored.start, scored.end) == (0.0, 100 / RATE)
    assert scored.probs.tolist() == [0.25, 0.75, 0.5]


def test_columns_are_scored_every_sixth_of_a_second() -> None:
    wave = np.repeat(np.array([0.0, 0.25, 0.5, 0.75], np.float32), 2560)
    wave = np.concatenate([wave, np.zeros(1000, np.float32)])
    scored = list(Tagger(Fine()).score((wave, RATE), window=0.32, columns=True))
    assert [(round(one.start, 4), round(one.end, 4)) for one in scored[:4]] == [
        (0.0, 0.16),
        (0.16, 0.32),
        (0.32, 0.48),
        (0.48, 0.64),
    ]
    assert [float(one.probs[0]) for one in scored[:4]] == [0.0, 0.25, 0.5, 0.75]


def test_columns_of_an_aligned_last_window_follow_those_before() -> None:
    wave = np.repeat(np.linspace(0.0, 0.875, 8, dtype=np.float32), 2560)[: 7 * 2560]  # 1.12 s
    scored = list(Tagger(Fine()).score((wave, RATE), window=0.8, columns=True))
    assert [round(one.start, 4) for one in scored] == [0.0, 0.16, 0.32, 0.48, 0.64, 0.8, 0.96]
    assert [round(one.end, 4) for one in scored] == [0.16, 0.32, 0.48, 0.64, 0.8, 0.96, 1.12]
    assert [float(one.probs[0]) for one in scored] == [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75]


def test_columns_need_a_model_that_has_them_and_windows_end_to_end() -> None:
    sound = (np.zeros(100, np.float32), RATE)
    with pytest.raises(CheckpointError, match="Levels cannot score columns"):
        Tagger(Levels()).score(sound, columns=True)
    with pytest.raises(ConfigError, match="twice"):
        Tagger(Fine()).score(sound, columns=True, hop=1.0)


def test_silent_windows_are_not_scored_and_have_no_tags() -> None:
    scorer = Levels()
    tone = 0.1 * np.sin(np.arange(RATE, dtype=np.float32))  # -23 dB
    wave = np.concatenate([tone, tone / 100, np.zeros(RATE, np.float32)])
    scored = list(Tagger(scorer).score((wave, RATE), window=1.0, silence=-60.0))
    assert len(scorer.lengths) == 1
    assert scored[0].probs.any()
    assert not scored[1].probs.any()
    assert not scored[2].probs.any()
    assert (scored[2].start, scored[2].end) == (2.0, 3.0)
    louder = list(Tagger(scorer).score((wave, RATE), window=1.0, silence=-100.0))
    assert louder[1].probs.any()


def test_an_embedding_has_a_vector_a_window_and_one_of_the_clip() -> None:
    wave = np.concatenate([np.full(RATE, 0.5, np.float32), np.full(RATE // 2, 0.125, np.float32)])
    found = Tagger(Fine()).embed((wave, RATE), window=1.0, tail="short")
    assert found.starts.tolist() == [0.0, 1.0]
    assert found.ends.tolist() == [1.0, 1.5]
    assert found.vectors.tolist() == [[16_000, 0.5], [8_000, 0.125]]
    assert found.clip.tolist() == pytest.approx([(2 * 16_000 + 8_000) / 3, (2 * 0.5 + 0.125) / 3])


def test_any_number_of_jobs_gives_the_same_in_order() -> None:
    wave = np.random.default_rng(0).uniform(-1, 1, 20 * RATE).astype(np.float32)
    network = small_network()
    results = [list(Tagger(network, jobs=jobs).tag((wave, RATE), window=0.5, hop=0.25)) for jobs in (1, 3)]
    assert len(results[0]) == 79
    assert results[0] == results[1]


def test_windows_before_an_error_are_yielded_first(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(0.0, 0.5, 10 * RATE)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="PCM_24")
    (tmp_path / "half.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-240_000])
    for jobs in (1, 2):
        found: list[Tags] = []
        with pytest.raises(AudioError, match="cut short"):
            found.extend(Tagger(Levels(), jobs=jobs).stream(tmp_path / "half.wav", window=1.0, strict=True))
        assert [tags.end for tags in found] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_the_readable_part_of_a_truncated_file_is_tagged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(0.0, 0.5, 10 * RATE), RATE)
    whole, cut = (tmp_path / "a.flac").read_bytes(), tmp_path / "cut.flac"
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    record = Tagger(Levels()).tag(cut, window=5.0)
    assert (record.complete, record.expected_seconds) == (False, 10.0)
    assert 7.0 < record.seconds < 7.5
    assert [piece.end for piece in record] == [5.0, record.seconds]
    (warning,) = caplog.records
    assert f"{cut}: cut short" in warning.getMessage()
    record = Tagger(Levels()).tag(tmp_path / "a.flac")
    assert (record.complete, record.expected_seconds) == (True, 10.0)


def test_one_channel_is_tagged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([np.full(RATE, 0.25), np.full(RATE, 0.75)], axis=1), RATE)
    for channel, level in (("mean", 0.5), ("left", 0.25), ("right", 0.75), (1, 0.25), (2, 0.75)):
        record = Tagger(Levels()).tag(tmp_path / "a.wav", channel=channel, labels=["high"])
        assert record.channel == channel
        assert record[0].prob == pytest.approx(level, abs=1e-4)
    with pytest.raises(AudioError, match="no channel 3"):
        Tagger(Levels()).tag(tmp_path / "a.wav", channel=3)


def test_an_open_sound_is_tagged(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(0.0, 1.0, 3 * RATE).astype(np.float32)
    with open_sound((wave, RATE)) as sound:
        record = Tagger(Levels()).tag(sound, window=1.0, name="a.wav")
    assert record == Tagger(Levels()).tag((wave, RATE), window=1.0, name="a.wav")


def test_a_stream_reports_its_progress() -> None:
    stream = Tagger(Levels()).stream((np.zeros(5 * RATE, np.float32), RATE), window=2.0)
    next(stream)
    assert (stream.seconds, stream.complete, stream.expected_seconds) == (2.0, False, 5.0)
    assert [piece.end for piece in stream] == [4.0, 5.0]
    assert (stream.seconds, stream.complete) == (5.0, True)


def test_a_scorer_must_fit_its_class_table() -> None:
    class Wrong(Levels):
        labels = ClassTable(("only one",))

    with pytest.raises(CheckpointError, match=r"Wrong .*\(1, 3\).* 1 class"):
        list(Tagger(Wrong()).tag((np.zeros(100, np.float32), RATE)))


@pytest.mark.parametrize("answer", [None, [[0.1, 0.2]], torch.zeros(1, 2)])
def test_a_scorer_must_return_an_array(answer: object) -> None:
    class Wrong(Levels):
        def __call__(self, waves: NDArray[np.float32], /) -> Any:
            return answer

    with pytest.raises(CheckpointError, match=r"Wrong returned .*must be a NumPy array"):
        Tagger(Wrong()).tag((np.zeros(RATE, np.float32), RATE))


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ([[0.5, float("nan"), 0.5]], "not finite"),
        ([[0.5, float("inf"), 0.5]], "not finite"),
        ([[0.5, 1.5, 0.5]], "a score of 1.5"),
        ([[0.5, -1e-3, 0.5]], "a score of -0.001"),
        ([[0.5, 0.5]], "3 classes"),
        ([0.5, 0.5, 0.5], "shape"),
    ],
)
def test_invalid_scores_are_an_error_that_names_the_model(answer: list[Any], part: str) -> None:
    class Broken(Fine):
        def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            return np.array(answer, np.float32)

        def columns(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            return np.array([answer], np.float32)

        def embed(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            return np.array(answer, np.float32)

    sound = (np.zeros(RATE, np.float32), RATE)
    tagger = Tagger(Broken(), name="broken.onnx")
    calls: list[Callable[[], object]] = [
        lambda: tagger.tag(sound),
        lambda: list(tagger.stream(sound, columns=True)),
        lambda: list(tagger.tag_many([sound])),
        lambda: list(tagger.score(sound)),
        lambda: tagger.windows.score(Window(0.0, 1.0, sound[0]), TagOptions()),
    ]
    if part in ("not finite", "shape"):
        calls.append(lambda: tagger.embed(sound))
    for call in calls:
        with pytest.raises(CheckpointError, match=f"broken.onnx.*{part}"):
            call()


def test_rounding_beyond_0_and_1_is_clipped() -> None:
    class Rounded(Levels):
        def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            return np.array([[1.0000002, -1e-8, 0.5]], np.float32)

    (scored,) = Tagger(Rounded()).score((np.zeros(RATE, np.float32), RATE))
    assert scored.probs.tolist() == [1.0, 0.0, 0.5]


def test_options_and_keywords_are_the_same() -> None:
    wave = np.repeat(np.array([0.0, 0.75, 0.75, 0.0], np.float32), RATE)
    tagger = Tagger(Levels())
    options = TagOptions(window=1.0, events=True, threshold=0.6, labels=("high",))
    record = tagger.tag((wave, RATE), options, name="a.wav")
    assert record == tagger.tag((wave, RATE), options, window=1.0, name="a.wav")
    assert record == tagger.tag((wave, RATE), name="a.wav", window=1.0, events=True, threshold=0.6, labels=("high",))
    assert (record.file, record.model, record.seconds, record.kind) == ("a.wav", "Levels", 4.0, "events")
    assert [(event.start, event.end, event.label, event.prob) for event in record.events] == [(1.0, 3.0, "high", 0.75)]
    assert list(tagger.stream((wave, RATE), options)) == list(record) == [record[0]] == list(record[:1])
    assert len(record) == 1
    assert record.to_rows() == [{"file": "a.wav", "start": 1.0, "end": 3.0, "label": "high", "mid": None, "prob": 0.75}]
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(ConfigError, match="events=True"):
        tagger.tag((wave, RATE)).events  # noqa: B018


def test_many_sounds_give_records_and_errors_in_order(tmp_path: Path) -> None:
    sources: list[Source] = [(np.full(RATE * (1 + number), 0.5, np.float32), RATE) for number in range(5)]
    sources.insert(2, tmp_path / "missing.wav")
    for jobs in (1, 3):
        with Tagger(Levels(), jobs=jobs) as tagger:
            found = list(tagger.tag_many(iter(sources), window=1.0))
        assert [len(one) if isinstance(one, Record) else str(one) for one in found[:2] + found[3:]] == [1, 2, 3, 4, 5]
        assert isinstance(found[2], AudioError)
        assert "missing.wav" in str(found[2])
    with pytest.raises(ConfigError, match="no label 'hi'"):
        Tagger(Levels()).tag_many(["never-opened.wav"], labels=("hi",))


def test_a_model_runs_where_and_how_it_can() -> None:
    with pytest.raises(ConfigError, match=r"device is 'cuda', .* available here: auto, cpu"):
        Tagger("esc10", device="cuda")
    with pytest.raises(ConfigError, match="precision is 'int4'; allowed: float32, int8"):
        Tagger("esc10", precision="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="int8"):
        Tagger(small_network(), precision="int8")
    with pytest.raises(ConfigError, match="device is 'nowhere'"):
        Tagger(small_network(), device="nowhere")
    network = small_network()
    Tagger(network, device="cpu")
    assert network.freq_pos_embed.device.type == "cpu"
    assert Tagger("esc10").name == "esc10"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling": "token"},
        {"pooling": "dm", "eval_avg": "max"},
        {"pooling": "logit", "activation": "softmax"},
        {"target_length": 120},
        {"init_bn": False},
    ],
)
def test_a_torch_network_has_the_outputs_of_its_graph(changes: dict[str, Any], tmp_path: Path) -> None:
    network = spread(CED(replace(small_network().config, **changes)))
    export(weights_of(network), tmp_path / "a.onnx")
    graph, scorer = OnnxModel(tmp_path / "a.onnx"), TorchScorer(network)
    for samples in (1_000, 2_400, 16_000, 17_760, 50_000):  # padded, one patch, one piece, and several
        waves = np.random.default_rng(samples).uniform(-0.5, 0.5, (2, samples)).astype(np.float32)
        for mine, other in ((scorer, graph), (scorer.embed, graph.embed), (scorer.columns, graph.columns)):
            expected = other(waves)
            assert expected.std() > 1e-3
            np.testing.assert_allclose(mine(waves), expected, atol=1e-5)
        count = scorer.columns(waves).shape[1]
        assert scorer.column_starts(count).tolist() == pytest.approx(graph.column_starts(count).tolist())


def test_a_missing_file_is_an_error_of_its_own() -> None:
    with pytest.raises(AudioError, match=r"no-such\.wav"):
        list(Tagger(Levels()).tag("no-such.wav"))


def test_tagging_needs_no_torch_of_its_own() -> None:
    program = (
        "import sys, numpy as np; from ced.tag.tagger import Tagger; from ced.sound.labels import ClassTable\n"
        "class Half:\n"
        "    labels = ClassTable(('a',))\n"
        "    def __call__(self, waves): return np.full((len(waves), 1), 0.5, np.float32)\n"
        "(tags,) = Tagger(Half()).tag((np.zeros(100, np.float32), 16000))\n"
        "assert tags.tags[0].prob == 0.5 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
