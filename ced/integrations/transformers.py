"""CED as model classes of Hugging Face Transformers; importing this module registers them with the Auto classes.

Folders have the layout of `mispeech/ced-*`: `config.json`, `preprocessor_config.json` and `model.safetensors` with the
keys `encoder.*` and `outputlayer.*`. The network and its features are those of this package; code from the hub is never
executed.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ced.environment import SWITCHES
from ced.errors import AudioError, ConfigError, install_command, optional_packages
from ced.model import zoo
from ced.model.config import ModelConfig, checked_config
from ced.model.frontend import LogMel
from ced.model.vit import CED
from ced.sound.audio import SAMPLE_RATE
from ced.sound.decode import LOUDEST
from ced.sound.features import PUBLISHED, FrontEnd
from ced.sound.labels import ClassTable, default_classes, named, named_by_config

os.environ.update(SWITCHES)
with optional_packages("ced.integrations.transformers"):
    import transformers

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
    # Older audio pipelines apply a softmax to every output, so multi-label probabilities would be silently wrong.
    raise ConfigError(
        f"ced.integrations.transformers needs Transformers 5.23 or newer, {transformers.__version__} is installed:"
        f" {install_command('hf')}"
    )

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils import can_return_tuple

__all__ = ["CedConfig", "CedFeatureExtractor", "CedForAudioClassification", "CedModel"]

Wave = NDArray[np.floating[Any]] | Sequence[float]
Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
MULTI_LABEL: Problem = "multi_label_classification"
SINGLE_LABEL: Problem = "single_label_classification"
_DEFAULT = zoo.MODELS[zoo.DEFAULT_MODEL].config


class CedConfig(PreTrainedConfig):
    """Configuration of a network and its classes, with the setting names of the published `config.json`.

    `id2label` names the classes and determines `outputdim` and `label2id`; without it, the classes are AudioSet's 527.
    The published files cut AudioSet's names at the first comma; the full names are restored. The problem is multi-label
    (sigmoid) unless `problem_type` is "single_label_classification" (softmax).
    """

    model_type = "ced"
    attribute_map = {  # noqa: RUF012 (a class variable of Transformers)
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "depth",
    }

    embed_dim: int = _DEFAULT.embed_dim
    num_heads: int = _DEFAULT.num_heads
    depth: int = _DEFAULT.depth
    mlp_ratio: float = _DEFAULT.mlp_ratio
    target_length: int = _DEFAULT.target_length
    pooling: str = _DEFAULT.pooling
    eval_avg: str = _DEFAULT.eval_avg
    pad_last: bool = _DEFAULT.pad_last
    init_bn: bool = _DEFAULT.init_bn
    n_mels: int = _DEFAULT.n_mels
    n_fft: int = _DEFAULT.n_fft
    win_size: int = _DEFAULT.win_size
    hop_size: int = _DEFAULT.hop_size
    f_min: float | int = _DEFAULT.f_min
    f_max: float | int = _DEFAULT.f_max
    center: bool = _DEFAULT.center
    id2label: dict[int, str] | dict[str, str] | None = None
    label2id: dict[str, int] | dict[str, str] | None = None
    problem_type: Problem | None = MULTI_LABEL

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names code in the published folder, which is neither executed nor written again
        stored, requested = kwargs.pop("outputdim", None), kwargs.pop("num_labels", None)
        if self.id2label is None or requested not in (None, len(self.id2label)):
            self.id2label = dict(enumerate(default_classes(requested or stored or _DEFAULT.outputdim).names))
        elif (table := named_by_config({"id2label": self.id2label})) is not None:
            self.id2label = dict(enumerate(table.names))  # full names, which the published files cut
        self.label2id = self._label2id
        super().__post_init__(**kwargs)

    @classmethod
    def from_network(cls, network: CED) -> Self:
        """Return the configuration of a network of this package."""
        settings = asdict(network.config)
        del settings["outputdim"]
        softmax = settings.pop("activation") == "softmax"
        names = network.labels.names
        return cls(
            **settings,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            problem_type=SINGLE_LABEL if softmax else MULTI_LABEL,
        )

    @property
    def outputdim(self) -> int:
        """The number of classes."""
        return len(self.id2label or ())

    @property
    def labels(self) -> ClassTable:
        """The class table; for AudioSet's classes, with full names and identifiers.

        Raises:
            ConfigError: the indices of `id2label` are not 0, 1, 2, ...
            TableError: two classes have the same name.
        """
        found = {int(index): name for index, name in (self.id2label or {}).items()}
        if sorted(found) != list(range(len(found))):
            raise ConfigError(
                f"id2label has the keys {', '.join(map(str, sorted(found)))}; they must be 0 to {len(found) - 1}"
            )
        return named(found[index] for index in range(len(found)))

    @property
    def network(self) -> ModelConfig:
        """The configuration of the network.

        Raises:
            ConfigError: a value is out of range, or `problem_type` is not one of the two classification types.
        """
        if self.problem_type not in (MULTI_LABEL, SINGLE_LABEL):
            raise ConfigError(f"problem_type is {self.problem_type!r}; allowed: {MULTI_LABEL}, {SINGLE_LABEL}")
        settings = {
            field.name: getattr(self, field.name) for field in fields(ModelConfig) if field.name != "activation"
        }
        return checked_config(settings | {"activation": "sigmoid" if self.problem_type == MULTI_LABEL else "softmax"})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        found: dict[str, Any] = super().to_dict()
        return found | {"outputdim": self.outputdim, "label2id": self._label2id}

    @property
    def _label2id(self) -> dict[str, int]:
        return {name: int(index) for index, name in (self.id2label or {}).items()}


class CedPreTrainedModel(PreTrainedModel):
    """Base of both models: holds a network of this package as `.network`, and initialises its weights."""

    config_class = CedConfig
    base_model_prefix = "network"
    main_input_name = "input_values"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (a class variable of Transformers)

    config: CedConfig

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config)
        self.network = CED(config.network, config.labels)

    @classmethod
    def from_network(cls, network: CED) -> Self:
        """Return a model with a copy of the weights of a network: `from_network(ced.load_model("experiments/mine"))`.

        `ced.model.loading.save` writes `.network` back to a checkpoint of this package.
        """
        model = cls(CedConfig.from_network(network))
        wanted = model.network.state_dict().keys()
        model.network.load_state_dict({key: value for key, value in network.state_dict().items() if key in wanted})
        model.train(network.training)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module; Transformers makes `torch.nn.init` skip tensors loaded from a file."""
        if isinstance(module, LogMel):  # constants, which files do not contain
            for name, value in LogMel(self.config.network.front_end).named_buffers():
                initialization.copy_(getattr(module, name), value)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (CED, nn.Conv2d)):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class CedModel(CedPreTrainedModel):
    """The network without its output layer: log-mel features in, an embedding of each patch out."""

    _keys_to_ignore_on_load_unexpected = [r"outputlayer\."]  # noqa: RUF012 (a class variable of Transformers)

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config)
        del self.network.outputlayer
        self.post_init()

    @can_return_tuple
    def forward(self, input_values: Tensor) -> BaseModelOutputWithPooling:
        """Return an embedding of each patch.

        Args:
            input_values: (b, f, n) dB, from `CedFeatureExtractor`.

        Returns:
            `last_hidden_state` (b, patches, d), frequency slowest, and `pooler_output` (b, d), their mean.
        """
        tokens = self.network.patch_tokens(input_values).flatten(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1))


class CedForAudioClassification(CedPreTrainedModel):
    """A tagger: log-mel features in, a logit per class out."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.post_init()

    @can_return_tuple
    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Return logits and, with labels, the loss.

        Args:
            input_values: (b, f, n) dB, from `CedFeatureExtractor`.
            labels: for single-label problems (b,), the class index of each clip (cross-entropy); for multi-label
                problems (b, c), a number in [0, 1] for each class (binary cross-entropy).

        Returns:
            `loss`, with labels, and `logits` (b, c) before the sigmoid or softmax.

        Raises:
            ConfigError: the labels have another shape.
        """
        logits = self.network.logits_mel(input_values)
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        single = self.config.problem_type == SINGLE_LABEL
        expected = logits.shape[:1] if single else logits.shape
        if labels.shape != expected:
            raise ConfigError(
                f"labels of shape {tuple(labels.shape)}; for {self.config.problem_type} they must be {tuple(expected)}"
            )
        if single:
            return F.cross_entropy(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class CedFeatureExtractor(SequenceFeatureExtractor):
    """Computes log-mel features with the front end of this package, configured by `preprocessor_config.json`."""

    model_input_names = ["input_values"]  # noqa: RUF012 (a class variable of Transformers)

    def __init__(
        self,
        sampling_rate: int = SAMPLE_RATE,
        n_mels: int = PUBLISHED.n_mels,
        n_fft: int = PUBLISHED.n_fft,
        win_size: int = PUBLISHED.win_size,
        hop_size: int = PUBLISHED.hop_size,
        f_min: float = PUBLISHED.f_min,
        f_max: float = PUBLISHED.f_max,
        center: bool = PUBLISHED.center,
        **others: Any,
    ) -> None:
        """Configure the features.

        Raises:
            ConfigError: the sampling rate is not 16 kHz.
        """
        if sampling_rate != SAMPLE_RATE:
            raise ConfigError(f"sampling_rate is {sampling_rate}; it must be {SAMPLE_RATE}")
        others.pop("auto_map", None)  # names code in the published folder, which is neither executed nor written again
        # Waves are padded with silence before their features are computed, so there is no attention mask.
        fixed = {"feature_size": n_mels, "sampling_rate": sampling_rate, "padding_value": 0.0}
        super().__init__(**others | fixed | {"return_attention_mask": False})
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
        For the scores of `ced tag`, pass a clip alone or with clips of equal length.

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
            ConfigError: `padding` is unknown, or `max_length` is missing.
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
        batch = np.zeros((len(waves), max(*lengths, to)), np.float32)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = wave
        front_end = _front_end(FrontEnd(**{field.name: getattr(self, field.name) for field in fields(FrontEnd)}))
        with torch.no_grad():
            features = front_end(torch.from_numpy(batch)).numpy()
        return BatchFeature({"input_values": features}, tensor_type=return_tensors)

    def pad(self, processed_features: Any, *others: Any, **settings: Any) -> BatchFeature:
        """Collate features of single waves, which must have equal lengths.

        Raises:
            AudioError: the lengths differ. Features cannot be padded: the level of silence in dB depends on the clip.
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
        if not np.abs(wave).max() <= LOUDEST:  # also false for NaN
            raise AudioError(f"a wave has samples up to {np.abs(wave).max():g}; they must lie in [-1, 1]")
    return waves


# From the keys in the file to those of the network, in this order; saving applies them in reverse.
register_checkpoint_conversion_mapping(
    CedConfig.model_type,
    [
        WeightRenaming(r"^encoder\.", "^network."),
        WeightRenaming(r"^outputlayer\.", "^network.outputlayer."),
        WeightRenaming(r"^network\.init_bn\.", "^network.init_bn.1."),
    ],
    overwrite=True,
)
AutoConfig.register(CedConfig.model_type, CedConfig, exist_ok=True)
AutoFeatureExtractor.register(CedConfig, CedFeatureExtractor, exist_ok=True)
AutoModel.register(CedConfig, CedModel, exist_ok=True)
AutoModelForAudioClassification.register(CedConfig, CedForAudioClassification, exist_ok=True)
