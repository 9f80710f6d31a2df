"""The command line as a user meets it: real commands, in processes of their own."""

import csv
import logging
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pytest
import soundfile
from typer.main import get_command
from typer.testing import CliRunner

from ced.cli import app
from ced.cli.console import LINE_SECONDS
from ced.tag.options import TagOptions

ROOT = Path(__file__).parents[1]
RATE = 16_000


class Done(NamedTuple):
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


class Command(Protocol):
    def __call__(self, *words: str | Path, script: str = "run.py") -> Done:
        """Run a root script with these words; it must not show a traceback."""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, no network, a wide terminal; logging as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CED_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    loggers = [logging.getLogger("ced"), logging.getLogger("py.warnings")]
    before = [logger.handlers[:] for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers


@pytest.fixture
def ced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The root scripts, run in this process, which has torch loaded already."""

    def run(*words: str | Path, script: str = "run.py") -> Done:
        logging.getLogger("ced").handlers.clear()
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert isinstance(stopped.value.code, int)
        return Done(stopped.value.code, *capsys.readouterr())

    return run


def ced_process(*words: str | Path, script: str = "run.py") -> Done:
    """Run a root script as a user does."""
    command = [sys.executable, ROOT / script, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def error_of(done: Done) -> str:
    """Return what a failed command said, which must be one line."""
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ced: error: ")
    return line.removeprefix("ced: error: ")


def noise(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * RATE)).astype(np.float32)
    soundfile.write(path, samples, RATE, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


@pytest.fixture
def model(small_checkpoint: Path) -> Path:
    """A small network of three classes, as a checkpoint."""
    return small_checkpoint


def test_tag_prints_a_heading_and_each_window(model: Path, tmp_path: Path) -> None:
    long, short = noise(tmp_path / "long.wav", 2.5), noise(tmp_path / "short.flac", 0.4)
    done = ced_process("-m", model, "-k", "2", "-c", "1", long, short, script="inference.py")
    assert done.returncode == 0, done.stderr
    blocks = done.stdout.strip().split("\n\n")
    assert [line.rsplit(" ", 2)[0] for line in blocks[0].splitlines()[1:]] == [
        "[0.0s]-[1.0s] Topk-1",
        "[0.0s]-[1.0s] Topk-2",
    ]
    assert blocks[0].splitlines()[0] == f"===== {long} ====="
    assert [block.split(" ")[0] for block in blocks[1:3]] == ["[1.0s]-[2.0s]", "[2.0s]-[2.5s]"]
    assert blocks[3].splitlines()[0] == f"===== {short} ====="
    label, score = blocks[3].splitlines()[1].split(" ")[2:]
    assert label in {"bark", "bell", "rain"}
    assert 0 < float(score) < 1
    assert len(score) == len("0.1234")


def test_tag_continues_after_unreadable_files(ced: Command, model: Path, tmp_path: Path) -> None:
    good = noise(tmp_path / "good.wav")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "truncated.wav").write_bytes(good.read_bytes()[:20])
    soundfile.write(tmp_path / "no-samples.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no sound at all")
    bad = ["empty.wav", "truncated.wav", "no-samples.wav", "nan.wav", "text.wav", "missing.wav"]
    done = ced("tag", "-m", model, *(tmp_path / name for name in bad), good)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == len(bad)
    for name, line in zip(bad, lines, strict=True):
        assert line.startswith("ced: error: ")
        assert name in line
    assert done.stdout.startswith(f"===== {good} =====\n[0.0s]-[0.5s] Topk-1 ")


@pytest.mark.parametrize("command", ["tag", "embed"])
def test_missing_files_are_reported_before_a_model_is_opened(ced: Command, tmp_path: Path, command: str) -> None:
    done = ced(command, "-m", "no_such_model", tmp_path / "a.wav", tmp_path / "b.wav", "--out", tmp_path / "o.npy")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [name in line for name, line in zip(("a.wav", "b.wav"), lines, strict=True)] == [True, True]
    assert all("No such file" in line for line in lines)


def test_an_unknown_model_is_one_line(ced: Command, tmp_path: Path) -> None:
    message = error_of(ced("tag", "-m", "ced_mni", noise(tmp_path / "a.wav")))
    assert "ced_mni" in message
    assert "ced_mini" in message


def test_without_network_an_uncached_model_is_one_line(
    ced: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    message = error_of(ced(noise(tmp_path / "a.wav"), script="inference.py"))
    for word in ("ced_mini", "CED_OFFLINE", "mispeech/ced-mini", "path", "-m esc10"):
        assert word in message


@pytest.mark.parametrize("words", [("tag", "-k", "1"), ("embed", "-o", "out.npy")])
def test_the_model_in_the_package_needs_no_network(
    ced: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "esc10").mkdir()  # a folder of that name, of the data set for instance, is not meant
    done = ced(*words, "-m", "esc10", noise(tmp_path / "a.wav"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("export", "-m", "esc10"),
        ("evaluate", "esc10", "--test_data", "labelled.tsv"),
    ],
)
def test_the_model_in_the_package_has_no_weights(ced: Command, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert "esc10 is a graph in the package, without the weights" in error_of(ced(*words))


@pytest.mark.parametrize(
    "words", [["tag"], ["tag", "-k", "0", "a.wav"], ["tag", "-k", "x", "a.wav"], ["tagg"], ["tag", "--nope"]]
)
def test_usage_errors_exit_with_2(ced: Command, words: list[str]) -> None:
    done = ced(*words)
    assert done.returncode == 2
    assert "Usage: ced" in done.stderr
    assert "Traceback" not in done.stderr


COMMANDS = sorted(vars(get_command(app))["commands"])


def test_every_command_is_listed(ced: Command) -> None:
    assert {"tag", "serve", "train"} <= set(COMMANDS)
    overview = ced("--help").stdout
    for command in COMMANDS:
        assert f" {command} " in overview


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(ced: Command, command: str) -> None:
    done = ced(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: ced {command} " in done.stdout


@pytest.mark.parametrize(
    "name", [*(field.name for field in fields(TagOptions)), "jobs", "max_megabytes", "max_seconds"]
)
def test_an_option_has_one_spelling_in_all_commands(name: str) -> None:
    """That of the function's argument, and options of tagging are named as the fields of `TagOptions`."""
    commands = vars(get_command(app))["commands"].values()
    found = [parameter.opts for command in commands for parameter in command.params if parameter.name == name]
    assert found
    assert {options[0] for options in found} == {f"--{name.replace('_', '-')}"}
    shown = {option for command in commands for parameter in command.params for option in parameter.opts}
    assert not shown & {"--topk", "--chunk", "--chunk-length", "-c"}


PUBLISHED_OPTIONS = {  # of the published programs, by the command that each is now
    "tag": "-m --model -k --topk -c --chunk_length",
    "pack": "-s --size_per_file -n --n_workers --duration --hdf5_dirname --index_dirname --filename_column --fullname "
    "--stereo -d --delim --dtype",
    "evaluate": "--test_data",
    "export": "-m --model",
}


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command, options in PUBLISHED_OPTIONS.items() for option in options.split()],
)
def test_options_of_the_published_programs_are_known(command: str, option: str) -> None:
    """An unknown option would be reported first."""
    done = CliRunner().invoke(app, [command, option, *["1"] * 9, "--no-such-option"])
    assert (done.exit_code, "No such option: --no-such-option" in done.output) == (2, True), done.output


@pytest.mark.parametrize(
    ("words", "option"),
    [(["models", "-c", "3"], "-c"), (["models", "--topk", "3"], "--topk"), (["tag", "--top_l", "3"], "--top_l")],
)
def test_an_unknown_option_is_reported_as_it_was_typed(words: list[str], option: str) -> None:
    """Also if it is a published spelling of an option that the command does not have."""
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, f"No such option: {option}" in done.output) == (2, True), done.output


def test_published_spellings_of_options_are_accepted(ced: Command, model: Path, tmp_path: Path) -> None:
    sound = noise(tmp_path / "a.wav", 1.0)
    expected = ced("tag", sound, "-m", model, "--window", "0.5", "--top-k", "2")
    assert expected.returncode == 0, expected.stderr
    for words in (["-c", "0.5", "-k", "2"], ["--chunk_length", "0.5", "--topk=2"], ["-w0.5", "--top_k", "2"]):
        assert ced("tag", sound, "-m", model, *words).stdout == expected.stdout
    assert ced("tag", sound, "-m", model, "--allow_private", "-c0.5", "-k2").stdout == expected.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it must be keys and values"),
        (b"- eval_data\n", "it must be keys and values"),
        (b"eval_data: null\n", "has no eval_data"),
        (b"eval_data: [a: b: c\n", "is not YAML"),
        (b"\xff\xfe\xfa", "cannot read configuration"),
    ],
)
def test_an_experiment_with_a_broken_configuration_is_one_line(
    ced: Command, tmp_path: Path, text: bytes, message: str
) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    (tmp_path / "last.safetensors").write_bytes(b"never read")
    assert message in error_of(ced("evaluate", tmp_path))


def test_a_store_imports_no_plotting(tmp_path: Path) -> None:
    """Nor does an evaluation."""
    code = (
        "import sys\n"
        "from ced.cli.distilling import _eval_data, _split\n"
        "from ced.distill import evaluate, experiment, store\n"
        "_split(['store.yaml'])\n"
        "print({'matplotlib', 'tensorboard'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_help_of_a_configured_command_lists_its_keys(ced: Command) -> None:
    shown = ced("train", "--help").stdout
    assert "--resume" in shown
    assert "the view store: folder with logits_ep<e>_<rank>.h5 [required]" in shown
    assert re.search(r"^ +optimizer_args +.*\n +lr .*default 0\.001", shown, re.M)
    assert (
        "targets of the classes outside the top k [zero | last_mean | last_half | last_random | 527; default zero]"
        in shown
    )


def test_help_of_store_lists_the_keys_of_teachers_and_transforms(ced: Command) -> None:
    shown = ced("store", "--help").stdout
    names = [line.split()[0] for line in shown.partition("Keys of CONFIG")[2].splitlines() if line.startswith("   ")]
    at = names.index("model")
    assert names[at + 1 : at + 6] == ["name", "weight", "batch_size", "device", "mode"]
    assert re.search(r"^     +weight +.*\[default 1\.0\]", shown, re.M)
    assert re.search(r"^ +max_shift +.*\[default 0\.5\]", shown, re.M)


def test_all_errors_of_a_configuration_are_reported(ced: Command, tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("train_data: x.tsv\nlogitspath: y\nmodel: ced_tiny\nepoch: 3\nbatch_size: many\n")
    done = ced("train", config, "--optimizer_args.lrate", "1e-4", "--mode=fp8")
    assert done.returncode == 1
    assert done.stderr.startswith(f"ced: error: {config}: 4 error(s)\n")
    for part in ("did you mean epochs?", "batch_size", "optimizer_args.lrate", "mode"):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["store", "--model", "ced_tiny", "--train_data", "missing.tsv"], "missing.tsv"),
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["train", "--epochs", "3", "config.yaml"], "config.yaml"),
        (["finetune", "--resume", "nowhere"], "nowhere"),
        (["pretrain", "--resume", "nowhere"], "nowhere"),
        (["pretrain", "--model", "ced_tiny", "--train_data", "missing.tsv"], "missing.tsv"),
        (["evaluate", "nowhere"], "nowhere"),
        (["pack", "missing.tsv", "out"], "missing.tsv"),
        (["labels", "missing.csv", "audio"], "missing.csv"),
        (["export", "-m", "nowhere.pt"], "nowhere.pt"),
        (["demo", "--data", "nowhere"], "nowhere"),
    ],
)
def test_missing_files_are_one_line(ced: Command, words: list[str], part: str, tmp_path: Path) -> None:
    assert part in error_of(ced(*words))


def test_a_list_without_the_column_is_one_line(ced: Command, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("path\na.wav\n")
    message = error_of(ced("list.tsv", "out", script="scripts/wavlist_to_hdf5.py"))
    assert "filename" in message
    assert "path" in message


def test_pack_reports_unreadable_files(ced: Command, tmp_path: Path) -> None:
    noise(tmp_path / "good.wav")
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    (tmp_path / "list.tsv").write_text("filename\ngood.wav\nbad.wav\n")
    done = ced("list.tsv", "out", "--duration", "-n", "1", script="scripts/wavlist_to_hdf5.py")
    assert done.returncode == 1
    assert "1 packed, 1 failed" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out/labels/list.tsv").open(), delimiter="\t"))
    assert [(row["filename"], float(row["duration"])) for row in rows] == [("good.wav", 0.5)]
    assert "bad.wav" in (tmp_path / "out/labels/list.failed.tsv").read_text()
    assert ced("pack", "list.tsv", "out", "--skip-bad").returncode == 0


def test_train_evaluate_and_export_from_the_command_line(ced: Command, tmp_path: Path) -> None:
    """The walks of the root scripts, on sounds that are told apart by nothing but their level."""
    for name in ("a", "b", "c", "d"):
        noise(tmp_path / f"{name}.wav", 0.6)
    (tmp_path / "list.tsv").write_text("filename\tlabels\na.wav\t0\nb.wav\t1\nc.wav\t0\nd.wav\t1\n")
    (tmp_path / "classes.tsv").write_text("index\tname\n0\tbark\n1\tbell\n")
    assert ced("list.tsv", "pack", script="scripts/wavlist_to_hdf5.py").returncode == 0
    network = ["--model_args.embed_dim", "32", "--model_args.num_heads=2", "--model_args.depth", "1"]
    learning = ["--pretrained", "false", "--epochs", "1", "--batch_size", "2", "--optimizer", "Adam", *network]
    table = "pack/labels/list.tsv"
    (tmp_path / "teach.yaml").write_text(f"model: ced_tiny\ntrain_data: {table}\nmode: off\nclasses: classes.tsv\n")
    taught = ced("finetune", "teach.yaml", "--chunk_length", "0.6", "--eval_data", table, *learning)
    assert taught.returncode == 0, taught.stderr
    teacher = taught.stdout.strip()
    assert teacher.startswith("experiments/teach/")
    storing = ["--model", teacher, "--train_data", table, "--chunk_length", "0.6", "--epochs", "2", "--topk", "2"]
    stored = ced(*storing, "--mode", "off", script="save_logits.py")
    assert stored.returncode == 0, stored.stderr
    words = ["--logitspath", stored.stdout.strip(), "--num_classes", "2", "--train_data", table, "--mode", "off"]
    trained = ced("train", "--model", "ced_tiny", "--eval_data", table, *words, *learning)
    assert trained.returncode == 0, trained.stderr
    student = trained.stdout.strip()
    assert ced("train", "--resume", student).stdout.strip() == student
    assert f"resume it with `ced train --resume {student}`" in error_of(ced("finetune", "--resume", student))
    for tested in ([student], [student, "--test_data", table, "--per_class"], [student, "--test-data", table]):
        scored = ced("evaluate", *tested)
        assert scored.returncode == 0, scored.stderr
        assert "(4 clips, 2 of 2 classes)" in scored.stdout
    exported = ced("-m", student, "-o", "student.onnx", script="export_onnx.py")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "student.onnx").exists()
    assert (tmp_path / "student.int8.onnx").exists()


def test_pre_train_and_start_from_it_from_the_command_line(ced: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise(tmp_path / f"{name}.wav", 0.6)
    (tmp_path / "list.tsv").write_text("filename\na.wav\nb.wav\n")
    assert ced("pack", "list.tsv", "pack").returncode == 0
    network = ["--model_args.embed_dim", "32", "--model_args.num_heads=2", "--model_args.depth", "1"]
    learning = ["--train_data", "pack/labels/list.tsv", "--epochs", "1", "--batch_size", "2", "--chunk_length", "0.6"]
    words = [*network, *learning, "--mode", "off", "--decoder_args", "{embed_dim: 16, num_heads: 2, depth: 1}"]
    done = ced("pretrain", ROOT / "pretrainconfig/audiotransformer_tiny.yaml", *words)
    assert done.returncode == 0, done.stderr
    experiment = done.stdout.strip()
    assert experiment.startswith("experiments/audiotransformer_tiny/")
    assert (tmp_path / experiment / "reconstruction.png").exists()
    assert ced("pretrain", "--resume", experiment).stdout.strip() == experiment
    assert f"resume it with `ced pretrain --resume {experiment}`" in error_of(ced("train", "--resume", experiment))
    rows = (tmp_path / "pack/labels/list.tsv").read_text().splitlines()
    (tmp_path / "labelled.tsv").write_text(f"labels\t{rows[0]}\n0\t{rows[1]}\n1\t{rows[2]}\n")
    (tmp_path / "classes.tsv").write_text("index\tname\n0\tbark\n1\tbell\n")
    words = ["--model", "ced_tiny", "--pretrained", experiment, "--classes", "classes.tsv", "--mode", "off", *network]
    taught = ced("finetune", *words, *learning, "--train_data", "labelled.tsv")
    assert taught.returncode == 0, taught.stderr
    assert "masked" not in taught.stderr


def test_a_closed_pipe_is_silent(model: Path, tmp_path: Path) -> None:
    sound = noise(tmp_path / "long.wav", 3)
    assert ced_process("tag", "-m", model, sound).returncode == 0  # the first use says that it exports
    command = f"{sys.executable} {ROOT}/run.py tag -m {model} -c 0.01 {sound} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"===== {sound} =====\n"
    assert done.stderr == ""


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, ROOT / "run.py", "demo", "--out", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert "sounds" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors == "ced: interrupted\n"


def test_progress_without_a_terminal_is_sparse_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from ced.cli import console

    clock = iter([0.0, 1.0, LINE_SECONDS, LINE_SECONDS + 1, 2 * LINE_SECONDS])
    lines = console.ProgressLines(clock=lambda: next(clock))
    lines("pack", 1, 3)  # too early
    lines("pack", 2, 3)
    lines("pack", 3, 3)
    lines("tag", 1, 2, "0.1 h of sound")
    assert capsys.readouterr().err.splitlines() == ["pack: 2 of 3", "tag: 1 of 2, 0.1 h of sound"]
