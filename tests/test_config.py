from pathlib import Path

import pytest

from ced.config import (
    CONFIGS,
    FinetuneConfig,
    PretrainConfig,
    Section,
    StoreConfig,
    TrainConfig,
    TrainerConfig,
    check,
    command_of,
    dump,
    load_config,
    section_in,
)
from ced.distill.onnx_teacher import GraphSettings
from ced.errors import ConfigError

ROOT = Path(__file__).parent.parent
MINIMAL = ["--train_data", "a.tsv", "--model", "ced_tiny"]


def errors_of(kind: type[Section], words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(kind, None, words)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("size", ["tiny", "mini", "small", "base"])
def test_published_training_configs_load_with_the_published_values(size: str) -> None:
    rate = 1e-3 if size in ("tiny", "mini") else 3e-4
    balanced = load_config(TrainConfig, ROOT / f"trainconfig/balanced_mixup_{size}_T_ensemble5014_chunk10.yaml")
    full = load_config(TrainConfig, ROOT / f"trainconfig/full_audiotransformer_{size}_T_Ensemble5014_chunk10.yaml")
    for config in (balanced, full):
        assert config.model == f"audiotransformer_{size}"
        assert config.optimizer_args.lr == rate
        assert (config.early_stop, config.n_saved, config.epochs, config.mode) == (10, 4, 300, "amp")
    assert (balanced.batch_size, balanced.warmup_iters, balanced.epoch_length, balanced.valid_every) == (
        32,
        5000,
        None,
        5,
    )
    assert (full.batch_size, full.warmup_iters, full.epoch_length, full.valid_every) == (128, 62500, 6250, 3)
    assert (balanced.mixup, full.mixup) == (0.5, None)
    assert balanced.logitspath == Path("logits/ensemble5014/balanced/chunk_10")
    assert full.train_data == Path("data/full.tsv")


@pytest.mark.parametrize("kind", ["balanced", "full"])
def test_published_logit_configs_load_with_the_published_values(kind: str) -> None:
    config = load_config(StoreConfig, ROOT / f"logitconfig/{kind}_base_chunk10s_topk20.yaml")
    (teacher,) = config.model
    assert (teacher.name, config.epochs, config.topk, config.batch_size) == ("audiotransformer_base_4740", 40, 20, 128)
    assert config.wavtransforms.Shift is not None
    assert (config.wavtransforms.Shift.min_shift, config.wavtransforms.Shift.max_shift) == (-0.5, 0.5)
    assert config.spectransforms.TimeMasking is not None
    assert config.spectransforms.TimeMasking.time_mask_param == 192
    assert config.spectransforms.FrequencyMasking is not None
    assert config.spectransforms.FrequencyMasking.freq_mask_param == 24


@pytest.mark.parametrize("size", ["tiny", "mini", "small", "base"])
def test_pre_training_configs_load_with_the_published_values(size: str) -> None:
    config = load_config(PretrainConfig, ROOT / f"pretrainconfig/audiotransformer_{size}.yaml")
    assert (config.model, config.pretrained) == (f"audiotransformer_{size}", False)
    assert config.decoder_args.depth == (4 if size == "tiny" else 8)
    assert (config.decoder_args.embed_dim, config.decoder_args.num_heads) == (512, 8)
    assert (config.optimizer, config.optimizer_args.lr, config.optimizer_args.weight_decay) == ("Adam", 2e-4, 5e-7)
    assert (config.warmup_epochs, config.decay_frac, config.epochs, config.batch_size) == (3, 0.01, 40, 32)
    assert (config.mask_ratio, config.chunk_length, config.epoch_length) == (0.75, 10, None)
    defaults = load_config(PretrainConfig, None, ["--train_data", "data/full.tsv", "--model", config.model])
    assert config.model_copy(update={"decoder_args": defaults.decoder_args}) == defaults


def test_warmup_iters_replaces_the_default_of_warmup_epochs(tmp_path: Path) -> None:
    config = load_config(PretrainConfig, None, [*MINIMAL, "--warmup_iters", "7"])
    assert (config.warmup_iters, config.warmup_epochs) == (7, None)
    path = tmp_path / "c.yaml"
    path.write_text(dump(config))
    assert load_config(PretrainConfig, path) == config
    lines = errors_of(PretrainConfig, [*MINIMAL, "--warmup_iters", "7", "--warmup_epochs", "1"])
    assert lines[1:] == ["  warmup_iters and warmup_epochs are both given; give one"]


def test_keys_that_pre_training_does_not_have_are_refused_with_the_reason() -> None:
    lines = errors_of(PretrainConfig, [*MINIMAL, "--eval_data", "e.tsv", "--decoder_args.num_heads", "3"])
    assert lines[0] == "the command line: 2 error(s)"
    assert "  decoder_args: embed_dim 512 is not a multiple of num_heads 3" in lines[1] + lines[2]
    reason = "pre-training uses no labels: there is no validation and no mixup, and last.safetensors is the result"
    assert f"  eval_data: {reason}" in lines


def test_every_shipped_config_is_one_of_the_ten() -> None:
    assert len(list((ROOT / "trainconfig").iterdir())) == 8
    assert len(list((ROOT / "logitconfig").iterdir())) == 2


def test_overrides_replace_values_set_keys_of_mappings_and_are_read_as_yaml() -> None:
    words = [*MINIMAL, "--optimizer_args.lr", "1e-4", "--mixup=0.3", "--eval_data", "null", "--model_args.depth", "2"]
    config = load_config(TrainConfig, None, [*words, "--logitspath", "s", "--mode", "off", "--label_type", "527"])
    assert config.optimizer_args.lr == 1e-4
    assert config.mixup == 0.3
    assert config.eval_data is None
    assert config.model_args == {"depth": 2}
    assert config.mode == "off"
    assert config.label_type == "527"


def test_an_override_of_one_key_of_a_mapping_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train_data: a.tsv\nmodel: ced_tiny\nlogitspath: s\nmodel_args: {depth: 3, pooling: logit}\n")
    config = load_config(TrainConfig, path, ["--model_args.depth", "2"])
    assert config.model_args == {"depth": 2, "pooling": "logit"}


@pytest.mark.parametrize("kind", [StoreConfig, TrainConfig, FinetuneConfig, PretrainConfig])
def test_a_dumped_configuration_is_read_back_equal(kind: type[Section], tmp_path: Path) -> None:
    words = [*MINIMAL, "--batch_size", "7"]
    extra = {TrainConfig: ["--logitspath", "s"], PretrainConfig: ["--mask_ratio", "0.5"]}
    words += extra.get(kind, ["--spectransforms", "null"])
    config = load_config(kind, None, words)
    path = tmp_path / "c.yaml"
    path.write_text(dump(config))
    assert load_config(kind, path) == config


TRAINED = [
    (TrainConfig, "train", ["--logitspath", "s"]),
    (FinetuneConfig, "finetune", []),
    (PretrainConfig, "pretrain", []),
]


@pytest.mark.parametrize(("kind", "command", "more"), TRAINED)
def test_a_written_configuration_begins_with_its_command(
    kind: type[TrainerConfig], command: str, more: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(load_config(kind, None, [*MINIMAL, *more])))
    assert path.read_text().splitlines()[0] == f"command: {command}"
    assert command_of(path) == command


@pytest.mark.parametrize(("kind", "command", "more"), TRAINED)
def test_the_command_of_a_file_without_one_is_known_by_its_keys(
    kind: type[TrainerConfig], command: str, more: list[str], tmp_path: Path
) -> None:
    """Version 0.2.0 wrote all keys but `command`."""
    config, path = load_config(kind, None, [*MINIMAL, *more]), tmp_path / "config.yaml"
    path.write_text(dump(config).partition("\n")[2])
    assert command_of(path) == command
    assert load_config(kind, path) == config


@pytest.mark.parametrize("text", ["command: tag\n", "command: 3\n", "command: [a]\n", "seed: 1\n", "nothing: 1\n"])
def test_a_file_that_is_for_no_command_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"no training command; .* train, finetune, pretrain"):
        command_of(path)


def test_a_configuration_of_another_command_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(load_config(FinetuneConfig, None, MINIMAL)))
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    assert "  command: input should be 'train', got 'finetune'" in caught.value.details


def test_keys_may_have_hyphens_or_underscores() -> None:
    words = ["--train-data", "a.tsv", "--model=ced_tiny", "--optimizer-args.weight-decay", "0.5", "--batch_size", "3"]
    config = load_config(FinetuneConfig, None, [*words, "--outputpath", "my-folder", "--model-args.target_length=64"])
    assert (config.train_data, config.outputpath) == (Path("a.tsv"), Path("my-folder"))
    assert (config.optimizer_args.weight_decay, config.batch_size) == (0.5, 3)
    assert config.model_args == {"target_length": 64}


def test_transforms_may_be_a_list_or_a_mapping() -> None:
    as_list = load_config(StoreConfig, None, [*MINIMAL, "--spectransforms", "[{TimeMasking: {time_mask_param: 9}}]"])
    as_mapping = load_config(StoreConfig, None, [*MINIMAL, "--spectransforms", "{TimeMasking: {time_mask_param: 9}}"])
    assert as_list == as_mapping
    assert as_list.spectransforms.FrequencyMasking is None


def test_an_override_of_a_transform_in_the_published_list_keeps_the_others() -> None:
    path = ROOT / "logitconfig/balanced_base_chunk10s_topk20.yaml"
    config = load_config(StoreConfig, path, ["--spectransforms.TimeMasking.time_mask_param", "96"])
    assert config.spectransforms.TimeMasking is not None
    assert config.spectransforms.TimeMasking.time_mask_param == 96
    assert config.spectransforms.FrequencyMasking is not None


def test_every_error_is_reported_at_once_with_the_nearest_key() -> None:
    words = ["--train_dat", "a", "--epochs", "0", "--optimizer_args.lrr", "1", "--mode", "ampp", "--mixup", "-1"]
    lines = errors_of(TrainConfig, words)
    text = "\n".join(lines)
    assert lines[0] == "the command line: 8 error(s)"
    assert "train_dat: unknown key; did you mean train_data?" in text
    assert "optimizer_args.lrr: unknown key; did you mean lr?" in text
    assert "epochs: input should be greater than or equal to 1, got 0" in text
    assert "mode: input should be 'amp', 'amp_bf16' or 'off', got 'ampp'" in text
    assert "logitspath: required, but not given" in text
    assert "mixup: input should be greater than 0, got -1" in text


def test_unknown_keys_inside_transforms_name_the_nearest() -> None:
    lines = errors_of(StoreConfig, [*MINIMAL, "--wavtransforms", "{Shift: {mi_shift: 3}}"])
    assert lines[1:] == ["  wavtransforms.Shift.mi_shift: unknown key; did you mean min_shift?"]
    lines = errors_of(StoreConfig, [*MINIMAL, "--spectransforms", "{TimeMasing: {}}"])
    assert lines[1:] == ["  spectransforms.TimeMasing: unknown key; did you mean TimeMasking?"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "MSELoss"], "loss: input should be 'BCEWithLogitsLoss', got 'MSELoss'"),
        (["--warmup_iters", "1", "--warmup_epochs", "2"], "warmup_iters and warmup_epochs are both given; give one"),
        (["--optimizer_args.lr", "fast"], "optimizer_args.lr: input should be a valid number"),
        (["--chunk_length", "3"], "chunk_length: unknown key"),
        (["--warmup_epochs", ".inf"], "warmup_epochs: input should be a finite number"),
        (["--optimizer_args.betas", "[1.5, 0.9]"], "optimizer_args.betas.0: input should be less than 1"),
        (["--optimizer_args.betas", "[0.9, 1.0]"], "optimizer_args.betas.1: input should be less than 1"),
        (["--optimizer_args.betas", "[-0.1, 0.9]"], "optimizer_args.betas.0: input should be greater than or equal"),
        (["--seed", "99999999999999999999999"], "seed: "),
        (["--batch_size", "true"], "batch_size: should be a number, got True"),
        (["--epochs", "yes"], "epochs: should be a number, got True"),
        (["--warmup_epochs", "false"], "warmup_epochs: should be a number, got False"),
        (["--optimizer_args.betas", "[true, 0.9]"], "optimizer_args.betas: should be a number, got [True, 0.9]"),
        (["--mixup", "on"], "mixup: should be a number, got True"),
        (["--batch_size", "1000000000000"], "batch_size: input should be less than or equal to 10000000"),
        (["--num_workers", "100000"], "num_workers: input should be less than or equal to 1024"),
        (["--model", "[" + "[1]," * 500 + "]"], "model: input should be a valid string, got [[1], [1], [1], [1]"),
        (["--logfile", "a/b.log"], "logfile: should be a file name without a folder, got 'a/b.log'"),
    ],
)
def test_invalid_values_are_refused(words: list[str], message: str) -> None:
    found = errors_of(TrainConfig, [*MINIMAL, "--logitspath", "s", *words])[1]
    assert message in found
    assert len(found) < 300


def test_booleans_are_still_accepted_where_they_are_expected() -> None:
    config = load_config(TrainConfig, None, [*MINIMAL, "--logitspath", "s", "--compile", "yes", "--mode", "off"])
    assert (config.compile, config.mode, config.pretrained) == (True, "off", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train_data", "a"], "unexpected argument 'train_data'"),
        (["--train_data"], "--train_data has no value"),
        (["--compile", "--mode", "off"], "--compile has no value"),
        (["--epochs", "3", "--epochs.x", "3"], "--epochs.x: epochs is 3, which has no keys of its own"),
    ],
)
def test_malformed_overrides_are_refused(words: list[str], message: str) -> None:
    assert message in errors_of(TrainConfig, words)[0]


LAUGHS = 'l0: &l0 ["lol"]\n' + "".join(
    f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]\n" for level in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "is list"),
        ("a: [", "is not YAML"),
        ("", "is empty"),
        ("seed: 1\nepochs: 2\nseed: 3\n", "key 'seed' is repeated"),
        ("? [a]\n: b\n", "a key is a list or a mapping"),
        ("seed: 2026-13-45\n", "month must be"),
        (f"seed: {'1' * 5000}\n", "is not YAML: Exceeds the limit"),
        ("[" * 50_000, "nested more than 20 levels"),
        ("- " * 50_000, "nested more than 20 levels"),
        ("a: " + "{a: " * 50_000, "nested more than 20 levels"),
        ("a: [" + "1," * 20_000 + "]", "more than 10,000 values"),
        ("a: [" + "[]," * 20_000 + "]", "more than 10,000 values"),
        ("x" * 2_000_000, "more than 1,048,576 characters"),
        ("a: &a [*a]\n", "a contains itself"),
        (LAUGHS, "more than 10,000 values"),
        (LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "is not YAML"),
    ],
)
def test_files_without_a_valid_configuration_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(TrainConfig, path)
    assert "\n" not in str(caught.value)


def test_a_minimum_shift_above_the_maximum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_shift 0\.5 is above max_shift -0\.5"):
        check(
            StoreConfig,
            {"train_data": "a", "model": "b", "wavtransforms": {"Shift": {"min_shift": 0.5, "max_shift": -0.5}}},
            "here",
        )


@pytest.mark.parametrize("kind", [*CONFIGS.values(), GraphSettings])
def test_every_key_has_a_description(kind: type[Section]) -> None:
    kinds = [kind]
    for one in kinds:
        assert [name for name, field in one.model_fields.items() if not field.description] == []
        kinds += [inner for field in one.model_fields.values() if (inner := section_in(field.annotation))]
    assert len(kinds) >= 3
