from pathlib import Path

import numpy as np
import pytest
import soundfile

from ced.demo.sounds import generate
from ced.errors import AudioError, CheckpointError
from ced.model.runtime import open_model
from ced.tag.hearing import DETAILS, Hearing, Limits
from ced.tag.tagger import Tagger

RATE = 16_000


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return Tagger(open_model("esc10"))


def beep(path: Path, seconds: int, begin: float, hertz: float = 1000.0) -> Path:
    """Write silence with a second of a tone in it."""
    time = np.arange(seconds * RATE) / RATE
    wave = 0.5 * np.sin(2 * np.pi * hertz * time) * ((time >= begin) & (time < begin + 1))
    soundfile.write(path, wave, RATE)
    return path


def test_the_picture_is_what_models_hear(tagger: Tagger, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from ced.sound.audio import load
    from ced.model.frontend import LogMel

    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE), RATE)
    clip = Hearing(tagger, "m").take_in(path, "a.wav", tmp_path)
    assert clip.seconds == 4.0
    expected = LogMel()(torch.from_numpy(load(path))[None])[0].numpy()
    assert clip.mel.shape == (64, 400)  # 10 ms each
    np.testing.assert_allclose(clip.mel, expected[:, :400], atol=1e-2)


@pytest.mark.parametrize(("hertz", "row"), [(300.0, 8), (1000.0, 22), (4000.0, 48)])
def test_a_tone_is_loud_in_its_row_and_at_its_time(tagger: Tagger, tmp_path: Path, hertz: float, row: int) -> None:
    """Rows have their centres at 2840.02 mel * (row + 1) / 65, where f Hz are 2595 log10(1 + f / 700) mel."""
    clip = Hearing(tagger, "m").take_in(beep(tmp_path / "a.wav", 4, 1.0, hertz), "a.wav", tmp_path)
    assert set(clip.mel[:, 110:190].argmax(axis=0)) == {row}
    np.testing.assert_allclose(np.flatnonzero(clip.mel[row] > -20)[[0, -1]], [100, 200], atol=2)


def test_long_sounds_keep_their_axis(tagger: Tagger, tmp_path: Path) -> None:
    clip = Hearing(tagger, "m").take_in(beep(tmp_path / "a.wav", 25, 12.0), "a.wav", tmp_path)
    assert clip.mel.shape == (64, 1250)  # 20 ms each: 2500 would be too many
    np.testing.assert_allclose(np.flatnonzero(clip.mel[22] > -20)[[0, -1]], [600, 650], atol=1)


def test_what_is_kept_is_what_was_handed_over(tagger: Tagger, tmp_path: Path) -> None:
    source = tmp_path / "a.flac"
    soundfile.write(source, generate("Bark", np.random.default_rng(0), 2.0), RATE)
    clip = Hearing(tagger, "m").take_in(source, "a.flac", tmp_path)
    np.testing.assert_array_equal(soundfile.read(clip.path)[0], soundfile.read(source)[0])


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(megabytes=0.1), "a.wav has more than 0.1 MB, which is all that is taken here"),
        (Limits(minutes=0.05), "a.wav is longer than 0.05 min, which is all that is taken here"),
    ],
)
def test_limits_are_said(tagger: Tagger, tmp_path: Path, limits: Limits, said: str) -> None:
    path = beep(tmp_path / "secret.wav", 4, 1.0)
    with pytest.raises(AudioError) as error:
        Hearing(tagger, "m", limits).take_in(path, "a.wav", tmp_path)
    assert str(error.value) == said
    path.write_bytes(b"RIFFjunk")
    with pytest.raises(AudioError, match=r"a\.wav") as error:
        Hearing(tagger, "m", limits).take_in(path, "a.wav", tmp_path)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("name", "pieces"), [("10 s", 1), ("5 s", 1), ("2 s", 4), ("1 s", 9), ("0.16 s", 31)])
def test_every_detail_scores_as_the_tagger_does(tagger: Tagger, tmp_path: Path, name: str, pieces: int) -> None:
    source = tmp_path / "a.wav"
    soundfile.write(source, generate("Bark", np.random.default_rng(0), 5.0), RATE)
    hearing, detail = Hearing(tagger, "m"), DETAILS[name]
    told: list[tuple[str, int, int]] = []
    timeline = hearing.score(
        hearing.take_in(source, "a.wav", tmp_path), detail, lambda task, done, total: told.append((task, done, total))
    )
    expected = list(tagger.score(source, window=detail.window, hop=detail.hop, columns=detail.columns))
    assert len(timeline.scored) == len(expected) == pieces
    assert [(one.start, one.end) for one in timeline.scored] == [(one.start, one.end) for one in expected]
    np.testing.assert_array_equal(
        np.stack([one.probs for one in timeline.scored]), np.stack([one.probs for one in expected])
    )
    assert told[-1] == ("tagging", 5, 5)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_model_without_columns_says_so(tmp_path: Path) -> None:
    boxed = open_model("esc10")

    class Coarse:
        labels = boxed.labels
        __call__ = staticmethod(boxed.__call__)

    hearing = Hearing(Tagger(Coarse()), "m")
    clip = hearing.take_in(beep(tmp_path / "a.wav", 1, 0.0), "a.wav", tmp_path)
    with pytest.raises(CheckpointError, match="has no columns"):
        hearing.score(clip, DETAILS["0.16 s"])
