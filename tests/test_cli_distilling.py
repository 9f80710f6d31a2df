"""Commands that train and evaluate: their output, errors and files."""

import logging
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import h5py
import numpy as np
import pytest
import soundfile
import torch

from ced.config import FinetuneConfig, load_config
from ced.distill.experiment import create_folder
from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.sound.labels import ClassTable

ROOT = Path(__file__).parents[1]
CLASSES = ClassTable(("dog", "rain, heavy", "a train"))


class Done(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Command(Protocol):
    def __call__(self, *words: str | Path) -> Done: ...


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with a labelled pack, without network; restores the logging afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CED_OFFLINE", "1")
    rng = np.random.default_rng(0)
    with h5py.File("clips.h5", "w") as file:
        for number in range(6):
            file[f"{number}.wav"] = rng.integers(-9_000, 9_000, 9_600, dtype=np.int16)
    rows = [f"{number}.wav\t{number % 2}\tclips.h5\n" for number in range(6)]
    Path("clips.tsv").write_text("filename\tlabels\thdf5path\n" + "".join(rows))
    Path("classes.tsv").write_text("index\tname\n" + "".join(f"{i}\t{name}\n" for i, name in enumerate(CLASSES.names)))
    loggers = [logging.getLogger("ced"), logging.getLogger("py.warnings")]
    before = [logger.handlers[:] for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers


@pytest.fixture
def ced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command, run in this process."""

    def run(*words: str | Path) -> Done:
        logging.getLogger("ced").handlers.clear()
        monkeypatch.setattr(sys, "argv", ["ced", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Done(int(stopped.value.code or 0), out, err)

    return run


def error_of(done: Done) -> str:
    assert done.code == 1
    (line,) = (line for line in done.err.splitlines() if line.startswith("ced: error: "))
    return line


def experiment(folder: str, seed: int = 0, result: bool = True) -> Path:
    """Make the folder of a run, with or without a result."""
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("model: ced_tiny\neval_data: clips.tsv\n")
    if result:
        torch.manual_seed(seed)
        network = CED(ModelConfig(32, 2, depth=1, outputdim=3, target_length=64), CLASSES)
        torch.nn.init.normal_(network.get_parameter("outputlayer.1.weight"))
        loading.save(path / "averaged.safetensors", network)
    return path


def test_several_models_are_averaged_and_the_output_says_so(ced: Command) -> None:
    one, two = (experiment(f"experiments/tiny/2026-01-0{day}_00-00-00", day) for day in (1, 2))
    stub = experiment("experiments/tiny/2026-01-03_00-00-00", result=False)
    done = ced("evaluate", one, two, stub)
    assert done.code == 0, done.err
    assert f"the mean of 2 models: {one}, {two}\n" in done.out
    assert "left out" in done.err
    assert stub.name in done.err
    assert "mean of" not in ced("evaluate", one, one).out  # the same one twice
    assert "holds no checkpoint" in error_of(ced("evaluate", stub))


def test_a_folder_of_experiments_is_the_newest_that_has_a_result(ced: Command) -> None:
    for day in (1, 2):
        newest = experiment(f"experiments/my run/2026-01-0{day}_00-00-00", day)
    experiment("experiments/my run/2026-01-03_00-00-00", result=False)
    done = ced("evaluate", "experiments/my run")
    assert done.code == 0, done.err
    assert done.out == ced("evaluate", newest).out
    assert f"{newest}/averaged.safetensors" in done.err
    soundfile.write("a.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 16_000), 16_000)
    tagged = ced("tag", "-m", "experiments/my run", "a.wav")
    assert tagged.code == 0, tagged.err
    assert tagged.out == ced("tag", "-m", newest, "a.wav").out


@pytest.mark.parametrize(("name", "separator"), [("results/found.tsv", "\t"), ("found.csv", ",")])
def test_out_writes_the_results_of_every_class_as_a_table(ced: Command, name: str, separator: str) -> None:
    model = experiment("experiments/tiny/2026-01-01_00-00-00")
    done = ced("evaluate", model, "--out", name)
    assert done.code == 0, done.err
    assert "left out, as no clip has them: 'a train'" in done.out
    header, *rows = Path(name).read_text().splitlines()
    assert header == separator.join(["index", "name", "positives", "average_precision", "recall"])
    assert [row.split(separator)[0] for row in rows] == ["0", "1", "2"]
    assert rows[0].split(separator)[1:3] == ["dog", "3"]
    assert rows[2] == separator.join(["2", "a train", "0", "", ""])
    assert ('"rain, heavy"' in rows[1]) == (separator == ",")
    precision = [float(row.split(separator)[-2]) for row in rows[:2]]
    assert f"mAP {sum(precision) / 2:.4f}" in done.out


def test_an_unknown_table_format_is_refused_before_scoring(ced: Command) -> None:
    done = ced("evaluate", experiment("tiny"), "--out", "found.xlsx")
    assert done.code == 2
    assert ".tsv" in done.err


NETWORK = ["--model", "ced_tiny", "--model_args", "{embed_dim: 16, num_heads: 1, depth: 1, target_length: 64}"]
SHORT = ["--train_data", "clips.tsv", "--chunk_length", "0.6", "--epochs", "1", "--batch_size", "2", "--mode", "off"]
FRESH = ["--pretrained", "false"]


def test_numbered_classes_without_names_are_refused(ced: Command) -> None:
    """As indices of AudioSet they would mean speech."""
    message = error_of(ced("finetune", *NETWORK, *FRESH, *SHORT))
    for word in ("0 to 1", "Speech", "--classes"):
        assert word in message
    for classes in ("classes.tsv", "audioset"):
        done = ced("finetune", *NETWORK, *FRESH, *SHORT, "--classes", classes)
        assert done.code == 0, done.err
        names = loading.load_model(done.out.strip()).labels.names
        assert names[0] == ("dog" if classes == "classes.tsv" else "Speech")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([*FRESH, "--eval_data", "nowhere.tsv", "--classes", "classes.tsv"], ["nowhere.tsv", "--eval-data null"]),
        (["--classes", "classes.tsv"], ["ced_tiny", "--pretrained false"]),
        (["--pretrained", "nowhere.pt", "--classes", "classes.tsv"], ["nowhere.pt", "--pretrained false"]),
        ([*FRESH, "--classes", "classes.tsv", "--chunk_length", "0.1"], ["chunk_length is 0.1", "0.15"]),
        ([*FRESH, "--classes", "classes.tsv", "--train_data", "unpacked.tsv"], ["hdf5path", "`ced pack`"]),
        (
            [*FRESH, "--classes", "classes.tsv", "--spectransforms", "{TimeMasking: {time_mask_param: 192}}"],
            ["time_mask_param is 192", "61 frames", "blanks 68% of the views", "11 is"],
        ),
    ],
)
def test_an_error_names_the_key_to_change(ced: Command, words: list[str], parts: list[str]) -> None:
    Path("unpacked.tsv").write_text("filename\tlabels\na.wav\t0\n")
    message = error_of(ced("finetune", *NETWORK, *SHORT, *words))
    for part in parts:
        assert part in message


def test_errors_of_store_and_train_name_the_key_to_change(ced: Command) -> None:
    model = experiment("experiments/teacher/2026-01-01_00-00-00")
    store = ["store", "--model", str(model), "--train_data", "clips.tsv", "--mode", "off", "--epochs", "1"]
    assert "topk is 20" in error_of(ced(*store, "--chunk_length", "0.6"))
    assert "set chunk_length" in error_of(ced(*store, "--topk", "2"))
    done = ced(*store, "--topk", "2", "--chunk_length", "0.6")
    assert done.out.strip() == "logits/teacher/clips/chunk_0.6"
    train = ["train", *NETWORK, *FRESH, "--train_data", "clips.tsv", "--mode", "off", "--epochs", "1"]
    assert "set num_classes to 3" in error_of(ced(*train, "--logitspath", done.out.strip()))
    assert "logitspath" in error_of(ced(*train, "--logitspath", "nowhere"))


def test_commands_in_errors_can_be_pasted(ced: Command) -> None:
    done = ced("finetune", *NETWORK, *FRESH, *SHORT, "--classes", "classes.tsv", "--outputpath", "my experiments")
    folder = done.out.strip()
    assert folder.startswith("my experiments/ced_tiny/")
    message = error_of(ced("pretrain", "--resume", folder))
    command = message.split("`")[3]
    assert shlex.split(command) == ["ced", "finetune", "--resume", folder]
    assert ced(*shlex.split(command)[1:]).code == 0
    message = error_of(ced("finetune", "--resume", folder, "--epochs", "2"))
    command = message.partition("new experiment: ")[2]
    further = ced(*shlex.split(command)[1:])
    assert further.code == 0, further.err
    assert Path(further.out.strip()).parent == Path(folder).parent


def test_a_run_of_an_earlier_release_is_resumed_by_the_command_that_began_it(ced: Command, tmp_path: Path) -> None:
    """Version 0.2.0 did not write the command into config.yaml."""
    words = [*NETWORK, *FRESH, *SHORT, "--classes", "classes.tsv"]
    folder = create_folder(load_config(FinetuneConfig, None, words), "old")
    path = folder / "config.yaml"
    command, _, rest = path.read_text().partition("\n")
    assert command == "command: finetune"
    path.write_text(rest)
    assert f"ced finetune --resume {folder}" in error_of(ced("train", "--resume", folder))
    done = ced("finetune", "--resume", folder)
    assert (done.code, done.out) == (0, f"{folder}\n"), done.err


def test_options_may_be_spelled_with_underscores_which_help_does_not_show(ced: Command) -> None:
    model = experiment("tiny")
    spelled = [("--test-data", "--batch-size", "--per-class"), ("--test_data", "--batch_size", "--per_class")]
    one, two = (ced("evaluate", model, table, "clips.tsv", size, "2", each) for table, size, each in spelled)
    assert one.code == 0, one.err
    assert one.out == two.out
    assert len(one.out.splitlines()) > 3
    for command in ("evaluate", "pack"):
        assert not re.search(r"--\w+_", ced(command, "--help").out)


def test_pack_takes_the_published_option_for_its_threads(ced: Command) -> None:
    soundfile.write("a.wav", np.zeros(16_000), 16_000)
    Path("list.tsv").write_text("filename\na.wav\n")
    for word in ("--n_workers", "-n", "--jobs", "-j"):
        done = ced("pack", "list.tsv", f"packed{word}", word, "1", "--size_per_file", "3")
        assert done.code == 0, done.err
