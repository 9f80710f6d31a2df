"""Options of the commands that tag sounds: their names and help texts, grouped as --help shows them.

Names that a class elsewhere has end in `Option` or `Argument` here.
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from ced.environment import cores
from ced.model.graph import Precision
from ced.tag.options import EVENT_THRESHOLD, MOST_BATCH, TOP_K, FormatName, Tail

FORMATS = get_args(FormatName)

# Panels of --help
_INPUT, _MODEL, _WINDOWS, _SELECTION, _EVENTS, _OUTPUT, _ACTIONS, _CLUSTER = (
    *("Input", "Model", "Windows", "Selection"),
    *("Events", "Output", "Actions", "Cluster"),
)
_SOUNDS = (
    "Files, folders, patterns, shards (.tar, .parquet), each also at s3://, gs://, az:// or hf://, http(s) addresses,"
    " @LIST (a file with a path on each line; @-: standard input), or - (a sound on standard input)."
)
Sounds = Annotated[list[str], typer.Argument(metavar="SOUND", help=_SOUNDS)]
SoundsUnlessFrom = Annotated[list[str] | None, typer.Argument(metavar="SOUND", help=_SOUNDS)]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        rich_help_panel=_MODEL,
        help="A model name (see `ced models`), an ONNX file, a checkpoint or an experiment.",
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        rich_help_panel=_MODEL, help="float32, or int8: a smaller and faster model whose scores differ slightly."
    ),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private",
        rich_help_panel=_INPUT,
        help="Allow redirects and playlists of addresses to lead to this machine and to local networks.",
    ),
]
ChannelOption = Annotated[
    str,
    typer.Option(
        rich_help_panel=_INPUT,
        metavar="mean|left|right|N|each",
        help="Tag the mean of all channels, one of them (N counts from 1), or each on its own.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", rich_help_panel=_INPUT, help="Refuse truncated files."),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        rich_help_panel=_INPUT,
        metavar="DIR",
        help="Instead of sounds: the folder of a run with --keep-scores, to apply other thresholds, labels or events.",
    ),
]
CORES = cores()
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs",
        "-j",
        min=1,
        rich_help_panel=_MODEL,
        show_default="all cores",
        help="Windows scored at the same time, one thread each.",
    ),
]

DeviceOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="cpu, cuda, coreml, directml or another device that the installed ONNX Runtime can use; cuda:1 for the "
        "second of several; auto: an accelerator if there is one.",
        show_default="cpu",
    ),
]
BatchOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=MOST_BATCH,
        rich_help_panel=_MODEL,
        help="Windows that share a call of the model on an accelerator; not on the CPU.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|ADDRESS",
        rich_help_panel=_CLUSTER,
        help="Process sounds on a Ray cluster, into Parquet parts in the folder --out: auto (the cluster that runs "
        "here or that RAY_ADDRESS names, else one with the cores of this machine), HOST:PORT or ray://HOST:PORT.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        rich_help_panel=_CLUSTER,
        show_default="all cores of the cluster",
        help="With --ray: sounds processed at a time, each on one core, or on one GPU.",
    ),
]

# Windows
_HOP = "Seconds from one window's start to the next, at most the window length."
WindowOption = Annotated[
    float, typer.Option("--window", "-w", rich_help_panel=_WINDOWS, help="Length of a window in seconds, above 0.")
]
Hop = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_WINDOWS,
        help=_HOP,
        show_default="the window length",
    ),
]
Columns = Annotated[
    bool, typer.Option("--columns", rich_help_panel=_WINDOWS, help="Score every 0.16 s instead of whole windows.")
]
TailOption = Annotated[
    Tail,
    typer.Option(
        rich_help_panel=_WINDOWS,
        help="The last window: aligned, of full length and ending with the sound; short, as short as the rest, as in "
        "the published program, but often tagged wrongly.",
    ),
]
LiveHop = Annotated[
    float | None,
    typer.Option(
        "--hop",
        rich_help_panel=_WINDOWS,
        help=_HOP,
    ),
]
Silence = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_WINDOWS,
        help="Do not score windows below this level, in dB of full scale, as -60.",
    ),
]

# Which scores become tags
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        "-k",
        min=1,
        rich_help_panel=_SELECTION,
        help="Most tags of a window.",
        show_default=f"{TOP_K}, with --threshold all",
    ),
]
Threshold = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_SELECTION,
        help="Least probability of a tag, or a file with one for each class (see `ced calibrate`).",
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=_SELECTION, help="Keep only this class, or all classes below this heading; may be repeated."
    ),
]
Exclude = Annotated[
    list[str] | None, typer.Option(rich_help_panel=_SELECTION, help="Leave out this class or heading; may be repeated.")
]
Rollup = Annotated[
    bool,
    typer.Option(
        "--rollup",
        rich_help_panel=_SELECTION,
        help="Raise each class to the highest probability of its descendants, and add the headings.",
    ),
]

# Events
Events = Annotated[
    bool,
    typer.Option(
        "--events",
        rich_help_panel=_EVENTS,
        help=f"Merge windows into events; --threshold is then {EVENT_THRESHOLD} by default.",
    ),
]
Release = Annotated[
    float,
    typer.Option(rich_help_panel=_EVENTS, help="An event continues above this fraction of its threshold."),
]
Gap = Annotated[
    float,
    typer.Option(rich_help_panel=_EVENTS, help="Merge events of a class at most this many seconds apart."),
]
Shortest = Annotated[float, typer.Option(rich_help_panel=_EVENTS, help="Drop events shorter than this many seconds.")]

# Live sound
AddressArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="URL|-",
        help="An http(s) or rtsp stream; -: samples or a WAV file on standard input; default: an input device.",
    ),
]
InputDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        "-d",
        rich_help_panel=_INPUT,
        help="Number or part of the name of an input device.",
        show_default="the default input of the system",
    ),
]
ModelDevice = Annotated[
    str | None,
    typer.Option(
        "--model-device",
        rich_help_panel=_MODEL,
        help="Where the model runs, as --device of `ced tag`: cpu, cuda, coreml, auto and others.",
        show_default="cpu",
    ),
]
ListDevices = Annotated[
    bool,
    typer.Option("--list-devices", rich_help_panel=_INPUT, help="List the input devices of this machine, and exit."),
]
LiveChannel = Annotated[
    str | None,
    typer.Option(
        "--channel",
        rich_help_panel=_INPUT,
        help="mean, left, right, or the number of a channel.",
        show_default="1 of a device, else mean",
    ),
]
PipeRate = Annotated[
    int | None, typer.Option("--rate", rich_help_panel=_INPUT, help="With -: sampling rate of raw samples, in Hz.")
]
PipeChannels = Annotated[
    int | None,
    typer.Option("--channels", rich_help_panel=_INPUT, help="With --rate: number of channels.", show_default="1"),
]
PipeFormat = Annotated[
    str | None,
    typer.Option(
        "--sample-format",
        rich_help_panel=_INPUT,
        help="With --rate: s16le (default), u8, s24le, s32le, f32le and others, also as arecord names them (S16_LE).",
    ),
]
LiveFormat = Annotated[
    str,
    typer.Option(
        "--format",
        "-f",
        rich_help_panel=_OUTPUT,
        help="text: a line when an event begins; jsonl: a line when it begins and one when it ends.",
    ),
]
Exec = Annotated[
    list[str] | None,
    typer.Option(
        "--exec",
        metavar="COMMAND",
        rich_help_panel=_ACTIONS,
        help="Run a command for each event, without a shell, with the event as JSON on standard input and in the "
        "environment ($CED_LABEL and others). May be repeated.",
    ),
]
WebhookOption = Annotated[
    list[str] | None,
    typer.Option(
        "--webhook", metavar="URL", rich_help_panel=_ACTIONS, help="POST each event as JSON. May be repeated."
    ),
]
MqttOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mqtt",
        metavar="URL",
        rich_help_panel=_ACTIONS,
        help="Publish each event as JSON: mqtt://[NAME:PASSWORD@]HOST[:PORT][/TOPIC], or mqtts://. May be repeated.",
    ),
]
On = Annotated[
    Literal["begin", "end", "both"],
    typer.Option(
        "--on", rich_help_panel=_ACTIONS, help="Which reports of an event go to --exec, --webhook and --mqtt."
    ),
]

# Outputs
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        "-f",
        rich_help_panel=_OUTPUT,
        help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} (spreadsheet: CSV without formulas); with --out, may be "
        "repeated.",
        show_default="text",
    ),
]
Clock = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="Add the clock time of each tag to csv, jsonl and parquet: auto (from the file's metadata or name), or "
        "the time at the start of one sound, as 2024-05-01T05:30:00.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        rich_help_panel=_OUTPUT,
        help="Folder for outputs, also at s3://, gs:// or az://; an interrupted run resumes there.",
    ),
]
KeepScores = Annotated[
    bool,
    typer.Option("--keep-scores", rich_help_panel=_OUTPUT, help="With --out: keep the scores of windows for --from."),
]
Clips = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_OUTPUT, metavar="DIR", help="With --events: cut out each event as a file in this folder."
    ),
]
Combine = Annotated[
    bool,
    typer.Option(
        "--combine", rich_help_panel=_OUTPUT, help="With --out: one output of all sounds instead of one for each."
    ),
]
EmbeddingsOut = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        rich_help_panel=_OUTPUT,
        help="NAME.npy (with NAME.npy.tsv beside it) or NAME.parquet, also at s3://, gs:// or az://; with --ray a "
        "folder.",
    ),
]
EachWindow = Annotated[
    bool,
    typer.Option(
        "--windows", rich_help_panel=_OUTPUT, help="Write a vector for each window instead of one for each sound."
    ),
]
