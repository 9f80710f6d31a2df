"""The log-mel front end as a feature extractor of Transformers; `ced.model.hf` registers it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from ced.errors import AudioError, ConfigError
from ced.sound.audio import SAMPLE_RATE
from ced.sound.frontend import F_MAX, F_MIN, N_FFT, N_MELS, LogMel
from ced.sound.grid import HOP, PATCH

Wave = NDArray[np.floating[Any]] | Sequence[float]


class CedFeatureExtractor(SequenceFeatureExtractor):
    """Turns waves into log-mel features with the front end of this package; `preprocessor_config.json` describes it."""

    model_input_names = ["input_values"]  # noqa: RUF012 (a class variable of Transformers)

    def __init__(
        self,
        sampling_rate: int = SAMPLE_RATE,
        n_mels: int = N_MELS,
        n_fft: int = N_FFT,
        win_size: int = N_FFT,
        hop_size: int = HOP,
        f_min: float = F_MIN,
        f_max: float = F_MAX,
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
        # Padding is done on waves, with silence.
        super().__init__(**others | {"feature_size": n_mels, "sampling_rate": sampling_rate, "padding_value": 0.0})
        self.n_mels, self.n_fft, self.win_size, self.hop_size = n_mels, n_fft, win_size, hop_size
        self.f_min, self.f_max, self.center = f_min, f_max, center

    def __call__(
        self,
        raw_speech: Wave | Sequence[Wave],
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Return the features of one wave or several.

        Several of unequal length are padded with silence to the longest, which changes the scores of the shorter ones:
        a clip that is to be tagged as `ced tag` does it is given alone or among its equals.

        Args:
            raw_speech: (t,) mono float in [-1, 1], or a list of them, or (b, t).
            sampling_rate: of these waves; None takes it for granted that it is 16 kHz.
            return_tensors: "pt" for torch tensors; otherwise arrays.

        Returns:
            `input_values` (b, f, n) float32 dB.

        Raises:
            AudioError: another rate, stereo, empty waves, or integers.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise AudioError(f"the waves have {sampling_rate} Hz; resample them to {self.sampling_rate}")
        waves = _waves(raw_speech)
        length = max(*(len(wave) for wave in waves), (PATCH - 1) * self.hop_size)
        batch = np.zeros((len(waves), length), np.float32)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = wave
        mel = LogMel(self.n_mels, self.n_fft, self.win_size, self.hop_size, self.f_min, self.f_max, self.center)
        with torch.no_grad():
            features = mel(torch.from_numpy(batch)).numpy()
        return BatchFeature({"input_values": features}, tensor_type=return_tensors)


def _waves(raw_speech: Wave | Sequence[Wave]) -> list[NDArray[Any]]:
    """Return the waves of what may be one or several."""
    one = len(raw_speech) > 0 and np.ndim(raw_speech[0]) == 0
    waves = [np.asarray(wave) for wave in ([raw_speech] if one else raw_speech)]
    if not waves:
        raise AudioError("there is no wave to make features of")
    for wave in waves:
        if wave.ndim != 1 or not wave.size or not np.issubdtype(wave.dtype, np.floating):
            raise AudioError(f"a wave is {wave.dtype} {wave.shape}; it must be mono floats in [-1, 1], (samples,)")
    return waves
