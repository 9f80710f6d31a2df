"""The command that listens: live."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

import typer

from ced.cli import options
from ced.cli.console import complain, reporting
from ced.cli.tagging import thresholds
from ced.errors import ConfigError
from ced.machine import cores
from ced.tag.options import EVENT_THRESHOLD

if TYPE_CHECKING:
    from ced.sound.live import LiveSource
    from ced.tag.live import Listener, Report

FORMATS = ("text", "jsonl")

_log = logging.getLogger(__name__)


def live(
    address: options.Address = None,
    device: options.InputDevice = None,
    list_devices: options.ListDevices = False,
    model: options.Model = "ced_mini",
    window: options.LiveWindow = 1.5,
    hop: options.LiveHop = 0.25,
    threshold: options.LiveThreshold = str(EVENT_THRESHOLD),
    labels: options.Labels = None,
    exclude: options.Exclude = None,
    rollup: options.Rollup = False,
    release: options.LiveRelease = 0.5,
    gap: options.LiveGap = 2.0,
    shortest: options.LiveShortest = 0.0,
    silence: options.Silence = None,
    format: options.LiveFormat = "text",
) -> None:
    """Listen to a microphone or a stream, and say what is heard while it is heard.

    A source that is lost is opened again until it is back. Ctrl-C ends it.
    """
    if list_devices:
        _print_devices()
        return
    if format not in FORMATS:
        raise ConfigError(f"there is no live format {format}; allowed: {', '.join(FORMATS)}")
    source = _source(address, device)
    from ced.model.runtime import open_model
    from ced.tag.live import OPTIONS, Listener
    from ced.tag.tagger import Tagger

    with reporting() as progress:
        graph = open_model(model, threads=cores(), progress=progress)
    with Tagger(graph, name=model) as tagger:
        settings = replace(
            OPTIONS,
            window=window,
            hop=hop,
            silence=silence,
            thresholds=thresholds(threshold, tagger.labels),
            only=tuple(labels or ()),
            exclude=tuple(exclude or ()),
            rollup=rollup,
            release=release,
            gap=gap,
            shortest=shortest,
        )
        listener = Listener(tagger, source, settings)
        with _stopping(listener) as signals:
            for report in listener.reports():
                if format == "jsonl":
                    print(json.dumps(report.to_json(source.name, model), ensure_ascii=False), flush=True)
                elif report.state == "begin":
                    print(_line(report), flush=True)
    if listener.left_out:
        _log.warning("%d windows were left out, as sound came faster than it was scored", listener.left_out)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt
    if signal.SIGTERM not in signals:
        complain(f"{source.name} has ended")
        raise typer.Exit(1)


def _source(address: str | None, device: str | None) -> "LiveSource":
    if address is None:
        from ced.sound import device as inputs

        return inputs.device(device)
    if device is not None:
        raise ConfigError(f"--device {device} and {address} cannot both be listened to; leave one out")
    from ced.sound import live as streams

    return streams.address(address)


@contextmanager
def _stopping(listener: "Listener") -> Iterator[list[int]]:
    """Let the listener end in order when the program is asked to stop, and at once when it is asked again.

    Gives the signals that came, in a list that they are added to.
    """
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        listener.stopped = True
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _line(report: "Report") -> str:
    (tag,) = report.piece.tags
    return f"{datetime.fromtimestamp(report.time):%H:%M:%S} {tag.label} {tag.prob:.2f}"


def _print_devices() -> None:
    from ced.sound.device import devices

    found = devices()
    if not found:
        complain("this machine has no input device")
        raise typer.Exit(1)
    for each in found:
        channels = "1 channel" if each.channels == 1 else f"{each.channels} channels"
        print(f"{each.index:3} {each.name}, {channels}, {each.rate} Hz{' (default)' if each.default else ''}")
