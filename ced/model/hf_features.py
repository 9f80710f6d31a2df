"""The log-mel front end as a feature extractor of Transformers; `ced.model.hf` registers it."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from ced.errors import AudioError, ConfigError
from ced.model.frontend import LogMel
from ced.sound.audio import SAMPLE_RATE
from ced.sound.decode import LOUDEST
from ced.sound.features import HOP, PATCH, FrontEnd

Wave = NDArray[np.floating[Any]] | Sequence[float]


class CedFeatureExtractor(SequenceFeatureExtractor):
    """Turns waves into log-mel features with the front end of this package; `preprocessor_config.json` describes it."""

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
        """Describe the features.

        Raises:
            ConfigError: another rate than 16 kHz.
        """
        if sampling_rate != SAMPLE_RATE:
            raise ConfigError(f"sampling_rate is {sampling_rate}; the front end is made for {SAMPLE_RATE}")
        others.pop("auto_map", None)  # names code of the published folder, which is not run and not written again
        # Padding is done on waves, with silence, and no network looks at a mask.
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
        """Return the features of one wave or several.

        Several of unequal length are padded with silence to the longest, which changes the scores of the shorter ones:
        a clip that is to be tagged as `ced tag` does it is given alone or among its equals.

        Args:
            raw_speech: (t,) mono float in [-1, 1], or a list of them, or (b, t).
            sampling_rate: of these waves; None takes it for granted that it is 16 kHz.
            return_tensors: "pt" for torch tensors; otherwise arrays.
            padding: to the longest, or to `max_length`; False refuses waves of unequal length.
            max_length: samples, what "max_length" and `truncation` go by.
            truncation: cut what is longer than `max_length` off.

        Returns:
            `input_values` (b, f, n) float32 dB.

        Raises:
            AudioError: another rate, stereo, empty waves, integers, samples that are no sound, or unequal lengths that
                are not to be padded.
            ConfigError: there is no such padding, or no `max_length` that it or `truncation` asks for.
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
        """Put features together that were made one by one, as collators of Transformers ask; all must be equally long.

        Raises:
            AudioError: they are not: silence is to be put behind waves, and no decibels are silence for all of them.
        """
        if isinstance(processed_features, Sequence):
            shapes = sorted({np.shape(each["input_values"]) for each in processed_features})
            if len(shapes) > 1:
                raise AudioError(
                    f"features of {shapes[0]} to {shapes[-1]} cannot be put together; make them of waves of one length"
                    " (max_length=..., padding='max_length', truncation=True)"
                )
        found: BatchFeature = super().pad(processed_features, *others, **settings)
        return found


@cache
def _front_end(settings: FrontEnd) -> LogMel:
    return LogMel(settings)


def _waves(raw_speech: Wave | Sequence[Wave]) -> list[NDArray[Any]]:
    """Return the waves of what may be one or several."""
    one = len(raw_speech) > 0 and np.ndim(raw_speech[0]) == 0
    waves = [np.asarray(wave) for wave in ([raw_speech] if one else raw_speech)]
    if not waves:
        raise AudioError("there is no wave to make features of")
    for wave in waves:
        if wave.ndim != 1 or not wave.size or not np.issubdtype(wave.dtype, np.floating):
            raise AudioError(f"a wave is {wave.dtype} {wave.shape}; it must be mono floats in [-1, 1], (samples,)")
        if not np.abs(wave).max() <= LOUDEST:  # nor a number
            raise AudioError(f"a wave has samples up to {np.abs(wave).max():g}; they must lie in [-1, 1]")
    return waves
