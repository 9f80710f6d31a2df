"""Measure how fast sounds are tagged, by the engines of this project and others, alternating in one run.

Run as `python benchmarks/tag.py` (an hour on two cores; `--models tiny --seconds 10` and the like for a part). The
weights are random and the same for all. In each case the engines take turns; figures are medians of the time from
samples in memory to probabilities, and only the ratio to plain PyTorch carries over to another machine.

    eager       the torch network with plain attention, as the published program runs it
    torch       the torch network of this project
    ours        our ONNX graph, waveform to probabilities
    ours int8   the same in int8
    feats       ONNX Runtime on the graph of features (`export_onnx.py`), with the torch front end
    sherpa      sherpa-onnx on the graph of features, with its own front end
    sherpa int8 the same in int8
"""

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from ced.model.graph.compare import export_int8
from ced.model.graph.export import export, int8_path
from ced.model.loading import weights_of
from ced.model.ort import open_session
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.model.zoo import MODELS
from ced.sound.audio import SAMPLE_RATE

Waves = NDArray[np.float32]
Engine = Callable[[Waves], object]
Clock = Callable[[], float]
BASELINE = "eager"
ENGINES = (BASELINE, "torch", "ours", "ours int8", "feats", "sherpa", "sherpa int8")


@dataclass(frozen=True)
class Case:
    """The input of a measurement."""

    model: str
    seconds: int
    batch: int
    threads: int


class Exported:
    """A network with random weights and all graphs of it."""

    def __init__(self, model: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.network = CED(MODELS[f"ced_{model}"].config).eval()
        with torch.no_grad():  # scores that differ from class to class
            self.network.outputlayer.get_submodule("1").get_parameter("weight").mul_(10.0)
        self.wave, self.feats = folder / f"{model}.wave.onnx", folder / f"{model}.feats.onnx"
        export(weights_of(self.network), self.wave, "wave")
        self.labels = export(weights_of(self.network), self.feats, "feats").labels_path
        for path in (self.wave, self.feats):
            export_int8(path)

    def engine(self, name: str, threads: int) -> Engine:
        """Return an engine after a first call."""
        if name in ("eager", "torch"):
            return self._torch(name == "eager")
        if name.startswith("ours"):
            return OnnxModel(int8_path(self.wave) if name.endswith("int8") else self.wave, threads=threads)
        if name == "feats":
            return self._feats(threads)
        return self._sherpa(int8_path(self.feats) if name.endswith("int8") else self.feats, threads)

    def _torch(self, plain: bool) -> Engine:
        backends = [SDPBackend.MATH] if plain else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

        def score(waves: Waves) -> object:
            with torch.inference_mode(), sdpa_kernel(backends):
                return self.network.probs(torch.from_numpy(waves)).numpy()

        return score

    def _feats(self, threads: int) -> Engine:
        session = open_session(self.feats, threads)

        def score(waves: Waves) -> object:
            with torch.inference_mode():
                feats = self.network.front_end(torch.from_numpy(waves)).numpy()
            return session.run(["prob"], {"feats": feats})

        return score

    def _sherpa(self, path: Path, threads: int) -> Engine:
        import sherpa_onnx

        model = sherpa_onnx.AudioTaggingModelConfig(ced=str(path), num_threads=threads)
        tagging = sherpa_onnx.AudioTagging(
            sherpa_onnx.AudioTaggingConfig(model=model, labels=str(self.labels), top_k=5)
        )

        def score(waves: Waves) -> object:
            found = []
            for wave in waves:
                stream = tagging.create_stream()
                stream.accept_waveform(sample_rate=SAMPLE_RATE, waveform=wave)
                found.append(tagging.compute(stream))
            return found

        return score


def measure(case: Case, exported: Exported, engines: Sequence[str], rounds: int, clock: Clock) -> dict[str, float]:
    """Return the median time of each engine for one clip of the batch, in milliseconds."""
    torch.set_num_threads(case.threads)
    waves = np.random.default_rng(0).normal(0.0, 0.1, (case.batch, case.seconds * SAMPLE_RATE)).astype(np.float32)
    running = {name: exported.engine(name, case.threads) for name in engines}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in running.items():
            begin = clock()
            engine(waves)
            if turn:  # the first one warms up
                times[name].append(1_000.0 * (clock() - begin) / case.batch)
    return {name: statistics.median(values) for name, values in times.items()}


def row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def describe(case: Case, times: dict[str, float]) -> str:
    """Return a case as a row: milliseconds per clip and, in brackets, the speed-up over the baseline."""
    cells = [case.model, f"{case.seconds} s", str(case.batch), str(case.threads)]
    for name, each in times.items():
        cells.append(f"{each:.1f}" + (f" ({times[BASELINE] / each:.2f})" if name != BASELINE else ""))
    return row(cells)


def available(engines: Sequence[str]) -> list[str]:
    """Return the engines that are installed; the baseline always is."""
    try:
        import sherpa_onnx  # noqa: F401
    except ModuleNotFoundError:
        engines = [name for name in engines if not name.startswith("sherpa")]
    return [BASELINE, *(name for name in engines if name != BASELINE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "mini", "small", "base"])
    parser.add_argument("--seconds", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for one thread on a machine with other work"
    )
    given = parser.parse_args()
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    engines = available(given.engines)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {given.clock} time, ms a clip\n")
    print(row(["model", "clip", "batch", "threads", *engines]), row(["---"] * (4 + len(engines))), sep="\n", flush=True)
    for model in given.models:
        with tempfile.TemporaryDirectory() as folder:
            exported = Exported(model, Path(folder))
            for seconds, batch, threads in itertools.product(given.seconds, given.batches, given.threads):
                case = Case(model, seconds, batch, threads)
                print(describe(case, measure(case, exported, engines, given.rounds, clock)), flush=True)


if __name__ == "__main__":
    main()
