"""Commands that make a student: pack, labels, store, train, finetune, pretrain, evaluate, demo."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from ced.cli.console import complain, hush, is_main_process, reporting, show, tell
from ced.errors import CheckpointError, ConfigError
from ced.text import quoted

Resume = Annotated[
    Path | None,
    typer.Option(metavar="EXPERIMENT", help="Go on with an interrupted run; CONFIG is then read from its folder."),
]
_KEY_OF = {"logitspath": "train", "mask_ratio": "pretrain"}  # what only one command's configuration has
SHOWN = 5  # failures that are named before the rest is counted
Words = Annotated[
    list[str] | None, typer.Argument(metavar="CONFIG --key value", help="A YAML file, and keys to set over it.")
]


def pack(
    table: Annotated[Path, typer.Argument(metavar="LIST.tsv", help="A table with a column of file names.")],
    outdir: Annotated[Path, typer.Argument(help="Where hdf5/ and labels/ go.")],
    size_per_file: Annotated[int, typer.Option("--size_per_file", "-s", min=1, help="Clips an HDF5 file.")] = 50_000,
    n_workers: Annotated[
        int | None, typer.Option("--n_workers", "-n", min=1, help="Threads that decode; default: one a processor.")
    ] = None,
    duration: Annotated[bool, typer.Option("--duration", help="Add a column with seconds.")] = False,
    hdf5_dirname: Annotated[str, typer.Option("--hdf5_dirname", help="Folder of the audio.")] = "hdf5",
    index_dirname: Annotated[str, typer.Option("--index_dirname", help="Folder of the table.")] = "labels",
    filename_column: Annotated[str, typer.Option("--filename_column", help="Column of file names.")] = "filename",
    fullname: Annotated[bool, typer.Option("--fullname", help="Key clips by path, not by base name.")] = False,
    stereo: Annotated[bool, typer.Option("--stereo", help="Keep two channels.")] = False,
    delim: Annotated[
        str, typer.Option("--delim", "-d", help="What separates the table's columns.", show_default="tab")
    ] = "\t",
    dtype: Annotated[Literal["int16", "float32"], typer.Option("--dtype", help="Type of the samples.")] = "int16",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Unreadable files do not make the exit code 1.")] = False,
) -> None:
    """Pack audio files into HDF5, resampled to 16 kHz, with a table of what lies where.

    Unreadable files are listed in `STEM.failed.tsv` beside that table, the rest is packed. An interrupted run may be
    repeated and finishes what is left.
    """
    from ced.distill import pack_writer

    with reporting() as progress:
        report = pack_writer.pack(
            table,
            outdir,
            size_per_file=size_per_file,
            workers=n_workers,
            duration=duration,
            hdf5_dirname=hdf5_dirname,
            index_dirname=index_dirname,
            filename_column=filename_column,
            fullname=fullname,
            stereo=stereo,
            delimiter=delim.replace("\\t", "\t"),
            dtype=dtype,
            progress=progress,
        )
    for _, reason in report.failed[:SHOWN]:
        complain(reason)
    if report.failures is not None:
        more = f"{len(report.failed) - SHOWN} more; " if len(report.failed) > SHOWN else ""
        tell(f"ced: {more}all failures are listed in {report.failures}")
    show(f"{report.index}: {report.packed} packed, {len(report.failed)} failed")
    if report.failed and not skip_bad:
        raise typer.Exit(1)


def labels(
    segments: Annotated[Path, typer.Argument(metavar="SEGMENTS.csv", help="AudioSet's list of segments.")],
    audio: Annotated[Path, typer.Argument(metavar="AUDIO", help="A folder of audio, or the table of a pack of it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: STEM.tsv, of SEGMENTS.csv.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class table with index, mid and name; default: AudioSet's 527.")
    ] = None,
) -> None:
    """Make a labelled table out of one of AudioSet's segment lists (YTID, start, end, "mids")."""
    from ced.sound.labels import audioset, read_classes
    from ced.sound.tables import segments_to_labels

    known = audioset() if classes is None else read_classes(classes)
    report = segments_to_labels(segments, audio, known, out or Path(f"{segments.stem}.tsv"))
    show(f"{report.table}: {report.rows} clips with labels")
    for what, names in (
        ("segments without a file", report.missing),
        ("files without a segment", report.unlisted),
        ("files without any known label", report.unlabelled),
        ("unknown labels", report.unknown_mids),
    ):
        if names:
            show(f"{what}: {len(names)} ({', '.join(map(quoted, names[:3]))}{', ...' if len(names) > 3 else ''})")


def store(words: Words = None) -> None:
    """Store the views of one teacher or an ensemble: the scores that students learn from.

    Runs alone or under torchrun. What is complete is kept, so an interrupted run may be repeated.
    """
    from ced.config import StoreConfig, load
    from ced.distill import store

    path, overrides = _split(words)
    with reporting() as progress:
        folder = store.store(load(StoreConfig, path, overrides), progress=progress)
    _result(folder)


def train(words: Words = None, resume: Resume = None) -> None:
    """Distil a student from stored views; no labels are needed. Runs alone or under torchrun."""
    from ced.config import TrainConfig, load
    from ced.distill import train

    path, overrides = _split(words, resume, "train")
    with reporting() as progress:
        config = load(TrainConfig, path, overrides)
        _result(train.train(config, name=_name(path, config.model), resume=resume, progress=progress))


def finetune(words: Words = None, resume: Resume = None) -> None:
    """Train or fine-tune a tagger on a labelled table. Runs alone or under torchrun."""
    from ced.config import FinetuneConfig, load
    from ced.distill import finetune

    path, overrides = _split(words, resume, "finetune")
    with reporting() as progress:
        config = load(FinetuneConfig, path, overrides)
        _result(finetune.finetune(config, name=_name(path, config.model), resume=resume, progress=progress))


def pretrain(words: Words = None, resume: Resume = None) -> None:
    """Pre-train a network on any audio, without labels: first weights for train and finetune.

    It learns to fill in hidden patches of the spectrogram; reconstruction.png shows how well. Set `pretrained` of a
    training to the experiment to start from it. Runs alone or under torchrun.
    """
    from ced.config import PretrainConfig, load
    from ced.distill import pretrain

    path, overrides = _split(words, resume, "pretrain")
    with reporting() as progress:
        config = load(PretrainConfig, path, overrides)
        _result(pretrain.pretrain(config, name=_name(path, config.model), resume=resume, progress=progress))


def evaluate(
    experiments: Annotated[
        list[Path],
        typer.Argument(metavar="EXPERIMENT...", help="An experiment, checkpoint or model name; several: an ensemble."),
    ],
    test_data: Annotated[
        Path | None,
        typer.Option("--test_data", help="Labelled table; default: eval_data of the experiment's configuration."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, max=10_000, help="Clips scored at once.")] = 32,
    per_class: Annotated[bool, typer.Option("--per_class", help="Print each class's average precision, too.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a table of every class's results: a .tsv or .csv file.")
    ] = None,
) -> None:
    """Evaluate a tagger on a labelled table; several by the mean of their probabilities.

    A folder of experiments stands for the newest of them that has a result: `experiments/NAME`.
    """
    import torch

    from ced.distill import evaluate
    from ced.model.loading import load_model

    if out is not None and out.suffix.lower() not in evaluate.DELIMITERS:
        raise typer.BadParameter(f"--out is the name of a table: NAME{' or NAME'.join(evaluate.DELIMITERS)}")
    chosen = _members(experiments)
    table = test_data or _eval_data(chosen[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with reporting() as progress:
        models = [load_model(str(experiment), progress=progress).to(device) for experiment in chosen]
        found = evaluate.evaluate(models, table, batch_size=batch_size, progress=progress)
    if len(chosen) > 1:
        show(f"the mean of {len(chosen)} models: {', '.join(quoted(str(path)) for path in chosen)}")
    if per_class:
        for name, value in zip(found.labels.names, found.per_class, strict=True):
            show(f"{value:.4f}  {name}")
    show(found.summary)
    if found.missing:
        show(f"left out, as no clip has them: {', '.join(map(quoted, found.missing))}")
    if out is not None:
        evaluate.write_results(out, found)


def _members(experiments: list[Path]) -> list[Path]:
    """Return the models to evaluate: folders as the experiment that they stand for, without those that have none yet.

    Raises:
        CheckpointError: none of the folders has a checkpoint.
    """
    from ced.model.zoo import checkpoint_file

    found: dict[Path, None] = {}
    problems = []
    for path in experiments:
        try:
            found[checkpoint_file(path).parent if path.is_dir() else path] = None
        except CheckpointError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    for problem in problems:
        tell(f"ced: warning: left out: {problem}")
    return list(found)


def _eval_data(experiment: Path) -> Path:
    """Return the table that an experiment was validated on."""
    from ced.config import read_file
    from ced.distill.experiment import CONFIG_NAME

    path = (experiment if experiment.is_dir() else experiment.parent) / CONFIG_NAME
    if path.is_file() and isinstance(table := read_file(path).get("eval_data"), str):
        return Path(table)
    raise ConfigError(f"{quoted(str(experiment))} names no eval_data; give a labelled table with --test_data")


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Recordings: a folder with meta.tsv (filename, fold, label, name); default: generated."),
    ] = None,
    fold: Annotated[int, typer.Option(help="The fold of meta.tsv that is held out.")] = 5,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is written.")] = Path("demo"),
) -> None:
    """Do the whole job: pack, train two teachers, store their views, distil a student, evaluate, tag.

    Without --data it makes sounds of its own and takes minutes. All goes into one folder in --out, named by
    data and fold. An interrupted run may be repeated and goes on.
    """
    from ced.demo.job import run

    hush()
    with reporting() as progress:
        report = run(out, data=data, fold=fold, say=show, progress=progress)
    for text in report.lines():
        for line in text.split("\n"):
            show(line)


def _split(words: list[str] | None, resume: Path | None = None, command: str = "") -> tuple[Path | None, list[str]]:
    """Tell the configuration file from the keys; without one, a run that goes on uses its own."""
    if words and not words[0].startswith("--"):
        return Path(words[0]), words[1:]
    if resume is None:
        return None, words or []
    from ced.distill.experiment import CONFIG_NAME

    path = resume / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"{quoted(str(resume))} is not an experiment: it has no {CONFIG_NAME}")
    text = path.read_text(encoding="utf-8", errors="replace")
    began = next((command for key, command in _KEY_OF.items() if f"{key}:" in text), "finetune")
    if began != command:
        again = shlex.join(["ced", began, "--resume", str(resume)])
        raise ConfigError(f"{quoted(str(resume))} was begun with `ced {began}`, and goes on with `{again}`")
    return path, words or []


def _name(path: Path | None, model: str) -> str:
    """Name a run after its configuration, after the experiment that the configuration is of, or after its model."""
    from ced.distill.experiment import run_name

    if path is None:
        return run_name(Path(model)) or Path(model).stem
    return run_name(path) or path.stem


def _result(path: Path) -> None:
    if is_main_process():
        show(path)
