"""Actions for the events of live sound: run a command, call a webhook, publish an MQTT message.

Each action has a thread and a queue of its own, so a slow command or an unreachable server never delays listening.
"""

import base64
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from ced.errors import ConfigError, optional_packages
from ced.sound.web import without_password
from ced.text import json_line

EventJson = Mapping[str, Any]  # the value of `LiveReport.to_json`

WAITING = 1000  # length of the queue of an action; the oldest events are dropped
COMMAND_SECONDS = 60.0  # time limit of a command, after which it is killed
REQUEST_SECONDS = 10.0  # time limit of a request
RETRIES = (1.0, 4.0, 15.0)  # seconds before each retry
CLOSE_SECONDS = 10.0  # time limit of the events that still wait at the end
_GLANCE = 0.5  # seconds between two checks of a worker whether to end
_MOST_REASONS = 100  # warnings that are remembered, to avoid repeating them
_QUIET_SECONDS = 60.0  # between two equal warnings of one action
_LONGEST_VARIABLE = 10_000  # characters; systems allow 128 kB
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # status codes after which a retry may succeed
_MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_MQTT_TOPIC = "ced/events"
_QOS = 1  # the broker confirms each message

logger = logging.getLogger(__name__)


class Action(Protocol):
    """Something to do with each event.

    Attributes:
        name: its name in messages, without passwords.
    """

    name: str

    def run(self, event: EventJson, closing: threading.Event) -> None:
        """Deal with one event; called by one thread. `closing` is set shortly before the end.

        Raises:
            _ActionError: it failed; the message is the reason.
        """

    def close(self) -> None:
        """Release its resources; called once, after the last event."""


class _ActionError(Exception):
    """An action failed for an event."""


class Actions:
    """Passes events to actions, each in a thread of its own.

    Args:
        actions: what to do with each event.
    """

    def __init__(self, actions: Sequence[Action]) -> None:
        self._workers = [_Worker(action) for action in actions]

    def __enter__(self) -> "Actions":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, event: EventJson) -> None:
        """Queue an event for all actions, without waiting."""
        for worker in self._workers:
            worker.put(event)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """End the actions; events that wait have at most this many seconds."""
        deadline = time.monotonic() + seconds
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.join(deadline)


class _Worker:
    def __init__(self, action: Action) -> None:
        self._action = action
        self._waiting: queue.Queue[EventJson | None] = queue.Queue(WAITING)
        self._closing = threading.Event()
        self._given = 0  # events, counted by the calling thread
        self._delivered = 0  # events, counted by the worker's own thread
        self._warned: dict[str, float] = {}  # time of the last warning with each reason
        self._thread = threading.Thread(target=self._work, name=action.name, daemon=True)
        self._thread.start()

    def put(self, event: EventJson) -> None:
        self._given += 1
        while True:
            try:
                self._waiting.put_nowait(event)
                return
            except queue.Full:
                with suppress(queue.Empty):
                    self._waiting.get_nowait()
                self._warn("events arrive faster than they are handled; the oldest are dropped")

    def end(self) -> None:
        self._closing.set()
        with suppress(queue.Full):  # then the worker notices `_closing`
            self._waiting.put_nowait(None)

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if missing := self._given - self._delivered:
            logger.warning("%s: %d of %d events were not delivered", self._action.name, missing, self._given)

    def _work(self) -> None:
        while True:
            try:
                event = self._waiting.get(timeout=_GLANCE)
            except queue.Empty:
                if self._closing.is_set():
                    break
                continue
            if event is None:
                break
            try:
                self._action.run(event, self._closing)
            except _ActionError as error:
                self._warn(str(error))
            except Exception as error:  # an unexpected error must not stop the other events
                self._warn(f"{type(error).__name__}: {error}")
            else:
                self._delivered += 1
        self._action.close()

    def _warn(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._warned.get(reason, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            self._warned = {reason: now} if len(self._warned) > _MOST_REASONS else {**self._warned, reason: now}
            logger.warning("%s: %s", self._action.name, reason)


class Command:
    """Runs a command for each event, with the event as JSON on standard input and as environment variables.

    No shell is involved: labels and file names are never a part of the command line. The output of the command goes to
    standard error, because standard output is for results.

    Args:
        line: the command with its arguments, quoted as for a shell.

    Raises:
        ConfigError: the command is not found, or the quotes do not match.
    """

    def __init__(self, line: str) -> None:
        try:
            self._words = shlex.split(line, posix=os.name != "nt")
        except ValueError as error:
            raise ConfigError(f"cannot parse the command {line!r}: {error}") from error
        if not self._words or shutil.which(self._words[0]) is None:
            raise ConfigError(f"command not found: {self._words[0] if self._words else repr(line)}")
        self.name = f"command {self._words[0]}"

    def run(self, event: EventJson, closing: threading.Event) -> None:
        """Run the command, and wait for it."""
        try:
            process = subprocess.Popen(
                self._words,
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno() if _has_number(sys.stderr) else subprocess.DEVNULL,
                env={**os.environ, **variables(event)},
                start_new_session=True,  # to kill its child processes as well, and to keep Ctrl-C from it
            )
        except OSError as error:
            raise _ActionError(error.strerror or str(error)) from error
        try:
            process.communicate(json_line(event).encode() + b"\n", timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired as error:
            _kill(process)
            raise _ActionError(f"killed, because it took longer than {COMMAND_SECONDS:g} s") from error
        except OSError:  # it ended without reading its input
            process.wait()
        if process.returncode:
            raise _ActionError(f"exit code {process.returncode}")

    def close(self) -> None:
        """Do nothing: there are no resources to release."""


def _has_number(stream: Any) -> bool:
    try:
        return isinstance(stream.fileno(), int)
    except (OSError, ValueError, AttributeError):
        return False


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def variables(event: EventJson) -> dict[str, str]:
    """Return an event as environment variables: CED_STATE, CED_EVENT, CED_LABEL, CED_PROB, CED_TIME, ..."""
    (piece,) = event["pieces"]
    (tag,) = piece["tags"]
    values = {
        "STATE": event["state"],
        "EVENT": event["event"],
        "TIME": event["time"],
        "LABEL": tag["label"],
        "MID": tag["mid"] or "",
        "PROB": f"{tag['prob']:.4f}",
        "START": piece["start"],
        "END": piece["end"],
        "SOURCE": event["file"],
        "MODEL": event["model"],
    }
    return {f"CED_{name}": str(value).replace("\0", "")[:_LONGEST_VARIABLE] for name, value in values.items()}


class Webhook:
    """Sends each event as a POST request with JSON, with a few retries.

    Redirects are not followed. A name and a password in the address are sent as HTTP Basic authentication.

    Args:
        address: http or https.

    Raises:
        ConfigError: the address is not valid.
    """

    def __init__(self, address: str) -> None:
        parts = _split(address, {"http": 80, "https": 443}, "a webhook")
        self._address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self.name = f"webhook {parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # paths and queries may hold tokens
        self._headers = {"Content-Type": "application/json", "User-Agent": "ced"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def run(self, event: EventJson, closing: threading.Event) -> None:
        """Send the event."""
        data = json_line(event).encode()
        for delay in (*RETRIES, None):
            reason, again = self._send(data)
            if reason is None:
                return
            if not again or delay is None or closing.wait(delay):
                raise _ActionError(reason)

    def _send(self, data: bytes) -> tuple[str | None, bool]:
        """Return the reason why the event was not accepted (None: it was), and whether to retry."""
        request = urllib.request.Request(self._address, data, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=REQUEST_SECONDS) as response:
                response.read(1 << 16)
            return None, False
        except urllib.error.HTTPError as error:
            error.close()
            return f"the server answered {error.code} {error.reason}", error.code in _AGAIN
        except (OSError, HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)
            what = f"no answer within {REQUEST_SECONDS:g} s" if isinstance(cause, TimeoutError) else str(cause)
            return what or type(error).__name__, True

    def close(self) -> None:
        """Do nothing: there are no resources to release."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class Mqtt:
    """Publishes each event as JSON to an MQTT broker (3.1.1) with confirmation; reconnects to a lost broker.

    Args:
        address: mqtt://[NAME:PASSWORD@]HOST[:PORT][/TOPIC], or mqtts:// for TLS. Default: port 1883 or 8883, topic
            ced/events.

    Raises:
        ConfigError: the address is not valid.
        MissingPackageError: paho-mqtt is not installed.
    """

    def __init__(self, address: str) -> None:
        with optional_packages("sending events to an MQTT broker"):
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        parts = _split(address, _MQTT_PORTS, "an MQTT broker")
        self._topic = unquote(parts.path.strip("/")) or _MQTT_TOPIC
        if set(self._topic) & set("+#\0") or "#" in address:
            raise ConfigError(f"the topic of {without_password(address)} has + or #, which only subscriptions allow")
        port = parts.port or _MQTT_PORTS[parts.scheme]
        self.name = f"MQTT broker {parts.hostname}"
        self._closed, self._problem = False, ""
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.max_queued_messages_set(WAITING)
        if parts.username is not None:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or "") or None)
        if parts.scheme == "mqtts":
            self._client.tls_set()
        self._confirmed: set[int] = set()  # by message numbers
        self._client.on_publish = lambda *words: self._confirmed.add(words[2])
        self._client.reconnect_delay_set(1, 30)
        self._client.on_connect = self._connected
        self._client.on_connect_fail = lambda *_: self._lost("cannot be reached")
        self._client.on_disconnect = lambda *words: None if self._closed else self._lost("the connection was lost")
        try:
            self._client.connect_async(parts.hostname or "", port)
        except ValueError as error:
            raise ConfigError(f"cannot connect to {without_password(address)}: {error}") from error
        self._client.loop_start()

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._lost(str(reason))
        else:
            self._problem = ""

    def _lost(self, why: str) -> None:
        if why != self._problem:
            logger.warning("%s: %s; retrying until it is back", self.name, why)
        self._problem = why

    def run(self, event: EventJson, closing: threading.Event) -> None:
        """Publish the event, and wait for the confirmation of the broker."""
        number = self._client.publish(self._topic, json_line(event).encode(), _QOS).mid
        while number not in self._confirmed:  # the client queues it until there is a connection
            if closing.is_set() and self._problem:
                raise _ActionError("it is not connected")
            time.sleep(0.01)
        self._confirmed.discard(number)

    def close(self) -> None:
        """Disconnect."""
        self._closed = True
        self._client.disconnect()
        self._client.loop_stop()


def _split(address: str, schemes: Mapping[str, int], what: str) -> SplitResult:
    allowed = " or ".join(f"{scheme}://" for scheme in schemes)
    try:
        parts = urlsplit(address)
        known = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are not closed, a port that is not a number
        known = False
    if not known:
        given = without_password(address)
        raise ConfigError(f"the address of {what} is {given}; it must begin with {allowed} and a host name")
    return parts
