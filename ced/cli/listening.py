"""The command live."""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from ced.cli import options
from ced.cli.console import reporting, show, show_data, show_error
from ced.cli.tagging import with_thresholds
from ced.errors import ConfigError
from ced.model.zoo import DEFAULT_MODEL
from ced.tag.options import LIVE, TagOptions
from ced.text import json_line

if TYPE_CHECKING:
    from ced.sound.live_sources import LiveSource, Samples
    from ced.tag.actions import Action
    from ced.tag.live import Listener, LiveReport

FORMATS = ("text", "jsonl")

logger = logging.getLogger(__name__)


def live(
    address: options.AddressArgument = None,
    device: options.InputDevice = None,
    list_devices: options.ListDevices = False,
    channel: options.LiveChannel = None,
    rate: options.PipeRate = None,
    channels: options.PipeChannels = None,
    sample_format: options.PipeFormat = None,
    model: options.ModelOption = DEFAULT_MODEL,
    precision: options.PrecisionOption = "float32",
    model_device: options.ModelDevice = None,
    window: options.WindowOption = LIVE["window"],
    hop: options.LiveHop = LIVE["hop"],
    silence: options.Silence = None,
    threshold: options.Threshold = str(LIVE["threshold"]),
    labels: options.Labels = None,
    exclude: options.Exclude = None,
    rollup: options.Rollup = False,
    release: options.Release = TagOptions.release,
    gap: options.Gap = LIVE["gap"],
    shortest: options.Shortest = TagOptions.shortest,
    format: options.LiveFormat = "text",
    exec: options.Exec = None,
    webhook: options.WebhookOption = None,
    mqtt: options.MqttOption = None,
    on: options.On = "both",
) -> None:
    """Tag live sound: print events while a microphone, a stream or a recording program delivers it.

    A device or stream that is lost is reopened until it is back. Ctrl-C ends the command.
    """
    if list_devices:
        _print_devices()
        return
    if format.lower() not in FORMATS:
        raise ConfigError(f"unknown live format {format}; allowed: {', '.join(FORMATS)}")
    channel = channel or ("1" if address is None else "mean")
    source = _source(address, device, channel, _samples(address, rate, channels, sample_format))
    found = _actions(exec, webhook, mqtt)
    from ced.model.runtime import open_model
    from ced.tag.actions import Actions
    from ced.tag.live import OPTIONS, Listener
    from ced.tag.tagger import Tagger

    with reporting() as progress:
        graph = open_model(model, precision=precision, threads=options.CORES, device=model_device, progress=progress)
    with Tagger(graph, name=model) as tagger, Actions(found) as actions:
        chosen = replace(
            OPTIONS,
            window=window,
            hop=hop,
            silence=silence,
            labels=tuple(labels or ()),
            exclude=tuple(exclude or ()),
            rollup=rollup,
            release=release,
            gap=gap,
            shortest=shortest,
        )
        listener = Listener(tagger, source, with_thresholds(chosen, threshold, tagger.labels))
        with _stopping(listener) as signals:
            for report in listener.reports():
                event = report.to_json(source.name, model, channel)
                _print(report, event, format.lower())
                if on in ("both", report.state):
                    actions.put(event)
        _end(listener, source, signals)


def _print(report: "LiveReport", event: dict[str, Any], format: str) -> None:
    """Print a report as JSON or, if the event begins, as text."""
    if format == "jsonl":
        show_data(json_line(event) + "\n")
    elif report.state == "begin":
        (tag,) = report.piece.tags
        show(f"{datetime.fromtimestamp(report.time):%H:%M:%S} {tag.label} {tag.prob:.2f}")


def _end(listener: "Listener", source: "LiveSource", signals: list[int]) -> None:
    """Report why listening ended, and exit with the code for it."""
    if listener.left_out:
        logger.warning(
            "%d windows were skipped, because the sound arrived faster than it was scored", listener.left_out
        )
    if signal.SIGINT in signals:
        raise KeyboardInterrupt
    if signal.SIGTERM not in signals and source.endless:
        show_error(f"{source.name} has ended")
        raise typer.Exit(1)


def _source(address: str | None, device: str | None, channel: str, samples: "Samples | None") -> "LiveSource":
    if address is not None and device is not None:
        raise ConfigError(f"--device {device} and {address} cannot be used together; leave one out")
    from ced.sound import live_sources

    if address == "-":
        return live_sources.standard_input(sys.stdin.fileno(), samples, channel)
    if address is not None:
        return live_sources.address(address, channel)
    return live_sources.device(device, channel)


def _samples(
    address: str | None, rate: int | None, channels: int | None, sample_format: str | None
) -> "Samples | None":
    """Return the form of raw samples on standard input; None: it is in a WAV header."""
    given = {"--rate": rate, "--channels": channels, "--sample-format": sample_format}
    named = [option for option, value in given.items() if value is not None]
    if named and address != "-":
        raise ConfigError(f"{named[0]} applies to samples on standard input; give - as the address")
    if rate is None:
        if named:
            raise ConfigError(f"{named[0]} needs --rate, the rate of raw samples in Hz")
        return None
    from ced.sound.live_sources import Samples

    return Samples(rate, 1 if channels is None else channels, sample_format or Samples.format)


def _actions(exec: list[str] | None, webhook: list[str] | None, mqtt: list[str] | None) -> "list[Action]":
    from ced.tag.actions import Command, Mqtt, Webhook

    commands = [Command(line) for line in exec or ()]
    return [*commands, *(Webhook(url) for url in webhook or ()), *(Mqtt(url) for url in mqtt or ())]


@contextmanager
def _stopping(listener: "Listener") -> Iterator[list[int]]:
    """Stop the listener at the first SIGINT or SIGTERM, and the program at the second.

    Yields:
        the signals received so far; the list grows.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        listener.stopped = True
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_devices() -> None:
    from ced.sound.live_sources import devices

    found = devices()
    if not found:
        show_error("this machine has no input device")
        raise typer.Exit(1)
    for each in found:
        channels = "1 channel" if each.channels == 1 else f"{each.channels} channels"
        show(f"{each.index:3} {each.name}, {channels}, {each.rate} Hz{' (default)' if each.default else ''}")
