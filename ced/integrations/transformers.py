"""CED as model classes of Hugging Face Transformers; importing this module registers them with the Auto classes.

Folders have the layout of `mispeech/ced-*`: `config.json`, `preprocessor_config.json` and `model.safetensors` with the
keys `encoder.*` and `outputlayer.*`. The network and its features are those of this package, and code from the hub is
never run.
"""

import os
from dataclasses import asdict, fields
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ced.errors import ConfigError, install_command, optional_packages
from ced.model import zoo
from ced.model.config import ModelConfig, checked_config
from ced.model.embedding import grid
from ced.model.frontend import LogMel
from ced.model.vit import CED
from ced.sound.labels import ClassTable, default_classes, named, named_by_config
from ced.telemetry import SWITCHES

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
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from ced.integrations.transformers_features import CedFeatureExtractor

__all__ = ["CedConfig", "CedFeatureExtractor", "CedForAudioClassification", "CedModel"]

Problem = Literal["regression", "single_label_classification", "multi_label_classification"]
MULTI_LABEL: Problem = "multi_label_classification"
SINGLE_LABEL: Problem = "single_label_classification"
_DEFAULT = zoo.MODELS[zoo.DEFAULT_MODEL].config


class CedConfig(PreTrainedConfig):
    """Configuration of a network and its classes, with the setting names of the published `config.json`.

    `id2label` names the classes, and `outputdim` and `label2id` follow from it; without it, 527 classes are AudioSet's.
    The published files cut AudioSet's names at the first comma; they are restored to the full names. The problem is
    multi-label (sigmoid) unless `problem_type` is "single_label_classification" (softmax).
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
        kwargs.pop("auto_map", None)  # names code of the published folder, which is not run and not written again
        written, asked = kwargs.pop("outputdim", None), kwargs.pop("num_labels", None)
        if self.id2label is None or asked not in (None, len(self.id2label)):
            self.id2label = dict(enumerate(default_classes(asked or written or _DEFAULT.outputdim).names))
        elif (table := named_by_config({"id2label": self.id2label})) is not None:
            self.id2label = dict(enumerate(table.names))  # full names, where the published files cut them
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
        """The class table; AudioSet's with its full names and identifiers.

        Raises:
            ConfigError: the indices of `id2label` do not count from 0.
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
            ConfigError: a value is out of its range, or `problem_type` is not one of the two classification types.
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
    """Base of both models: a network of this package as `.network`, and the initialisation of its weights."""

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

        The way back is `.network`, which `ced.model.loading.save` writes.
        """
        model = cls(CedConfig.from_network(network))
        wanted = model.network.state_dict().keys()
        model.network.load_state_dict({key: value for key, value in network.state_dict().items() if key in wanted})
        model.train(network.training)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module; Transformers makes `torch.nn.init` skip tensors that were loaded from a file."""
        if isinstance(module, LogMel):  # constants, which are not in the file
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
        tokens = grid(self.network, input_values).flatten(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1))


class CedForAudioClassification(CedPreTrainedModel):
    """A tagger: log-mel features in, a logit for each class out."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.post_init()

    @can_return_tuple
    def forward(self, input_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Return logits, and with labels the loss.

        Args:
            input_values: (b, f, n) dB, from `CedFeatureExtractor`.
            labels: for single-label problems (b,), the index of the class of each clip (cross-entropy); for multi-label
                problems (b, c), a number in [0, 1] for each class (binary cross-entropy).

        Returns:
            `loss` where labels are given, and `logits` (b, c) before the sigmoid or softmax.

        Raises:
            ConfigError: the labels do not have that shape.
        """
        logits = self.network.logits_mel(input_values)
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        single = self.config.problem_type == SINGLE_LABEL
        expected = logits.shape[:1] if single else logits.shape
        if labels.shape != expected:
            raise ConfigError(
                f"labels of a {self.config.problem_type} are {tuple(expected)}; these are {tuple(labels.shape)}"
            )
        if single:
            return F.cross_entropy(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


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
