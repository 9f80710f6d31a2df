"""What the commands tag and embed do with --ray: sounds are processed on a cluster, into a folder of Parquet parts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ced.cli.console import show, show_error
from ced.cli.options import CORES
from ced.errors import ConfigError
from ced.progress import Meter, Progress, speed
from ced.tag.options import EACH, TagOptions

if TYPE_CHECKING:
    from ced.integrations.ray import Embedding, Model, Tagging
    from ced.model.graph import Precision
    from ced.tag.inputs import InputSound
    from ced.tag.parts import FileResult
    from ced.tag.tagger import Tagger


@dataclass(frozen=True)
class Cluster:
    """A cluster, and the folder that its machines write into."""

    address: str
    out: Path
    workers: int | None

    @classmethod
    def chosen(
        cls, address: str | None, out: Path | None, workers: int | None, jobs: int, others: Mapping[str, Any]
    ) -> "Cluster":
        """Return the cluster that --ray names.

        Args:
            address, out, workers, jobs: the options --ray, --out, --workers and --jobs.
            others: options that do not go together with --ray, and what is given for them.
        """
        if address is None:
            raise ConfigError("--workers is the number of workers of a cluster; name that with --ray, or use --jobs")
        if jobs != CORES:
            raise ConfigError(f"--jobs {jobs} is for one machine; use --workers with --ray")
        for name, value in others.items():
            if value:
                raise ConfigError(f"{name} does not go together with --ray, which writes Parquet parts; leave it out")
        if out is None or out.suffix in (".npy", ".parquet"):
            got = "" if out is None else f"; got {out}"
            raise ConfigError(f"--ray writes many files; name a folder with --out{got}")
        return cls(address, out, workers)


class ChosenModel(NamedTuple):
    """The options that name a model and how it runs."""

    name: str
    precision: "Precision"
    device: str | None
    batch: int


def tag(
    cluster: Cluster,
    tagger: "Tagger",
    model: ChosenModel,
    inputs: "Sequence[InputSound]",
    chosen: TagOptions,
    channel: str,
    progress: Progress,
) -> bool:
    """Tag sounds on a cluster; return whether all of them could be read to the end."""
    from ced.integrations.ray import Tagging

    tagger.windows.check(chosen)
    work = Tagging(_opened_by_workers(tagger, model), chosen, channel == EACH)
    return _run(cluster, work, inputs, {**chosen.settings(), "channel": channel}, progress)


def embed(
    cluster: Cluster,
    tagger: "Tagger",
    model: ChosenModel,
    inputs: "Sequence[InputSound]",
    chosen: TagOptions,
    channel: str,
    windows: bool,
    progress: Progress,
) -> bool:
    """Embed sounds on a cluster; return whether all of them could be read to the end."""
    from ced.integrations.ray import Embedding

    tagger.windows.check(chosen)
    work = Embedding(_opened_by_workers(tagger, model), chosen, windows, channel == EACH)
    settings = {name: getattr(chosen, name) for name in ("window", "step", "tail", "strict")}
    return _run(cluster, work, inputs, {**settings, "channel": channel, "windows": windows}, progress)


def _opened_by_workers(tagger: "Tagger", model: ChosenModel) -> "Model":
    from ced.integrations.ray import Model

    return Model(model.name, model.precision, model.device, model.batch, tagger.digest)


@contextmanager
def open_here(model: ChosenModel, progress: Progress) -> "Iterator[Tagger]":
    """Open the model on this machine, which may lack the device of the workers, to check options against it."""
    from ced.tag.tagger import Tagger

    with Tagger(model.name, precision=model.precision, progress=progress) as tagger:
        yield tagger


def _run(
    cluster: Cluster,
    work: "Tagging | Embedding",
    inputs: "Sequence[InputSound]",
    settings: Mapping[str, Any],
    progress: Progress,
) -> bool:
    from ced.integrations import ray

    meter = Meter(progress, len(inputs), "tagging" if work.rows == "tags" else "embedding")

    def finished(result: "FileResult") -> None:
        meter.file(result.seconds)
        if result.error:
            show_error(result.error)

    ray.connect(cluster.address, silent=True)
    summary = ray.run(
        inputs,
        work,
        cluster.out,
        settings={"model": work.model.digest, **settings},
        address=cluster.address,
        workers=cluster.workers,
        finished=finished,
    )
    show(f"{summary}; {speed(summary.seconds, summary.elapsed)}")
    return not summary.failed and not summary.incomplete
