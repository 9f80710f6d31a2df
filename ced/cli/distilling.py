"""Commands that make a student: pack, labels, store, train, finetune, pretrain, evaluate, demo."""

import shlex
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from ced.cli.console import is_main_process, reporting, show, show_error, show_note, show_warnings_only
from ced.errors import CheckpointError, ConfigError
from ced.text import quoted, some

if TYPE_CHECKING:
    from ced.config import TrainerConfig

    C = TypeVar("C", bound=TrainerConfig)

Resume = Annotated[
    Path | None,
    typer.Option(metavar="EXPERIMENT", help="Resume an interrupted run; CONFIG is then read from its folder."),
]
SHOWN = 5  # failures that are printed; the others are counted
Words = Annotated[
    list[str] | None, typer.Argument(metavar="CONFIG --key value", help="A YAML file, and keys that override it.")
]


def pack(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="LIST.tsv|SOUND...",
            help="A table with a column of file names; or, as for `ced tag`, folders, patterns, shards and addresses, "
            "whose sounds are listed in OUTDIR/clips.tsv.",
        ),
    ],
    outdir: Annotated[Path, typer.Argument(help="Folder for hdf5/ and labels/.")],
    size_per_file: Annotated[int, typer.Option("--size-per-file", "-s", min=1, help="Clips of an HDF5 file.")] = 50_000,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Threads that decode; default: one for each core.")
    ] = None,
    duration: Annotated[bool, typer.Option("--duration", help="Add a column with seconds.")] = False,
    hdf5_dirname: Annotated[str, typer.Option(help="Folder of the audio in OUTDIR.")] = "hdf5",
    index_dirname: Annotated[str, typer.Option(help="Folder of the table in OUTDIR.")] = "labels",
    filename_column: Annotated[str, typer.Option(help="Column of file names.")] = "filename",
    fullname: Annotated[bool, typer.Option("--fullname", help="Identify clips by path, not by base name.")] = False,
    stereo: Annotated[bool, typer.Option("--stereo", help="Keep two channels.")] = False,
    delim: Annotated[
        str, typer.Option("--delim", "-d", help="Delimiter of the table's columns.", show_default="tab")
    ] = "\t",
    dtype: Annotated[Literal["int16", "float32"], typer.Option(help="Type of the samples.")] = "int16",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Exit with 0 even if files are unreadable.")] = False,
) -> None:
    """Pack audio files into HDF5, resampled to 16 kHz, with a table of the file that has each clip.

    Unreadable files are listed in `STEM.failed.tsv` beside that table, all others are packed. Repeat the command to
    resume an interrupted run.
    """
    from ced.distill import pack_writer

    with reporting() as progress:
        report = pack_writer.pack(
            _clips_table(sources, outdir, filename_column),
            outdir,
            size_per_file=size_per_file,
            workers=jobs,
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
        show_error(reason)
    if report.failures is not None:
        more = f"{len(report.failed) - SHOWN} more; " if len(report.failed) > SHOWN else ""
        show_note(f"ced: {more}all failures are listed in {report.failures}")
    show(f"{report.index}: {report.packed} packed, {len(report.failed)} failed")
    if report.failed and not skip_bad:
        raise typer.Exit(1)


def _clips_table(sources: list[str], outdir: Path, column: str) -> Path:
    """Return the table of clips: the one that is named, or a new one of the sounds that are named."""
    from ced.remote import address_of
    from ced.sound.shards import is_shard
    from ced.sound.tables import write_table
    from ced.tag.inputs import find_inputs

    (first, *others) = sources
    if not others and not (Path(first).is_dir() or has_magic(first) or is_shard(first) or address_of(first)):
        return Path(first)
    table = outdir / "clips.tsv"
    if address_of(outdir) is not None:  # `pack` refuses it
        return table
    write_table(table, {column: [str(item.source) for item in find_inputs(sources)]})
    return table


def labels(
    segments: Annotated[Path, typer.Argument(metavar="SEGMENTS.csv", help="AudioSet's list of segments.")],
    audio: Annotated[Path, typer.Argument(metavar="AUDIO", help="A folder of audio, or the table of a pack of it.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Table to write; default: SEGMENTS.tsv.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class table with index, mid and name; default: AudioSet's 527.")
    ] = None,
) -> None:
    """Make a labelled table from one of AudioSet's segment lists (YTID, start, end, "mids")."""
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
            show(f"{what}: {len(names)} ({some(names, 3)})")


def store(words: Words = None) -> None:
    """Store views of one teacher or an ensemble: the scores that students are trained with.

    Runs alone or under torchrun. Complete parts are kept: repeat the command to resume an interrupted run.
    """
    from ced.config import StoreConfig, load_config
    from ced.distill import store

    path, overrides = _split(words)
    with reporting() as progress:
        folder = store.store(load_config(StoreConfig, path, overrides), progress=progress)
    _show_folder(folder)


def train(words: Words = None, resume: Resume = None) -> None:
    """Distil a student from stored views; no labels are needed. Runs alone or under torchrun."""
    from ced.config import TrainConfig
    from ced.distill import train

    config, name = _training(TrainConfig, words, resume)
    with reporting() as progress:
        _show_folder(train.train(config, name=name, resume=resume, progress=progress))


def finetune(words: Words = None, resume: Resume = None) -> None:
    """Train or fine-tune a tagger on a labelled table. Runs alone or under torchrun."""
    from ced.config import FinetuneConfig
    from ced.distill import finetune

    config, name = _training(FinetuneConfig, words, resume)
    with reporting() as progress:
        _show_folder(finetune.finetune(config, name=name, resume=resume, progress=progress))


def pretrain(words: Words = None, resume: Resume = None) -> None:
    """Pre-train a network on any audio, without labels: first weights for train and finetune.

    It learns to fill in hidden patches of the spectrogram; reconstruction.png shows the progress. To start a training
    from the result, set its key `pretrained` to the experiment. Runs alone or under torchrun.
    """
    from ced.config import PretrainConfig
    from ced.distill import pretrain

    config, name = _training(PretrainConfig, words, resume)
    with reporting() as progress:
        _show_folder(pretrain.pretrain(config, name=name, resume=resume, progress=progress))


def evaluate(
    experiments: Annotated[
        list[Path],
        typer.Argument(
            metavar="EXPERIMENT...", help="An experiment, a checkpoint or a model name; several: an ensemble."
        ),
    ],
    test_data: Annotated[
        Path | None,
        typer.Option(help="Labelled table; default: eval_data of the experiment's configuration."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=10_000, help="Clips of a batch.")] = 32,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also print the average precision of each class.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write a table with the results of each class: a .tsv or .csv file."),
    ] = None,
) -> None:
    """Evaluate a tagger on a labelled table, or the mean of the probabilities of several.

    A folder of experiments, `experiments/NAME`, stands for the newest of them that has a result.
    """
    import torch

    from ced.distill import evaluate
    from ced.model.loading import load_model

    if out is not None and out.suffix.lower() not in evaluate.DELIMITERS:
        raise typer.BadParameter(f"--out is a table: a file name that ends in {' or '.join(evaluate.DELIMITERS)}")
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
    """Return the models to evaluate: for a folder, its newest experiment with a result; without those that have none.

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
        show_note(f"ced: warning: left out: {problem}")
    return list(found)


def _eval_data(experiment: Path) -> Path:
    """Return the table that an experiment was validated on."""
    from ced.config import read_file
    from ced.distill.experiment import CONFIG_NAME

    path = (experiment if experiment.is_dir() else experiment.parent) / CONFIG_NAME
    if path.is_file() and isinstance(table := read_file(path).get("eval_data"), str):
        return Path(table)
    raise ConfigError(f"{quoted(str(experiment))} has no eval_data; give a labelled table with --test-data")


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Recordings: a folder with meta.tsv (filename, fold, label, name); default: generated sounds."
        ),
    ] = None,
    fold: Annotated[int, typer.Option(help="Fold of meta.tsv that is held out for evaluation.")] = 5,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all output.")] = Path("demo"),
) -> None:
    """Run the whole method: pack, train two teachers, store their views, distil a student, evaluate, tag.

    Without --data it generates sounds and takes some minutes. All output is in one folder in --out, named after data
    and fold. Repeat the command to resume an interrupted run.
    """
    from ced.demo.job import run_demo

    show_warnings_only()
    with reporting() as progress:
        report = run_demo(out, data=data, fold=fold, announce=show, progress=progress)
    for text in report.lines():
        for line in text.split("\n"):
            show(line)


def _training(kind: "type[C]", words: list[str] | None, resume: Path | None) -> "tuple[C, str]":
    """Return the configuration and the name of a training run; one that resumes has its own configuration."""
    from ced.config import command_of, load_config
    from ced.distill.experiment import config_path, run_name

    path, overrides = _split(words)
    if resume is not None and path is None:
        path = config_path(resume)
        command, wanted = command_of(path), kind.model_fields["command"].default
        if command != wanted:
            again = shlex.join(["ced", command, "--resume", str(resume)])
            raise ConfigError(f"{quoted(str(resume))} was begun with `ced {command}`; resume it with `{again}`")
    config = load_config(kind, path, overrides)
    # A run has the name of its configuration, of the experiment that the configuration is from, or of its model.
    source = Path(config.model) if path is None else path
    return config, run_name(source) or source.stem


def _split(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """Separate the configuration file, if there is one, from the keys."""
    if words and not words[0].startswith("--"):
        return Path(words[0]), words[1:]
    return None, words or []


def _show_folder(path: Path) -> None:
    if is_main_process():
        show(path)
