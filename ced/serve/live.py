"""Live sound over a WebSocket: receive PCM, send events and the scores of each window."""

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import WebSocket
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.websockets import WebSocketDisconnect, WebSocketState

import ced
from ced.errors import CedError, ConfigError
from ced.serve.answers import encode_scores
from ced.serve.schema import LIVE_PROTOCOL, LiveOptions, check_repeated, describe_errors
from ced.serve.service import Service
from ced.sound.audio import SAMPLE_RATE, Window
from ced.tag.live import LULL, LiveEvents, LiveReport
from ced.tag.records import Scored

LARGEST_FRAME = 1 << 16  # bytes: two seconds
NAME = "live"  # name of the sound in records
_WAITING = 1.0  # seconds of windows that may wait to be scored; newer ones then replace the oldest
_IDLE = 60.0  # seconds without any sound after which a connection is closed
_BURST, _FASTEST = 30.0, 2.0  # seconds of sound that may arrive at any rate; then the largest multiple of real time
_SEND_SECONDS = 10.0  # in which a client must accept a message
_TICK = 0.5  # seconds between checks for events that end when no sound arrives
_LOWEST_LEVEL = -120.0  # dB of full scale


def parse_options(query: QueryParams) -> LiveOptions:
    """Return the options of a connection.

    Raises:
        ConfigError: they are unknown or out of range.
    """
    check_repeated(name for name, _ in query.multi_items())
    lists = ("labels", "exclude")
    given = {name: query.getlist(name) if name in lists else value for name, value in query.items()}
    try:
        return LiveOptions.model_validate(given)
    except ValidationError as error:
        raise ConfigError(describe_errors(error.errors())) from error


@dataclass(frozen=True, eq=False)
class _Arrival:
    window: Window
    clock: float  # seconds as of time.time(), when its last sample arrived
    level: float  # of the newest part of the window, one hop long, in dB of full scale


class _Cutter:
    """Cuts PCM into windows as it arrives; at most a second of windows waits, then new ones replace the oldest."""

    def __init__(self, length: float, hop: float) -> None:
        self._size, self._step = round(length * SAMPLE_RATE), round(hop * SAMPLE_RATE)
        self._buffer = np.zeros(0, np.float32)
        self._first = 0  # position of the buffer in the sound, in samples
        self.waiting: deque[_Arrival] = deque(maxlen=max(2, round(_WAITING / hop)))
        self.dropped = 0

    @property
    def seconds(self) -> float:
        """Seconds of sound that have arrived."""
        return (self._first + len(self._buffer)) / SAMPLE_RATE

    def add(self, data: bytes) -> None:
        """Add 16-bit little-endian samples."""
        wave = np.frombuffer(data, "<i2").astype(np.float32) / 32_768
        self._buffer = np.concatenate((self._buffer, wave))
        while len(self._buffer) >= self._size:
            start, self._first = self._first / SAMPLE_RATE, self._first + self._step
            window = Window(start, start + self._size / SAMPLE_RATE, self._buffer[: self._size])
            self.dropped += len(self.waiting) == self.waiting.maxlen
            self.waiting.append(_Arrival(window, time.time(), _level(window.wave[-self._step :])))
            self._buffer = self._buffer[self._step :]


class LiveSession:
    """One live connection, from its first message to its last.

    A slow client delays no other one: while it does not accept a message, its new windows are dropped, and after some
    seconds its connection is closed.

    Args:
        socket: the connection, not accepted yet.
        service: scores windows in turns with all other requests.
    """

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket, self._service = socket, service
        self._changed = asyncio.Event()
        self._ending: tuple[int, str] | None = None  # WebSocket close code, and the error, if any

    def stop(self, code: int = 1001, fault: str = "") -> None:
        """End the session after the windows that have arrived."""
        if self._ending is None:
            self._ending = code, fault
        self._changed.set()

    async def run(self) -> None:
        """Accept the connection, and send events until either side ends it."""
        asked = self._socket.scope.get("subprotocols", [])
        await self._socket.accept(LIVE_PROTOCOL if LIVE_PROTOCOL in asked else None)
        try:
            await self._tag()
        except CedError as error:
            await self._end(1008, str(error))
        except (WebSocketDisconnect, TimeoutError):  # the client disconnected, or accepts no messages
            pass

    async def _tag(self) -> None:
        options, scorer = parse_options(self._socket.query_params), self._service.scorer
        tagging = options.tag_options()
        scorer.check(tagging)
        events = LiveEvents(scorer.labels, tagging)
        cutter = _Cutter(options.window, options.hop)
        await self._send(
            type="begin",
            version=ced.__version__,
            model=self._service.name,
            classes=len(scorer.labels),
            rate=SAMPLE_RATE,
            window=options.window,
            hop=options.hop,
        )
        receiver = asyncio.create_task(self._receive(cutter))
        dropped, last, seen = 0, 0.0, time.monotonic()
        try:
            while cutter.waiting or self._ending is None:
                if cutter.waiting:
                    arrival = cutter.waiting.popleft()
                    last, seen = arrival.window.end, time.monotonic()
                    (scored,) = await self._service.scheduler.run(scorer.score, arrival.window, tagging)
                    await self._send_window(arrival, scored, options.scores)
                    await self._report(events.add(scored, arrival.clock))
                    if cutter.dropped > dropped:
                        dropped = cutter.dropped
                        await self._send(type="dropped", windows=dropped)
                    continue
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), _TICK)
                except TimeoutError:
                    await self._report(events.pass_to(last + time.monotonic() - seen - LULL))
                    if time.monotonic() - seen > _IDLE + options.window:
                        self.stop(1008, f"no sound arrived for {_IDLE:g} s")
            await self._report(events.finish())
            code, fault = self._ending or (1000, "")
            await self._end(code, fault, cutter.seconds)
        finally:
            receiver.cancel()

    async def _receive(self, cutter: _Cutter) -> None:
        """Receive messages until the client ends the session."""
        began = time.monotonic()
        while self._ending is None:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                self.stop(message.get("code") or 1005)
            elif (data := message.get("bytes")) is not None:
                if len(data) % 2:
                    self.stop(1007, f"a frame has {len(data)} bytes; 16-bit samples need an even number")
                else:
                    cutter.add(data)
                    self._changed.set()
                    if cutter.seconds > _BURST + _FASTEST * (time.monotonic() - began):
                        self.stop(1008, f"sound arrives more than {_FASTEST:g} times as fast as it is recorded")
            elif message.get("text") == "stop":
                self.stop(1000)
            else:
                self.stop(1007, "a text message is not understood; send binary frames of samples, or the text stop")

    async def _send_window(self, arrival: _Arrival, scored: Scored, scores: bool) -> None:
        line: dict[str, Any] = {"type": "window", "start": round(scored.start, 3), "end": round(scored.end, 3)}
        line |= {"level": round(arrival.level, 1), "silent": scored.silent}
        if scores:
            line["scores"] = encode_scores([scored])
        await self._send(**line)

    async def _report(self, reports: Iterable[LiveReport]) -> None:
        for report in reports:
            await self._send(type="event", **report.to_json(NAME, self._service.name))

    async def _end(self, code: int, fault: str = "", seconds: float = 0.0) -> None:
        if self._socket.client_state is not WebSocketState.CONNECTED:
            return
        if fault:
            await self._send(type="error", error=" ".join(fault.split()))
        else:
            await self._send(type="end", seconds=round(seconds, 3))
        await self._socket.close(code)

    async def _send(self, **message: Any) -> None:
        async with asyncio.timeout(_SEND_SECONDS):
            await self._socket.send_text(json.dumps(message, ensure_ascii=False, allow_nan=False))


def _level(wave: NDArray[np.float32]) -> float:
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    return max(_LOWEST_LEVEL, 10.0 * math.log10(power)) if power > 0 else _LOWEST_LEVEL
