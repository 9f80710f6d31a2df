"""Export: a network as a graph that runs without torch, compared with the network before it is handed out."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

import ced
from ced.errors import ExportError
from ced.files import written_aside
from ced.model import graph
from ced.model.graph import Input
from ced.model.onnx import (
    CLASSES,
    FLOAT,
    LABELS_FILE,
    OUTPUT,
    PIECE,
    PRECISION,
    PROB,
    PROBABILITIES,
    open_session,
    session_options,
)
from ced.model.ort import GraphOptimizationLevel, InferenceSession
from ced.model.vit import CED, foreign_feature
from ced.sound.audio import SAMPLE_RATE
from ced.sound.grid import MIN_SAMPLES, PATCH
from ced.sound.labels import ClassTable

LARGEST_DIFFERENCE = 1e-4  # in probability, between the float graph and the network


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how far from the network it is (largest difference in probability)."""

    path: Path
    largest_difference: float
    labels_path: Path | None  # the class table beside a graph of features; other graphs have theirs inside


def export(model: CED, path: Path, source: Input = "wave") -> ExportReport:
    """Write a graph that answers as a network does.

    From `wave`: input `waves` float32 (batch, time), 16 kHz, any length; outputs `prob` (batch, classes), `embedding`
    (batch, width) and `columns` (batch, columns, classes), the probabilities of each column of patches. Class names
    and preprocessing are in its metadata. From `feats`, as other runtimes read it: input `feats` float32
    (batch, 64, time) in dB, at least 16 frames; output `prob`; beside it `class_labels_indices.csv` with the columns
    index, mid, display_name. Either way batch and time are free, and inputs longer than the network's `target_length`
    are cut and joined as the network does; only with its `pad_last` off they must not be longer.

    Raises:
        ExportError: the graph differs from the network by more than `LARGEST_DIFFERENCE`, or the class table of
            another model is in the way, or a graph of features would need others than the published ones; nothing is
            written then.
    """
    if source == "feats" and (foreign := foreign_feature(model.config)):
        raise ExportError(f"graphs of features are fed the published ones, this network hears others: {foreign}")
    model = copy.deepcopy(model).cpu().float().eval()
    made = graph.wave_graph(model) if source == "wave" else graph.feats_graph(model)
    onnx.helper.set_model_props(made, metadata(model, source))
    path.parent.mkdir(parents=True, exist_ok=True)
    labels_path = path.with_name(LABELS_FILE) if source == "feats" else None
    table = _labels_text(model.labels)
    if labels_path is not None and labels_path.is_file() and labels_path.read_text(encoding="utf-8") != table:
        raise ExportError(
            f"{labels_path} belongs to a model with other classes; export {path.name} into another folder"
        )
    with written_aside(path) as aside:
        onnx.save(made, aside)
        if source == "wave":
            optimize(aside)
        difference = largest_difference(model, aside)
        if not difference <= LARGEST_DIFFERENCE:
            raise ExportError(
                f"the graph {path} differs from the network by {difference:.2g} in probability; "
                f"at most {LARGEST_DIFFERENCE:g} is allowed"
            )
    if labels_path is not None:
        with written_aside(labels_path) as aside:
            aside.write_text(table, encoding="utf-8", newline="\n")
    return ExportReport(path, difference, labels_path)


def optimize(path: Path) -> None:
    """Do to a graph what ONNX Runtime does whenever it opens one, so that it opens in half the time."""
    options = session_options(threads=1)
    # Beyond this level are changes for the processor at hand.
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    said = {each.key: each.value for each in onnx.load(path).metadata_props}
    with TemporaryDirectory(dir=path.parent) as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        InferenceSession(path, options, providers=["CPUExecutionProvider"])
        made = onnx.load(options.optimized_model_filepath)
    # It lists all the operator sets that it knows; other versions of it may not know them.
    used = {node.domain for node in made.graph.node}
    opsets = [opset for opset in made.opset_import if opset.domain in used]
    del made.opset_import[:]
    made.opset_import.extend(opsets)
    onnx.helper.set_model_props(made, said)
    onnx.save(made, path)


def metadata(model: CED, source: Input) -> dict[str, str]:
    """Return what a graph says of itself; a graph of features just what the published ones say."""
    published = {
        "model_type": "CED",
        "version": ced.__version__,
        "model_author": "ced",
        "url": "https://arxiv.org/abs/2308.11957",
    }
    if source == "feats":
        return published
    config = model.config
    front_end = ("n_mels", "n_fft", "win_size", "hop_size", "f_min", "f_max")
    return published | {
        CLASSES: json.dumps(asdict(model.labels), ensure_ascii=False),
        OUTPUT: PROBABILITIES,
        PRECISION: FLOAT,
        "sample_rate": str(SAMPLE_RATE),
        "hop": str(config.hop_size),
        PIECE: str(config.target_length),
        "preprocessing": json.dumps({name: getattr(config, name) for name in front_end}),
    }


def largest_difference(model: CED, path: Path) -> float:
    """Return the largest difference in probability between a graph and its network, over batch sizes and lengths."""
    session = open_session(path, threads=1)
    name = session.get_inputs()[0].name
    differences = []
    for batch in _example_waves(model) if name == "waves" else _example_feats(model):
        with torch.inference_mode():
            expected = model.probs(batch) if name == "waves" else model.as_probs(model.forward_mel(batch))
        found: NDArray[np.float32] = session.run([PROB], {name: batch.numpy()})[0]
        differences.append(float(np.abs(found - expected.numpy()).max()))
    return max(differences)


def _lengths(model: CED) -> list[tuple[int, int]]:
    """Batch sizes and frames to compare at: one patch, short, the longest piece, and longer where that is allowed."""
    longest = model.config.target_length
    longer = [(1, longest + 1), (2, 2 * longest)] if model.config.pad_last else []
    return [(1, PATCH), (3, longest // 4 + PATCH), (2, longest), *longer]


def _example_feats(model: CED) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for clips, frames in _lengths(model):
        yield 15.0 * torch.randn(clips, model.config.n_mels, frames, generator=generator) - 30.0


def _example_waves(model: CED) -> Iterator[Tensor]:
    """Yield noise of different loudness, with a tone; first a wave that is shorter than one patch."""
    generator = torch.Generator().manual_seed(0)
    hop = model.config.hop_size
    for clips, samples in [
        (1, MIN_SAMPLES // 2),
        *((clips, (frames - 1) * hop + hop // 2) for clips, frames in _lengths(model)),
    ]:
        noise = torch.randn(clips, samples, generator=generator) * 10.0 ** -torch.arange(1.0, clips + 1.0)[:, None]
        yield noise + 0.1 * torch.sin(2 * torch.pi * 440.0 / SAMPLE_RATE * torch.arange(samples))


def _labels_text(labels: ClassTable) -> str:
    """Return the class table as AudioSet's, every name quoted: readers in other languages count on the quotes."""
    mids: Sequence[str] = labels.mids or [""] * len(labels)
    lines = ["index,mid,display_name"]
    for index, (mid, name) in enumerate(zip(mids, labels.names, strict=True)):
        quoted = name.replace('"', '""')
        lines.append(f'{index},{mid},"{quoted}"')
    return "\n".join(lines) + "\n"
