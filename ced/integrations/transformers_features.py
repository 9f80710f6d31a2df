"""The log-mel front end as a feature extractor of Transformers; `ced.integrations.transformers` registers it."""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.model.frontend import LogMel
from ced.sound.audio import SAMPLE_RATE
from ced.sound.decode import LOUDEST
from ced.sound.features import HOP, PATCH, FrontEnd
from ced.telemetry import SWITCHES

os.environ.update(SWITCHES)

from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

Wave = NDArray[np.floating[Any]] | Sequence[float]


class CedFeatureExtractor(SequenceFeatureExtractor):
    """Computes log-mel features with the front end of this package, as `preprocessor_config.json` configures it."""

    model_input_names = ["input_values"]  # noqa: RUF012 (a class variable of Transformers)

    def __init__(
        self,
        sampling_rate: int = SAMPLE_RATE,
        n_mels: int = FrontEnd.n_mels,
        n_fft: int = FrontEnd.n_fft,
        win_size: int = FrontEnd.win_size,
        hop_size: int = HOP,
        f_min: float = FrontEnd.f_min,
        f_max: float = FrontEnd.f_max,
        center: bool = True,
        **others: Any,
    ) -> None:
        """Configure the features.

        Raises:
            ConfigError: the sampling rate is not 16 kHz.
        """
        if sampling_rate != SAMPLE_RATE:
            raise ConfigError(f"sampling_rate is {sampling_rate}; the front end is made for {SAMPLE_RATE}")
        others.pop("auto_map", None)  # names code of the published folder, which is not run and not written again
        # Waves are padded with silence before their features are computed, so there is no attention mask.
        settled = {"feature_size": n_mels, "sampling_rate": sampling_rate, "padding_value": 0.0}
        super().__init__(**others | settled | {"return_attention_mask": False})
        self.n_mels, self.n_fft, self.win_size, self.hop_size = n_mels, n_fft, win_size, hop_size
        self.f_min, self.f_max, self.center = f_min, f_max, center

    def __call__(
        self,
        raw_speech: Wave | Sequence[Wave],
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        *,
        padding: bool | Literal["longest", "max_length"] = True,
        max_length: int | None = None,
        truncation: bool = False,
    ) -> BatchFeature:
        """Return the features of one wave or of several.

        Waves of unequal length are padded with silence to the longest, which changes the scores of the shorter ones.
        For the scores of `ced tag`, pass a clip alone or with clips of the same length.

        Args:
            raw_speech: (t,) mono float in [-1, 1], or a list of such waves, or (b, t).
            sampling_rate: the rate of the waves in Hz; None assumes 16 kHz.
            return_tensors: "pt" for torch tensors; otherwise arrays.
            padding: pad to the longest wave, or to `max_length`; False refuses waves of unequal length.
            max_length: length in samples for `padding="max_length"` and `truncation`.
            truncation: cut waves to `max_length`.

        Returns:
            `input_values` (b, f, n) float32 dB.

        Raises:
            AudioError: another rate, stereo, an empty wave, integer samples, samples far outside [-1, 1] or not finite,
                or unequal lengths with `padding=False`.
            ConfigError: an unknown `padding`, or `max_length` is missing where it is needed.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise AudioError(f"the waves have {sampling_rate} Hz; resample them to {self.sampling_rate}")
        if padding not in (True, False, "longest", "max_length"):
            raise ConfigError(f"padding is {padding!r}; allowed: True, False, 'longest', 'max_length'")
        if max_length is None and (truncation or padding == "max_length"):
            raise ConfigError("truncation and padding to max_length need a max_length, in samples")
        waves = [wave[:max_length] if truncation else wave for wave in _waves(raw_speech)]
        lengths = {len(wave) for wave in waves}
        if padding is False and len(lengths) > 1:
            raise AudioError(f"the waves have {min(lengths)} to {max(lengths)} samples, and padding is False")
        to = max_length if padding == "max_length" and max_length is not None else 0
        batch = np.zeros((len(waves), max(*lengths, to, (PATCH - 1) * self.hop_size)), np.float32)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = wave
        mel = _front_end(
            FrontEnd(self.n_mels, self.n_fft, self.win_size, self.hop_size, self.f_min, self.f_max, self.center)
        )
        with torch.no_grad():
            features = mel(torch.from_numpy(batch)).numpy()
        return BatchFeature({"input_values": features}, tensor_type=return_tensors)

    def pad(self, processed_features: Any, *others: Any, **settings: Any) -> BatchFeature:
        """Collate features that were computed one by one, which must be of equal length.

        Raises:
            AudioError: their lengths differ. Features cannot be padded: silence has another level in dB for each clip.
        """
        if isinstance(processed_features, Sequence):
            shapes = sorted({np.shape(each["input_values"]) for each in processed_features})
            if len(shapes) > 1:
                raise AudioError(
                    f"features of {shapes[0]} to {shapes[-1]} cannot be collated; compute them from waves of one length"
                    " (max_length=..., padding='max_length', truncation=True)"
                )
        found: BatchFeature = super().pad(processed_features, *others, **settings)
        return found


@cache
def _front_end(settings: FrontEnd) -> LogMel:
    return LogMel(settings)


def _waves(raw_speech: Wave | Sequence[Wave]) -> list[NDArray[Any]]:
    """Return a list of waves, given one wave or several."""
    one = len(raw_speech) > 0 and np.ndim(raw_speech[0]) == 0
    waves = [np.asarray(wave) for wave in ([raw_speech] if one else raw_speech)]
    if not waves:
        raise AudioError("no waves were given")
    for wave in waves:
        if wave.ndim != 1 or not wave.size or not np.issubdtype(wave.dtype, np.floating):
            raise AudioError(f"a wave is {wave.dtype} {wave.shape}; it must be mono floats in [-1, 1], (samples,)")
        if not np.abs(wave).max() <= LOUDEST:  # false for NaN, too
            raise AudioError(f"a wave has samples up to {np.abs(wave).max():g}; they must lie in [-1, 1]")
    return waves
