"""Tagging and embedding on a cluster, with Ray Data: a pool of workers, each a single-threaded tagger on one core.

`tag` and `embed` give a Ray data set. `run` is what `ced tag --ray` and `ced embed --ray` do: it writes Parquet parts
into a folder that all machines see (`ced.tag.parts`), so that a run can be continued. A worker reads sounds in a
process of its own, so a file that crashes a decoder ends that process, not the worker: the file is reported, and the
others are done.
"""

import logging
import multiprocessing
import os
import pickle
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ced import remote
from ced.environment import SWITCHES, cores
from ced.errors import AudioError, CedError, CheckpointError, ConfigError, ProcessError, optional_packages
from ced.model.graph import Precision
from ced.model.zoo import DEFAULT_MODEL
from ced.parallel import attempts
from ced.remote import Listed
from ced.sound import shards
from ced.sound.decode import is_address
from ced.tag import parts, writers
from ced.tag.batch import Summary
from ced.tag.inputs import InputSound, find_inputs, split_channels
from ced.tag.options import BATCH, TagOptions
from ced.tag.parts import FileResult, Part, PartFolder
from ced.tag.tagger import Tagger
from ced.tag.writers import as_utf8

os.environ.update(SWITCHES)

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

AUTO = "auto"  # in place of an address: a cluster that runs here or that RAY_ADDRESS names, else one of this machine
_FILES_AT_ONCE = 16  # of a data set, for one call of a worker
_SECONDS_TO_CONNECT = 10.0
_GROUP = 8  # sounds that a process is sent at once, and that are repeated one by one if one of them crashes it
_SECONDS_TO_BE_LOST = 5.0
_SECONDS_TO_END = 10.0  # from the end of its connection to that of a process


@dataclass(frozen=True)
class Rows:
    """What one sound gives: records or vectors, still as Python objects."""

    found: Sequence[Any]
    seconds: float
    complete: bool


@dataclass(frozen=True)
class Model:
    """A model that each worker opens for itself.

    Attributes:
        name: a name or path, the same on all machines.
        precision, device, batch: as for `Tagger`.
        digest: of its graph on the machine that began the run; None: not compared.
    """

    name: str = DEFAULT_MODEL
    precision: Precision = "float32"
    device: str | None = None
    batch: int = BATCH
    digest: str | None = None

    def __post_init__(self) -> None:
        if os.path.exists(self.name):  # workers have another working directory
            object.__setattr__(self, "name", os.path.abspath(self.name))

    @property
    def on_gpu(self) -> bool:
        """Whether each worker takes a GPU of the cluster."""
        return self.device is not None and self.device.partition(":")[0] in ("cuda", "tensorrt", "migraphx")

    def open(self) -> Tagger:
        """Open the model.

        Raises:
            CheckpointError: it is not the model that the run was begun with.
        """
        tagger = Tagger(self.name, precision=self.precision, device=self.device, batch=self.batch)
        if self.digest is not None and tagger.digest != self.digest:
            raise CheckpointError(
                f"the model {self.name} on machine {platform.node()} is not the one that the run was begun with;"
                " install the same version of ced-audio and the same model on all machines"
            )
        return tagger


@dataclass(frozen=True)
class Tagging:
    """Tags of each sound, with the columns of the Parquet writer.

    Attributes:
        model: what scores.
        options: how sounds are tagged.
        each: tag each channel on its own.
    """

    model: Model = field(default_factory=Model)
    options: TagOptions = field(default_factory=TagOptions)
    each: bool = False
    rows = "tags"

    def process(self, tagger: Tagger, item: InputSound) -> Rows:
        """Tag one sound."""
        records = []
        for one in split_channels([item]) if self.each else [item]:
            options = self.options.of_channel(one.channel)
            records.append(tagger.tag(one.source, options, name=one.name))
        return Rows(records, max(record.seconds for record in records), all(record.complete for record in records))

    def schema(self) -> "pa.Schema":
        """Return the columns of the Parquet writer."""
        return writers.tag_schema(channel=self.each, clock=self.options.clock is not None)

    def tables(self, found: Iterable[Rows]) -> "Iterator[pa.Table]":
        """Yield the rows of the Parquet writer."""
        records = (record for rows in found for record in rows.found)
        return writers.tag_tables(records, channel=self.each, clock=self.options.clock is not None)


@dataclass(frozen=True)
class Embedding:
    """Embeddings of each sound, with the columns of `ced embed --out NAME.parquet`.

    Attributes:
        model: what embeds.
        options: its windows, tail, channel and strictness count.
        windows: a vector for each window, not one for each sound.
        each: embed each channel on its own.
    """

    model: Model = field(default_factory=Model)
    options: TagOptions = field(default_factory=TagOptions)
    windows: bool = False
    each: bool = False
    rows = "vectors"

    def process(self, tagger: Tagger, item: InputSound) -> Rows:
        """Embed one sound."""
        vectors: list[writers.EmbeddingRow] = []
        seconds, complete = 0.0, True
        for one in split_channels([item]) if self.each else [item]:
            options = self.options.of_channel(one.channel)
            found = tagger.embed(one.source, options)
            vectors += writers.embedding_rows(one.name, found, windows=self.windows)
            seconds, complete = max(seconds, found.seconds), complete and found.complete
        return Rows(vectors, seconds, complete)

    def schema(self) -> "pa.Schema":
        """Return the columns of a Parquet file of embeddings."""
        return writers.embedding_schema()

    def tables(self, found: Iterable[Rows]) -> "Iterator[pa.Table]":
        """Yield the rows of a Parquet file of embeddings."""
        return writers.embedding_tables(row for rows in found for row in rows.found)


def tag(
    sounds: "Dataset | Sequence[str | os.PathLike[str]]",
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    options: TagOptions | None = None,
    *,
    precision: Precision = "float32",
    device: str | None = None,
    batch: int = BATCH,
    each_channel: bool = False,
    workers: int | None = None,
) -> "Dataset":
    """Tag sounds on a cluster; the data set is lazy, and tags when it is consumed.

    It has the columns of the Parquet writer, a row for each tag, and `error`: a sound that cannot be read has one row,
    with its name and the reason, and nothing in the other columns.

    Args:
        sounds: files, folders, patterns, lists or addresses, as for `ced tag`; or a data set with the column `path`, of
            paths or addresses, and, as of `ray.data.read_binary_files(..., include_paths=True)`, perhaps `bytes`, the
            content of the files.
        model: a name or path, the same on all machines.
        options: how sounds are tagged; None: the defaults.
        precision: as for `Tagger`.
        device, batch: as for `Tagger`; for "cuda" each worker takes a GPU of the cluster.
        each_channel: tag each channel on its own; a column `channel` tells which.
        workers: sounds processed at a time, each on one core; None: all cores, for a data set less one.

    Raises:
        AudioError: a folder, a pattern or a list holds no sound.
        ConfigError: the cluster has too few cores or GPUs.
        MissingPackageError: Ray is not installed.
        ProcessError: the cluster cannot be reached.
    """
    about = Model(os.fspath(model), precision, device, batch)
    return _dataset(sounds, Tagging(about, options or TagOptions(), each_channel), workers)


def embed(
    sounds: "Dataset | Sequence[str | os.PathLike[str]]",
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    options: TagOptions | None = None,
    *,
    windows: bool = False,
    precision: Precision = "float32",
    device: str | None = None,
    batch: int = BATCH,
    each_channel: bool = False,
    workers: int | None = None,
) -> "Dataset":
    """Embed sounds on a cluster; the data set is lazy.

    It has the columns of a Parquet file of embeddings, and `error`, as for `tag`.

    Args:
        sounds, model, precision, device, batch, each_channel, workers: as for `tag`.
        options: its windows, tail, channel and strictness count; None: the defaults.
        windows: a vector for each window, not one for each sound.

    Raises:
        AudioError, ConfigError, MissingPackageError, ProcessError: as for `tag`.
    """
    about = Model(os.fspath(model), precision, device, batch)
    return _dataset(sounds, Embedding(about, options or TagOptions(), windows, each_channel), workers)


def run(
    inputs: Sequence[InputSound],
    work: Tagging | Embedding,
    out: Path,
    *,
    settings: Mapping[str, Any],
    address: str = AUTO,
    workers: int | None = None,
    finished: Callable[[FileResult], None] = lambda result: None,
) -> Summary:
    """Process sounds on a cluster and write Parquet parts into a folder; what an earlier run has done is not repeated.

    A file is done again when its size or time of change differs, and when it failed. A machine that is lost, or a run
    that is killed, leaves each file with its rows once or without rows.

    Args:
        inputs: files and addresses that all machines see under one path.
        work: what is done with each.
        out: the folder, which all machines see under one path, or the address of one in a store.
        settings: what rows depend on besides the sounds, as JSON has it; a later run must have the same.
        address: of the cluster, HOST:PORT or ray://HOST:PORT; or `AUTO`.
        workers: sounds processed at a time; None: all cores of the cluster.
        finished: called for each file that this run has processed.

    Raises:
        BusyError: another process writes into the folder.
        ConfigError: the folder was begun with other settings, a machine does not see it, two inputs have one name, one
            is no file or address, or the cluster has too few cores or GPUs.
        ProcessError: the cluster cannot be reached, or was lost.
        StoreError: the folder is damaged.
        CedError: a worker raised one that is not about a single sound.
    """
    for item in inputs:
        if not isinstance(item.source, str | os.PathLike):
            raise ConfigError(f"{item.name} cannot be read by other machines; name files, folders or addresses")
    began = time.monotonic()
    folder = PartFolder(out if remote.address_of(out) else Path(os.path.abspath(out)), work.rows)
    with folder.files.claim():
        begun = folder.begin(settings)
        found = folder.settle()
        todo = parts.to_do(inputs, found)
        if again := found.keys() & {as_utf8(item.name) for item in todo}:
            folder.settle(again)
        seconds = 0.0
        if todo:
            connect(address)
            _check_installed()
            size = _Pool.fitting(workers, work.model).size
            planned = _part_dataset(list(parts.plan(todo, size)))
            for result in _written(planned, work, folder, begun, workers):
                seconds += result.seconds
                finished(result)
        found = folder.settle()
        ours = [found[name] for item in inputs if (name := as_utf8(item.name)) in found]
        folder.finish(found.values())
    if len(ours) < len(inputs):
        raise ProcessError(f"{len(inputs) - len(ours)} sounds were not processed; run the same command again")
    failures = sum(bool(result.error) for result in ours)
    incomplete = sum(not result.complete and not result.error for result in ours)
    return Summary(len(inputs), failures, incomplete, len(inputs) - len(todo), seconds, time.monotonic() - began)


def connect(address: str = AUTO, *, silent: bool = False) -> None:
    """Connect to a cluster, unless this process is connected already.

    Args:
        address: HOST:PORT or ray://HOST:PORT; or `AUTO`: the cluster that runs on this machine or that RAY_ADDRESS
            names, else a new one that has the cores of this machine and ends with this process.
        silent: keep Ray's messages and bars from standard error; what fails is raised all the same.

    Raises:
        MissingPackageError: Ray is not installed.
        ProcessError: the cluster cannot be reached.
    """
    ray = _ray()
    if silent:
        ray.data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    where = os.environ.get("RAY_ADDRESS", AUTO) if address == AUTO else address
    if where not in (AUTO, "local"):
        _check_answers(where)
    with _no_stderr() if silent else nullcontext():
        try:
            ray.init(where, log_to_driver=not silent)
        except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and some of its own
            if where != AUTO:
                raise ProcessError(f"no Ray cluster answers at {where}: {_one_line(str(error))}") from error
            try:
                ray.init("local", num_cpus=cores(), include_dashboard=False, log_to_driver=not silent)
            except Exception as fault:
                raise ProcessError(f"Ray cannot be started: {_one_line(str(fault))}") from fault


def _check_answers(address: str) -> None:
    """Make sure that something answers at an address, where Ray would wait for many minutes.

    Raises:
        ProcessError: nothing does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isascii() and port.isdigit()):
        raise ProcessError(
            f"the address of the Ray cluster is {address}; it must be {AUTO}, HOST:PORT or ray://HOST:PORT"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ProcessError(f"no Ray cluster answers at {address}: {error}") from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what Ray's C++ code prints while it starts, and let it print nothing later but fatal errors."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it prints that it has read this
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_installed() -> None:
    """Make sure that all machines of the cluster have this package, without which Ray would start workers for ever.

    Raises:
        ProcessError: one has not.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = _ray()
    importing = ray.remote(import_module)  # what is of this module would need the package to be called
    answers = []
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = importing.options(num_cpus=0, scheduling_strategy=place).remote(__name__)
            answers.append((node["NodeName"], answer))
    for machine, answer in answers:
        try:
            ray.get(answer)
        except ImportError as error:
            reason = _one_line(str(getattr(error, "cause", error)))
            raise ProcessError(
                f"machine {machine} of the Ray cluster cannot import ced ({reason});"
                " install the same version of ced-audio[ray] on all machines"
            ) from error
        except ray.exceptions.RayError:  # a machine that was lost since: its work is done by others
            continue


def _ray() -> Any:
    with optional_packages("tagging on a cluster"):
        import ray
        import ray.data
    return ray


@dataclass(frozen=True)
class _Pool:
    """How many workers there are at most, and what each takes of the cluster."""

    size: int
    gpus: int  # of each worker

    @classmethod
    def fitting(cls, workers: int | None, model: Model, *, reads: bool = False) -> "_Pool":
        """Return the pool that fits the cluster.

        Args:
            workers: how many are asked for; None: as many as fit.
            model: what each opens.
            reads: leave a core to tasks that read a data set: where actors take all cores, Ray waits for ever.

        Raises:
            ConfigError: the cluster cannot run this number of workers, or not even one.
        """
        resources = _ray().cluster_resources()
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        most = min(cpus - reads, gpus) if model.on_gpu else cpus - reads
        has = f"the cluster has {cpus} CPU(s) and {gpus} GPU(s)"
        if workers is not None and workers < 1:
            raise ConfigError(f"workers is {workers}; it must be 1 or more")
        if most < (workers or 1):
            each = "one CPU and one GPU" if model.on_gpu else "one CPU"
            besides = " and one CPU to read the data set" if reads else ""
            raise ConfigError(f"{has}; {workers or 1} worker(s) need {each} each{besides}")
        return cls(workers or most, int(model.on_gpu))

    def map(self, dataset: "Dataset", worker: type, arguments: tuple[Any, ...], files: int) -> "Dataset":
        """Apply a worker to batches of a data set; the pool has fewer workers as long as the cluster is busy."""
        return dataset.map_batches(
            worker,
            batch_size=files,
            batch_format="pyarrow",
            fn_constructor_args=arguments,
            compute=_ray().data.ActorPoolStrategy(min_size=1, max_size=self.size, initial_size=self.size),
            num_cpus=1,
            num_gpus=self.gpus or None,  # lost workers are started again, elsewhere, and their batches repeated
        )


def _dataset(
    sounds: "Dataset | Sequence[str | os.PathLike[str]]", work: "Tagging | Embedding", workers: int | None
) -> "Dataset":
    connect()
    _check_installed()
    ray = _ray()
    if isinstance(sounds, ray.data.Dataset):
        reads = True
        columns = sounds.schema().names
        if "path" not in columns:
            raise ConfigError(
                f"the data set has the columns {', '.join(columns)}; it must have path, and may have bytes"
            )
    else:
        import pyarrow as pa

        inputs = find_inputs([os.fspath(sound) for sound in sounds])
        pool = _Pool.fitting(workers, work.model)
        table = pa.table({"path": [_source(item) for item in inputs], "name": [as_utf8(item.name) for item in inputs]})
        blocks = min(len(inputs), max(8 * pool.size, len(inputs) // _FILES_AT_ONCE))
        sounds, reads = ray.data.from_arrow(_split(table, blocks)), False
    return _Pool.fitting(workers, work.model, reads=reads).map(sounds, _RowWorker, (work,), _FILES_AT_ONCE)


def _split(table: "pa.Table", blocks: int) -> "list[pa.Table]":
    size = -(-len(table) // blocks)
    return [table.slice(start, size) for start in range(0, len(table), size)]


def _part_dataset(planned: Sequence[Part]) -> "Dataset":
    """Return a data set with a row for each part, which needs no task to be read."""
    import pyarrow as pa

    return _ray().data.from_arrow([pa.table({"part": [pickle.dumps(_shared(part))]}) for part in planned])


def _shared(part: Part) -> Part:
    """Return a part whose files have the paths that other machines see, too."""
    inputs = tuple(InputSound(item.name, _source(item), item.place, item.channel) for item in part.inputs)
    return Part(inputs, part.stamps)


def _source(item: InputSound) -> str:
    """Return the address or whole path of an input."""
    assert isinstance(item.source, str | os.PathLike)
    source = os.fspath(item.source)
    if is_address(source) or remote.address_of(source) is not None:
        return source
    shard, member = shards.split_member(source) or (source, None)
    path = os.path.abspath(shard)
    if member is None:
        return path
    return Listed(f"{path}!{member}", source.stamp if isinstance(source, Listed) else None)


def _written(
    planned: "Dataset", work: Tagging | Embedding, folder: PartFolder, begun: str, workers: int | None
) -> Iterator[FileResult]:
    """Yield what became of each file, as parts are done."""
    ray = _ray()
    pool = _Pool.fitting(workers, work.model)
    done = pool.map(planned, _PartWorker, (work, folder, begun), 1)
    try:
        for row in done.iter_rows():
            answer = pickle.loads(row["answer"])
            if isinstance(answer, CedError):
                raise answer
            yield from answer
    except ray.exceptions.RayError as error:
        raise ProcessError(f"the Ray cluster failed: {_one_line(str(error))}") from error


class _RowWorker:
    """A worker of a data set: batches of sounds to rows."""

    def __init__(self, work: "Tagging | Embedding") -> None:
        self._work, self._reader = work, _Reader(work)

    def __call__(self, batch: "pa.Table") -> "Iterator[pa.Table]":
        import pyarrow as pa

        schema = self._work.schema().append(pa.field("error", pa.string()))
        items = [_row_input(row) for row in batch.to_pylist()]
        for item, answer in zip(items, self._reader.read(items), strict=True):
            if isinstance(answer, AudioError):
                failure = {"file": as_utf8(item.name), "error": _one_line(answer.message)}
                yield pa.Table.from_pylist([failure], schema=schema)
                continue
            for table in self._work.tables([answer]):
                yield pa.Table.from_arrays([*table.columns, pa.nulls(len(table), pa.string())], schema=schema)


def _row_input(row: Mapping[str, Any]) -> InputSound:
    name = row.get("name") or row["path"]
    return InputSound(name, row["path"] if row.get("bytes") is None else row["bytes"], name)


class _PartWorker:
    """A worker of a run: parts to files in its folder, and what became of each sound."""

    def __init__(self, work: "Tagging | Embedding", folder: PartFolder, begun: str) -> None:
        self._work, self._folder, self._begun = work, folder, begun
        self._reader = _Reader(work)

    def __call__(self, batch: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        (part,) = batch["part"].to_pylist()
        answer: list[FileResult] | CedError
        try:
            answer = self._write(pickle.loads(part))
        except CedError as error:
            answer = error
        return pa.table({"answer": [pickle.dumps(answer)]})

    def _write(self, part: Part) -> list[FileResult]:
        self._folder.check(self._begun, platform.node())
        done = self._folder.result_of(part.name)
        if done is not None and not any(result.error for result in done):  # by a worker that was lost since
            return done
        rows: list[Rows] = []
        found: list[FileResult] = []
        for item, stamp, answer in zip(part.inputs, part.stamps, self._reader.read(part.inputs), strict=True):
            name = as_utf8(item.name)
            if isinstance(answer, AudioError):
                found.append(FileResult(name, 0.0, False, _one_line(answer.message), stamp))
            else:
                rows.append(answer)
                found.append(FileResult(name, answer.seconds, answer.complete, None, stamp))
        self._folder.write(part.name, self._work.schema(), self._work.tables(rows), found)
        return found


class _Reader:
    """Processes sounds in a process of its own, which is replaced when a sound crashes it."""

    def __init__(self, work: "Tagging | Embedding") -> None:
        self._work = work
        self._at_once = _GROUP if work.model.device in (None, "cpu") else 4 * work.model.batch  # sounds
        self._process: Any = None
        self._connection: Connection | None = None

    def read(self, items: Sequence[InputSound]) -> Iterator[Rows | AudioError]:
        """Yield the rows of each sound, or why it has none.

        Raises:
            CedError: the work raised one that is not about a single sound.
        """
        for start in range(0, len(items), self._at_once):
            group = items[start : start + self._at_once]
            try:
                yield from self._ask(group)
            except _ProcessEndedError:
                yield from map(self._alone, group)

    def _alone(self, item: InputSound) -> Rows | AudioError:
        """Process a sound again after it, or another of its group, has ended the process."""
        try:
            return self._ask([item])[0]
        except _ProcessEndedError as error:
            return AudioError(f"the process that read it ended, twice: {error}", item.name)

    def _ask(self, group: Sequence[InputSound]) -> list[Rows | AudioError]:
        connection = self._connection or self._start()
        try:
            connection.send(group)
            answer = connection.recv()
        except (EOFError, OSError):
            ended = self._end()
            # When its machine is lost, a worker ends too, but after the processes that it has started.
            time.sleep(_SECONDS_TO_BE_LOST)
            raise _ProcessEndedError(ended) from None
        if isinstance(answer, CedError):
            raise answer
        found: list[Rows | AudioError] = answer
        return found

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # this process has threads, which a fork would break
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._work), daemon=True)
        self._process.start()
        other.close()
        return self._connection

    def _end(self) -> str:
        """Take leave of a process that has ended, and return how it did."""
        assert self._connection is not None
        self._connection.close()
        self._connection = None
        self._process.join(_SECONDS_TO_END)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        with suppress(ValueError):
            return signal.Signals(-code).name
        return f"exit code {code}"


class _ProcessEndedError(Exception):
    """The process that reads sounds has ended; the message is its signal or exit code."""


def _serve(connection: Connection, work: "Tagging | Embedding") -> None:
    """Answer for one group of sounds after the other, until the worker is gone."""
    tagger: Tagger | None = None
    while True:
        try:
            group = connection.recv()
        except (EOFError, OSError):
            return
        answer: list[Rows | AudioError] | CedError
        try:
            tagger = tagger or work.model.open()
            answer = list(attempts(partial(_process, work, tagger), group, tagger.jobs, name=_name))
        except CedError as error:
            answer = error
        with suppress(OSError):
            connection.send(answer)


def _process(work: "Tagging | Embedding", tagger: Tagger, item: InputSound) -> Rows:
    try:
        return work.process(tagger, item)
    except AudioError as error:  # of a path that is longer than the name, or of bytes, which have none
        raise error if error.name is None else AudioError(error.reason, item.name, hint=error.hint) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _name(item: InputSound) -> str:
    return item.name
