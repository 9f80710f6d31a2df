"""Configurations: a YAML file and `--key value` overrides are validated together, with one class for each command.

The keys are those of the published configurations. All errors of a file are reported at once.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ced.errors import ConfigError

_LONGEST_FILE = 1 << 20  # characters; a configuration has about a thousand
_MOST_VALUES = 10_000  # in a file, counted with the repetitions by aliases
_DEEPEST = 20  # levels of nested lists and mappings
_SHOWN = 100  # characters of a value in an error

Mode = Annotated[
    Literal["amp", "amp_bf16", "off"],
    BeforeValidator(lambda value: "off" if value in (None, False) else value),  # YAML reads a bare `off` as false
]
Fill = Annotated[
    Literal["zero", "last_mean", "last_half", "last_random", "527"],
    BeforeValidator(lambda value: str(value) if value == 527 else value),
]
Optimizer = Literal["Adam8bit", "Adam", "AdamW"]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


def _file_name(text: str) -> str:
    if Path(text).name != text:
        raise ValueError(f"should be a file name without a folder, got {text!r}")
    return text


FileName = Annotated[str, AfterValidator(_file_name)]
Positive = Annotated[int, Field(ge=1, le=10_000_000)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A configuration or a part of one: its fields are the keys that it accepts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[Mapping[str, str]] = {}  # keys of other commands, and why this one has none

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is expected: pydantic would take them as 1 and 0."""
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        parts = value if isinstance(value, list) else [value]
        if kinds & {int, float} and bool not in kinds and any(isinstance(part, bool) for part in parts):
            raise ValueError("should be a number")
        return value


def section_in(annotation: Any) -> type[Section] | None:
    """Return the class of the mapping, or of each mapping of a list, that a key takes; None for other values."""
    return next((kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, Section)), None)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and, recursively, its type arguments."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


class ShiftArgs(Section):
    """Roll the chunk by a random part of its length, with probability 1/2."""

    min_shift: float = Field(-0.5, ge=-1, le=1, description="smallest shift, as a part of the chunk")
    max_shift: float = Field(0.5, ge=-1, le=1, description="largest shift, as a part of the chunk")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min_shift > self.max_shift:
            raise ValueError(f"min_shift {self.min_shift} is above max_shift {self.max_shift}")
        return self


class TimeMaskingArgs(Section):
    """Mask a random band of frames."""

    time_mask_param: Positive | None = Field(
        None, description="frames masked at most; null: 192 for 10 s, in proportion for shorter chunks"
    )


class FrequencyMaskingArgs(Section):
    """Mask a random band of mel bins."""

    freq_mask_param: Positive = Field(24, description="mel bins masked at most")


def _merge(value: Any) -> Any:
    """Accept transforms as a mapping, as the published list of one-key mappings, or null for none."""
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return {key: arguments for item in value for key, arguments in item.items()}
    return {} if value is None else value


class WavTransforms(Section):
    """Transforms of the wave; one that is left out is not applied."""

    Shift: ShiftArgs | None = Field(None, description="roll the chunk, with probability 1/2")


class SpecTransforms(Section):
    """Transforms of the mel; one that is left out is not applied."""

    TimeMasking: TimeMaskingArgs | None = Field(None, description="mask a band of frames")
    FrequencyMasking: FrequencyMaskingArgs | None = Field(None, description="mask a band of mel bins")


Wav = Annotated[WavTransforms, BeforeValidator(_merge)]
Spec = Annotated[SpecTransforms, BeforeValidator(_merge)]
ALL_WAV = WavTransforms(Shift=ShiftArgs())
ALL_SPEC = SpecTransforms(TimeMasking=TimeMaskingArgs(), FrequencyMasking=FrequencyMaskingArgs())


class OptimizerArgs(Section):
    """Arguments of the optimiser."""

    lr: float = Field(1e-3, gt=0, description="highest learning rate, after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the running means of gradient and square")
    eps: float = Field(1e-8, gt=0, description="added to the denominator of the update")


class LossArgs(Section):
    """Arguments of the loss; both reductions give the same gradient here, the mean over items and classes."""

    reduction: Literal["none", "mean"] = Field("mean", description="none or mean: the gradient is the same")


_TEACHER_KINDS = {"hf:": "hf:OWNER/NAME or hf:FOLDER", "onnx:": "onnx:FILE"}
Activation = Literal["sigmoid", "softmax"]


class TeacherEntry(Section):
    """One teacher of a store; a text alone is its name."""

    name: str = Field(
        min_length=1, description="a model name, a checkpoint, hf:REPO, hf:FOLDER, onnx:FILE or module:callable"
    )
    weight: float = Field(1.0, gt=0, le=1e6, description="weight in the mean of the teachers")
    batch_size: Positive | None = Field(None, description="chunks of a forward pass; null: that of the store")
    device: str | None = Field(None, description="where it computes, as torch names it; null: that of the process")
    mode: Mode | None = Field(None, description="precision; null: that of the store")
    activation: Activation | None = Field(
        None, description="of hf: alone: sigmoid or softmax of its logits; null: as its config.json implies"
    )

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        if name in _TEACHER_KINDS:
            raise ValueError(f"should be {_TEACHER_KINDS[name]}")
        return name


def _teacher_entries(value: Any) -> Any:
    """Accept one teacher for a list of them, and a text for a teacher that is only named."""
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        # YAML reads `hf:`, and `hf: NAME` with a space, as a mapping.
        if isinstance(entry, dict) and len(entry) == 1 and (kind := f"{next(iter(entry))}:") in _TEACHER_KINDS:
            raise ValueError(f"should be {_TEACHER_KINDS[kind]}, without a space")
    return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]


class StoreConfig(Section):
    """Keys of `ced store`."""

    train_data: UserPath = Field(description="table of the audio pack (labels/<stem>.tsv)")
    outputpath: UserPath = Field(Path("logits"), description="folder for view stores")
    model: Annotated[list[TeacherEntry], BeforeValidator(_teacher_entries)] = Field(
        description="a teacher or a list of teachers, each as its name alone or as a mapping with the keys below"
    )
    classes: UserPath | None = Field(
        None, description="class table (index, name) of the store, or audioset; null: that of the teachers"
    )
    model_args: dict[str, Any] = Field({}, description="pooling, target_length of the teachers")
    epochs: Positive = Field(40, description="views stored of each chunk")
    topk: Positive = Field(20, description="highest scores stored of each view")
    chunk_length: float = Field(
        10, gt=0, le=3600, description="seconds of a chunk; a last one shorter than half of it is dropped"
    )
    batch_size: Positive = Field(128, description="chunks of a forward pass")
    num_workers: Workers = Field(4, description="threads that read audio")
    mode: Mode = Field("amp", description="precision on a GPU: amp (fp16), amp_bf16 or off (fp32)")
    wavtransforms: Wav = Field(ALL_WAV, description="transforms of the wave; one that is left out is not applied")
    spectransforms: Spec = Field(ALL_SPEC, description="transforms of the mel; one that is left out is not applied")
    seed: Seed = Field(42, description="seed from which the seeds of the views are drawn")


class TrainerConfig(Section):
    """Keys that all training commands share."""

    command: str = Field(description="that trains with this configuration, and resumes its experiments")
    train_data: UserPath = Field(description="table of the audio pack to train on")
    outputpath: UserPath = Field(Path("experiments"), description="folder for experiments")
    model: str = Field(description="the network: a model name or a checkpoint")
    model_args: dict[str, Any] = Field(
        {}, description="changes to the network's configuration: target_length, depth, ..."
    )
    pretrained: bool | str = Field(
        True, description="first weights: true (those of the model), false (random), or a name or file"
    )
    batch_size: Positive = Field(32, description="items of a step, all processes together")
    epochs: Positive = Field(300, description="epochs to train")
    epoch_length: Positive | None = Field(None, description="steps of an epoch; null: all of the data once")
    optimizer: Optimizer = Field("Adam8bit", description="Adam8bit is replaced by Adam without CUDA and bitsandbytes")
    optimizer_args: OptimizerArgs = Field(OptimizerArgs(), description="arguments of the optimiser")
    warmup_iters: int | None = Field(None, ge=0, le=10**12, description="steps of linear warm-up")
    warmup_epochs: float | None = Field(None, ge=0, description="the same in epochs; give one of the two")
    use_scheduler: bool = Field(True, description="cosine decay after the warm-up; false: constant")
    decay_frac: float = Field(0.1, ge=0, le=1, description="last learning rate as a part of the first")
    mode: Mode = Field("amp", description="precision: amp (fp16, GPU only), amp_bf16 or off (fp32)")
    num_workers: Workers = Field(4, description="threads that read audio")
    compile: bool = Field(False, description="compile the network with torch.compile")
    seed: Seed = Field(42, description="seed of all random numbers")
    logfile: FileName = Field("train.log", description="name of the log in the experiment folder")

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_iters is not None and self.warmup_epochs is not None:
            raise ValueError("warmup_iters and warmup_epochs are both given; give one")
        return self


class TaggerConfig(TrainerConfig):
    """Keys of the commands that train a tagger, which can be validated on a labelled table."""

    eval_data: UserPath | None = Field(None, description="labelled table to validate on; null: none")
    eval_batch_size: Positive = Field(32, description="clips of a batch in validation")
    valid_every: Positive = Field(1, description="epochs from one validation to the next")
    early_stop: Positive | None = Field(
        10, description="stop after this number of validations without gain; null: never"
    )
    n_saved: Positive = Field(4, description="best checkpoints kept")
    average: bool = Field(True, description="the result is the mean of the kept checkpoints; false: the best of them")
    mixup: Annotated[float, Field(gt=0)] | None = Field(None, description="alpha of Beta(alpha, alpha); null: none")


class TrainConfig(TaggerConfig):
    """Keys of `ced train`: distil a student from a view store."""

    command: Literal["train"] = Field("train", description="always train")
    logitspath: UserPath = Field(description="the view store: folder with logits_ep<e>_<rank>.h5")
    num_classes: Positive = Field(527, description="classes of the store and of the student")
    label_type: Fill = Field("zero", description="targets of the classes outside the top k")
    max_aug_epochs: Positive | None = Field(None, description="use only this number of stored epochs; null: all")
    disable_consistency: bool = Field(False, description="ablation: the student draws masks of its own, without shift")
    loss: Literal["BCEWithLogitsLoss"] = Field("BCEWithLogitsLoss", description="the only loss of CED")
    loss_args: LossArgs = Field(LossArgs(), description="arguments of the loss")


class FinetuneConfig(TaggerConfig):
    """Keys of `ced finetune`: train a tagger on a labelled table."""

    command: Literal["finetune"] = Field("finetune", description="always finetune")
    classes: UserPath | None = Field(None, description="class table (index, name); audioset or null: AudioSet's 527")
    task: Literal["multi", "single"] = Field("multi", description="classes of a clip: any number, or exactly one")
    balanced: bool = Field(False, description="draw clips so that all classes are equally frequent")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="part of each target replaced by a uniform distribution, over yes and no or over the classes",
    )
    trainable: Literal["all", "head"] = Field(
        "all", description="what is trained: the whole network or only its output layer"
    )
    chunk_length: float = Field(
        10,
        gt=0,
        le=3600,
        description="seconds to which training items are cut or padded; about the length of the clips",
    )
    wavtransforms: Wav = Field(ALL_WAV, description="transforms of the wave; one that is left out is not applied")
    spectransforms: Spec = Field(ALL_SPEC, description="transforms of the mel; one that is left out is not applied")


class DecoderArgs(Section):
    """The decoder of a masked autoencoder, which predicts the hidden patches."""

    embed_dim: int = Field(512, ge=1, le=16_384, description="width; a multiple of num_heads")
    num_heads: int = Field(8, ge=1, le=16_384, description="attention heads")
    depth: int = Field(8, ge=1, le=256, description="transformer blocks")

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


class PretrainOptimizerArgs(OptimizerArgs):
    """Arguments of the optimiser, with the published values of pre-training."""

    lr: float = Field(2e-4, gt=0, description="highest learning rate, after the warm-up")
    weight_decay: float = Field(5e-7, ge=0, description="weight decay")


class PretrainConfig(TrainerConfig):
    """Keys of `ced pretrain`: train a masked autoencoder on any clips; the defaults are the published values."""

    command: Literal["pretrain"] = Field("pretrain", description="always pretrain")
    refused = dict.fromkeys(
        TaggerConfig.model_fields.keys() - TrainerConfig.model_fields.keys(),
        "pre-training uses no labels: there is no validation and no mixup, and last.safetensors is the result",
    )

    pretrained: bool | str = Field(
        False, description="first weights: false (random), true (those of the model), or a name or file"
    )
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="part of the patches that is hidden")
    decoder_args: DecoderArgs = Field(DecoderArgs(), description="shape of the decoder, which is not kept")
    chunk_length: float = Field(
        10, gt=0, le=3600, description="seconds of the random crop of each clip; shorter clips are padded"
    )
    picture_every: Positive = Field(5, description="epochs from one reconstruction.png to the next")
    epochs: Positive = Field(40, description="epochs to train")
    optimizer: Optimizer = Field("Adam", description="Adam8bit is replaced by Adam without CUDA and bitsandbytes")
    optimizer_args: PretrainOptimizerArgs = Field(PretrainOptimizerArgs(), description="arguments of the optimiser")
    warmup_epochs: float | None = Field(3, ge=0, description="epochs of warm-up, unless warmup_iters is given")
    decay_frac: float = Field(0.01, ge=0, le=1, description="last learning rate as a part of the first")

    @model_validator(mode="before")
    @classmethod
    def _default_warmup(cls, values: Any) -> Any:
        """Drop the default of warmup_epochs where warmup_iters is given."""
        if isinstance(values, Mapping) and values.get("warmup_iters") is not None:
            return {"warmup_epochs": None} | dict(values)
        return values


CONFIGS: Mapping[str, type[Section]] = {  # by command
    "store": StoreConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "pretrain": PretrainConfig,
}

C = TypeVar("C", bound=Section)


def load_config(kind: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Return the configuration of a YAML file, with `--key value` overrides.

    Args:
        kind: the class of the command's configuration.
        path: the file; None: overrides only.
        overrides: words of a command line: `--key value` or `--key=value`, with hyphens or underscores in the key;
            `--key.inner value` sets a key of a mapping; values are read as YAML.

    Raises:
        ConfigError: its details list all errors, one line each, unknown keys with the most similar known one.
    """
    values = read_file(path) if path is not None else {}
    for key, value in _parse(overrides):
        _set(values, key, value)
    return check(kind, values, str(path) if path is not None else "the command line")


def check(kind: type[C], values: Mapping[str, Any], source: str) -> C:
    """Validate `values` as a configuration; `source` is their origin, for errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: {len(lines)} error(s)", details=lines) from None


def dump(config: Section) -> str:
    """Return a configuration as YAML, which `load_config` reads."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def command_of(path: Path) -> str:
    """Return the training command that a complete configuration, such as an experiment's config.yaml, is for.

    It is the key `command`. Version 0.2.0 did not write that key, but wrote all others: its files belong to the command
    whose class has all of their keys, since each class has keys that the others lack.

    Raises:
        ConfigError: the file cannot be read, or is for no training command.
    """
    values = read_file(path)
    kinds = {name: kind for name, kind in CONFIGS.items() if issubclass(kind, TrainerConfig)}
    if "command" in values:
        found = [name for name in kinds if name == values["command"]]
    else:
        found = [name for name, kind in kinds.items() if values.keys() <= kind.model_fields.keys()]
    if len(found) != 1:
        raise ConfigError(f"{path} is for no training command; set its key command to one of: {', '.join(kinds)}")
    return found[0]


class _Loader(yaml.SafeLoader):
    """Reads plain values, and refuses repeated keys: the second would silently override the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping as a dict."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is repeated", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_file(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML, is not a mapping, or exceeds the limits on size and depth.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_FILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read configuration {path}: {reason}") from error
    try:
        values = _values_of(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, a number with too many digits
        raise ConfigError(f"configuration {path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if values is None:
        raise ConfigError(f"configuration {path} is empty; it must be keys and values")
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} is {type(values).__name__}; it must be keys and values")
    return values


def _values_of(text: str) -> Any:
    """Return the values of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML.
        ValueError: a value is invalid, or there are more or deeper ones than any configuration has.
    """
    _check_size(text)
    return yaml.load(text, _Loader)


def _check_size(text: str) -> None:
    """Refuse text that would expand to a huge value: aliases of aliases, deeply nested lists.

    Raises:
        ValueError: the text, the number of values or the depth exceeds its limit.
    """
    if len(text) > _LONGEST_FILE:
        raise ValueError(f"it has more than {_LONGEST_FILE:,} characters")
    total = 0
    sizes: dict[str, int] = {}  # values below each anchor
    open_ones: list[tuple[str | None, int]] = []  # the enclosing lists and mappings: anchor, and values before it
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            total += 1
            open_ones.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_ones):
                raise ValueError(f"{event.anchor} contains itself")
            total += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        if len(open_ones) > _DEEPEST or total > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values, or is nested more than {_DEEPEST} levels deep")


def _parse(words: Sequence[str]) -> list[tuple[str, Any]]:
    """Split command-line words into keys and YAML values."""
    pairs = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(
                f"unexpected argument {word!r}; the configuration file comes first, then keys as --key value"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; configuration keys are given as --key value")
            text = rest.pop(0)
        try:
            value = _values_of(text)
        except (yaml.YAMLError, ValueError):
            value = text
        pairs.append((key.replace("-", "_"), value))
    return pairs


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key, or with dots in it a key of a mapping.

    Raises:
        ConfigError: an outer key is not a mapping.
    """
    *outer, last = key.split(".")
    for part in outer:
        inner = _merge(values.get(part))
        if not isinstance(inner, dict):
            raise ConfigError(f"--{key}: {part} is {inner!r}, which has no keys of its own")
        # A copy: YAML aliases share one object, which must not be changed at both places.
        values[part] = dict(inner)
        values = values[part]
    values[last] = value


def _explain(kind: type[Section], problem: Any) -> str:
    """Describe one of pydantic's errors in one line."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *outer, key = problem["loc"]
        section = _section_at(kind, outer)
        if key in section.refused:
            return f"  {place}: {section.refused[key]}"
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        return f"  {place}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"  {place}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    came = f", got {repr(problem['input'])[:_SHOWN]}" if problem["loc"] else ""
    return f"  {place + ': ' if place else ''}{message[0].lower()}{message[1:]}{came}"


def _section_at(kind: type[Section], place: Sequence[int | str]) -> type[Section]:
    """Return the class of the section at a place of a configuration."""
    for part in place:
        if isinstance(part, int):  # an item of a list of sections
            continue
        inner = section_in(kind.model_fields[str(part)].annotation)
        assert inner is not None
        kind = inner
    return kind
