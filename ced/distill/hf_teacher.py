"""Teachers that are models for audio classification of Hugging Face Transformers, with their feature extractors."""

import json
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ced.config import Activation, check
from ced.distill.spectrogram import FeatureSettings, Spectrogram, resample
from ced.distill.views import SoundView, mask_waves
from ced.environment import SWITCHES
from ced.errors import CheckpointError, ConfigError, DownloadError, optional_packages
from ced.model import download
from ced.model.config import read_config
from ced.progress import Progress, silent
from ced.sound.labels import ClassTable, mostly_audioset, named_by_config

os.environ.update(SWITCHES)

logger = logging.getLogger(__name__)

AST, WHISPER = "ASTFeatureExtractor", "WhisperFeatureExtractor"
# Entries of config.json: where a model was loaded from, and by which program and in which precision it was saved.
_ORIGIN = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_FILES = ("preprocessor_config.json", "model.safetensors", "config.json")


class HfTeacher:
    """A model with its feature extractor as a teacher that takes waves.

    Views are masked in the features of AST and Whisper, and in the waves of all others. Logits become probabilities by
    `activation`. Without it, they do by a softmax where the configuration's `problem_type` is
    single_label_classification and by a sigmoid where it is multi_label_classification; without that, by a sigmoid if
    the model has more than half of AudioSet's classes, and otherwise by a softmax.

    Raises:
        CheckpointError: it is not a model for audio classification, lacks weights, or needs code of its repository,
            which is never run.
        ConfigError: it is a CED network, which is given by name or path, or was trained for regression.
        DownloadError: a file is not cached and could not be downloaded.
        MissingPackageError: Transformers is not installed.
    """

    takes = "waves"

    def __init__(
        self,
        source: str,
        device: torch.device,
        progress: Progress = silent,
        activation: Activation | None = None,
    ) -> None:
        """Load a model.

        Args:
            source: a folder, or REPO or REPO@REVISION on the hub.
            device: where it computes.
            progress: called during a download, with bytes.
            activation: the function that turns logits into probabilities; None: as its configuration implies.
        """
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _downloaded(source, progress)
        kind = (read_config(folder / "config.json") or {}).get("model_type")
        if kind == "ced":
            raise ConfigError(f"hf:{source} is a CED network; name it without hf:")
        self.model, self.extractor = _load(source, folder)
        self.model.to(device).eval()
        self.device = device
        config = self.model.config
        if config.problem_type == "regression":
            raise ConfigError(f"hf:{source} was trained for regression (problem_type); it gives no probabilities")
        self.labels = _classes(source, config.id2label)
        self.activation = activation or _activation(config.problem_type, self.labels)
        self._is_ast = type(self.extractor).__name__ == AST
        self._spectrogram = layout_of(self.extractor)
        logger.info(
            "hf:%s: views are masked in its %s (%s); probabilities by %s (problem_type: %s)",
            *(source, self.masks, type(self.extractor).__name__, self.activation, config.problem_type),
        )

    @property
    def masks(self) -> str:
        """Where the bands of a view are masked."""
        return "waves" if self._spectrogram is None else "features"

    @property
    def settings(self) -> str:
        """The settings of model and feature extractor and the activation, which a digest of the weights lacks."""
        config = _without_origin(json.loads(self.model.config.to_json_string()))
        return f"{self.extractor.to_json_string()} {self.activation} {json.dumps(config, sort_keys=True)}"

    def __call__(self, waves: Tensor, rate: int, views: Sequence[SoundView]) -> Tensor:
        """Return the probability of each class, (b, t) -> (b, c), under views.

        Raises:
            ConfigError: the waves are longer than the features that the network takes.
        """
        target, spectrogram = self.extractor.sampling_rate, self._spectrogram
        if spectrogram is None:
            inputs = self._extracted(resample(mask_waves(waves, views, rate), rate, target))
        else:
            waves = resample(waves, rate, target)
            spectrogram.check(waves.shape[1])
            # AST's extractor takes 25 ms of a core a clip; the same features are computed here on the device.
            name = self.model.main_input_name
            inputs = {name: spectrogram(waves)} if self._is_ast else self._extracted(waves)
            inputs[name] = spectrogram.mask(inputs[name], views, waves.shape[1])
            if self._is_ast:
                inputs[name] = inputs[name].mT  # AST takes (b, n, f)
        logits: Tensor = self.model(**inputs).logits.float()
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(-1)

    def _extracted(self, waves: Tensor) -> dict[str, Tensor]:
        """Return the feature extractor's output for waves, on the device of the network."""
        clips = list(waves.cpu().numpy())
        found = self.extractor(clips, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        return {name: value.to(self.device) for name, value in found.items()}


def layout_of(extractor: Any) -> Spectrogram | None:
    """Return the layout of the spectrograms of extractors that are known; None for waves and all others."""
    rate, kind = extractor.sampling_rate, type(extractor).__name__
    if kind == AST:  # Kaldi's features
        window, hop = rate // 40, rate // 100  # 25 and 10 ms
        settings: dict[str, Any] = {
            "framing": "kaldi",
            "pre_emphasis": 0.97,
            "window": window,
            "window_form": "hann_symmetric",
            "fft": 1 << (window - 1).bit_length(),
            "hop": hop,
            "mel": {"bands": extractor.num_mel_bins, "low": 20, "high": rate / 2, "scale": "kaldi"},
            "log": {"floor": float(np.finfo(np.float32).eps)},
            "frames": extractor.max_length,
        }
        if extractor.do_normalize:
            settings |= {"mean": extractor.mean, "std": 2 * extractor.std}
        # The logarithm 0, with which the extractor pads short inputs, and AST's masks in training were filled.
        settings["fill"] = -settings.get("mean", 0.0) / settings.get("std", 1.0)
    elif kind == WHISPER:  # only the layout: its own SpecAugment fills with 0
        settings = {
            "window": extractor.n_fft,
            "fft": extractor.n_fft,
            "hop": extractor.hop_length,
            "mel": {"bands": extractor.feature_size, "high": 8000, "scale": "slaney", "area_norm": True},
            "log": {"form": "log10", "floor": 1e-10},
            "frames": extractor.nb_max_frames + 1,  # the extractor leaves out the last one
            "fill": 0.0,
        }
    else:
        return None
    return Spectrogram(check(FeatureSettings, settings, kind), rate)


def _classes(source: str, id2label: Mapping[int, str]) -> ClassTable | None:
    """Return the class table of a configuration; None, with a warning, if it is unusable, and if it has no names."""
    if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in id2label.values()):
        return None
    labels = named_by_config({"id2label": id2label})
    if labels is None:
        logger.warning(
            "hf:%s: the class names (id2label) of its config.json do not count from 0, or one of them occurs twice; "
            "they are not used, and its classes are taken to be those of the store, in the same order",
            source,
        )
    return labels


def _without_origin(config: Any) -> Any:
    """Return a configuration without the entries that depend on the place and the program that it was loaded by."""
    if isinstance(config, dict):
        return {key: _without_origin(value) for key, value in config.items() if key not in _ORIGIN}
    return [_without_origin(value) for value in config] if isinstance(config, list) else config


def _activation(problem: str | None, labels: ClassTable | None) -> Activation:
    if problem is not None:
        return "softmax" if problem == "single_label_classification" else "sigmoid"
    return "sigmoid" if labels is not None and mostly_audioset(labels) else "softmax"


def _downloaded(source: str, progress: Progress) -> Path:
    """Return the folder of a repository's files in the hub's cache."""
    repo, _, revision = source.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ConfigError(f"hf:{source} is neither a folder nor a repository, as OWNER/NAME or OWNER/NAME@REVISION")
    try:
        return [download.hub_file(repo, file, revision or "main", progress) for file in _FILES][-1].parent
    except DownloadError as error:
        error.hint = error.hint or "hf:FOLDER takes a model that was saved in a folder"
        raise


def _load(source: str, folder: Path) -> tuple[Any, Any]:
    """Return model and feature extractor of a folder."""
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise CheckpointError(f"teacher hf:{source} has no {file}")
    with optional_packages(f"teacher hf:{source}"):
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
        from transformers.utils import logging as transformers_logging
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        local = {"local_files_only": True, "trust_remote_code": False}
        with warnings.catch_warnings():  # that the lowest mel filters of AST are empty, as they were in its training
            warnings.filterwarnings("ignore", "At least one mel filter", UserWarning)
            extractor = AutoFeatureExtractor.from_pretrained(folder, **local)
        model, found = AutoModelForAudioClassification.from_pretrained(
            folder, **local, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files, unknown kinds of models, and code of the repository fail in many ways
        if "trust_remote_code" in str(error):
            raise CheckpointError(f"teacher hf:{source} needs code of its repository, which is never run") from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot load teacher hf:{source}: {type(error).__name__}: {reason}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]) or sorted(map(str, found["mismatched_keys"])):
        raise CheckpointError(
            f"teacher hf:{source} is not a trained tagger: {len(missing)} weights are missing, {missing[0]} first"
        )
    if not hasattr(extractor, "sampling_rate"):
        raise CheckpointError(f"teacher hf:{source} has a {type(extractor).__name__}, which takes no audio")
    return model, extractor
