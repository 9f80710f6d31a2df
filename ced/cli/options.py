"""Options of the commands that hear sounds: what they are called, and what --help says of them."""

from pathlib import Path
from typing import Annotated

import typer

from ced.tag.defaults import EVENT_THRESHOLD, TOP_K

Sounds = Annotated[
    list[str],
    typer.Argument(
        metavar="SOUND...",
        help="Files, folders, patterns, http(s) addresses, @LIST (a path a line; @-: on standard input), or - (a sound "
        "on standard input).",
    ),
]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A model name (see `ced models`), an ONNX file, a checkpoint or an experiment."),
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Windows scored at a time, a thread each; default: all cores.")
]

# Windows
Window = Annotated[float, typer.Option("--chunk", "-c", "--window", help="Seconds of a window, above 0.")]
Hop = Annotated[
    float | None, typer.Option(help="Seconds from one window to the next; default: windows lie end to end.")
]
Columns = Annotated[bool, typer.Option("--columns", help="Score every 0.16 s instead of whole windows.")]
LiveWindow = Annotated[float, typer.Option("--window", "-c", help="Seconds of a window, above 0.")]
LiveHop = Annotated[float, typer.Option(help="Seconds from one window to the next, at most a window.")]
Silence = Annotated[
    float | None, typer.Option(help="Windows below this level are not scored, in dB of full scale, as -60.")
]

# What is kept of their scores
TopK = Annotated[
    int | None,
    typer.Option("--topk", "-k", min=1, help=f"Most classes of a window; default: {TOP_K}, with --threshold all."),
]
Threshold = Annotated[
    str | None, typer.Option(help="Least probability, or a file with one a class (see `ced calibrate`).")
]
Labels = Annotated[list[str] | None, typer.Option(help="Only this class, or all below this heading; may be repeated.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Not this class or heading; may be repeated.")]
Rollup = Annotated[
    bool, typer.Option("--rollup", help="Give classes the highest probability of their kinds, and add headings.")
]

# Events
Events = Annotated[
    bool, typer.Option("--events", help=f"Merge windows into events; threshold {EVENT_THRESHOLD} unless given.")
]
Release = Annotated[float, typer.Option(help="With --events: part of the threshold that keeps one going.")]
Gap = Annotated[float, typer.Option(help="With --events: those so many seconds apart become one.")]
Shortest = Annotated[float, typer.Option(help="With --events: shorter ones are dropped, in seconds.")]

# Live sound
Address = Annotated[
    str | None, typer.Argument(metavar="[URL]", help="An http(s) stream to listen to; default: an input device.")
]
InputDevice = Annotated[
    str | None,
    typer.Option("--device", "-d", help="Number or part of the name of an input; default: the system's own choice."),
]
ListDevices = Annotated[bool, typer.Option("--list-devices", help="Show the inputs of this machine, and end.")]
LiveThreshold = Annotated[
    str, typer.Option("--threshold", help="Probability that begins an event, or a file with one a class.")
]
LiveRelease = Annotated[float, typer.Option("--release", help="Part of the threshold that keeps an event going.")]
LiveGap = Annotated[float, typer.Option("--gap", help="Events of a class so many seconds apart are one.")]
LiveShortest = Annotated[float, typer.Option("--shortest", help="Shorter events are not reported, in seconds.")]
LiveFormat = Annotated[
    str,
    typer.Option("--format", "-f", help="text: a line when an event begins; jsonl: one then, and one when it is over."),
]

# Outputs
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", "-f", help="text, jsonl, csv, audacity, raven, parquet; with --out several."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for outputs; an interrupted run goes on there.")]
Combine = Annotated[bool, typer.Option("--combine", help="With --out: one output of all sounds.")]
EmbeddingsOut = Annotated[
    Path, typer.Option("--out", "-o", help="NAME.npy (with NAME.npy.tsv beside it) or NAME.parquet.")
]
EachWindow = Annotated[bool, typer.Option("--windows", help="A vector a window, not one a sound.")]
