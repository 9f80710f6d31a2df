"""int8: an exported graph with the weights of its matrix products in 8 bits, held to the graph in float.

Needs the package onnx.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ced.errors import ConfigError, ExportError
from ced.files import written_aside
from ced.model.export import optimize
from ced.model.graph import RUNTIME
from ced.model.metrics import accuracy, average_precision
from ced.model.onnx import PRECISION, OnnxModel
from ced.model.ort import quantization
from ced.progress import Progress, silent
from ced.sound import audio
from ced.sound.labelled import LabelledClip, read_labelled
from ced.sound.tables import multi_hot

BOUND = 0.3  # points of mAP


@dataclass(frozen=True)
class Figures:
    """What labelled clips say of a graph."""

    map: float  # mean of the classes' average precision, of those that a clip has
    accuracy: float | None  # part of the clips whose label scores highest; None unless each has exactly one


@dataclass(frozen=True)
class Comparison:
    """A graph in int8 beside the same in float."""

    clips: int
    exact: Figures
    int8: Figures
    mean_change: float  # in probability
    largest_change: float

    @property
    def loss(self) -> float:
        """How many points of mAP int8 costs; below 0 it gains."""
        return 100.0 * (self.exact.map - self.int8.map)

    @property
    def summary(self) -> str:
        """The figures in one line."""
        accuracy = ""
        if self.exact.accuracy is not None and self.int8.accuracy is not None:
            accuracy = f", accuracy {self.exact.accuracy:.4f} -> {self.int8.accuracy:.4f}"
        gain = round(-self.loss, 2) + 0.0  # not -0.0
        return (
            f"mAP {self.exact.map:.4f} -> {self.int8.map:.4f} ({gain:+.2f} points){accuracy}; probabilities change by "
            f"{self.mean_change:.2g} in the mean, {self.largest_change:.2g} at most ({self.clips} clips)"
        )


def int8_path(path: Path) -> Path:
    """Return where the int8 graph of a float one lies: beside it."""
    return path.with_name(path.name.removesuffix(".onnx") + ".int8.onnx")


def quantize(
    path: Path, *, check: Path | None = None, bound: float = BOUND, progress: Progress = silent
) -> Comparison | None:
    """Write the int8 graph of an exported float one beside it, `int8_path(path)`.

    The weights of the blocks' linear layers are in 8 bits, with a scale for each output channel; what is multiplied
    with them is quantised as it comes. The front end, the patches, attention itself and the output layer, where 8 bits
    hurt most, stay in float.

    Args:
        path: what `export` wrote.
        check: a table of labelled clips (see `read_labelled`) on which to compare the two.
        bound: points of mAP that int8 may cost there.
        progress: told of the clips compared.

    Returns:
        The comparison, if one was asked for.

    Raises:
        ConfigError: the bound is negative.
        ExportError: int8 costs more than the bound; no int8 graph is left.
        TableError, AudioError: the clips cannot be read.
    """
    if not bound >= 0:
        raise ConfigError(f"bound is {bound}; it must be 0 or more")
    clips = None if check is None else read_labelled(check, OnnxModel(path).labels)
    int8_path(path).unlink(missing_ok=True)  # of an earlier export: when this one is refused, none is left
    with written_aside(int8_path(path)) as aside:
        _write(path, aside)
        if any(node.domain == RUNTIME for node in onnx.load(path, load_external_data=False).graph.node):
            optimize(aside)
        if clips is None:
            return None
        found = compare(path, aside, clips, progress)
        if found.loss > bound:
            raise ExportError(
                f"int8 costs {path} {found.loss:.2f} points of mAP; at most {bound:g} are allowed: {found.summary}"
            )
    return found


def compare(exact: Path, int8: Path, clips: list[LabelledClip], progress: Progress = silent) -> Comparison:
    """Score labelled clips with a float graph and with its int8 one."""
    models = OnnxModel(exact), OnnxModel(int8)
    targets = multi_hot([clip.labels for clip in clips], len(models[0].labels))
    probs: list[list[NDArray[np.float32]]] = []
    for done, clip in enumerate(clips, start=1):
        wave = audio.load(clip.path)[None]
        probs.append([model(wave)[0] for model in models])
        progress("compare int8 with float", done, len(clips))
    both = np.array(probs)  # (clips, 2, c)
    change = np.abs(both[:, 0] - both[:, 1])
    return Comparison(
        len(clips),
        _figures(targets, both[:, 0]),
        _figures(targets, both[:, 1]),
        float(change.mean()),
        float(change.max()),
    )


def _figures(targets: NDArray[np.bool_], probs: NDArray[np.float32]) -> Figures:
    return Figures(float(np.nanmean(average_precision(targets, probs))), accuracy(targets, probs))


def _write(path: Path, out: Path) -> None:
    graph = onnx.load(path)
    metadata = {each.key: each.value for each in graph.metadata_props}
    if PRECISION in metadata:
        metadata[PRECISION] = "int8"
    # The graph is as simple as it gets: the quantizer need not prepare it.
    onnx.helper.set_model_props(graph, {**metadata, "onnx.quant.pre_process": "onnxruntime.quant"})
    with _quiet():
        quantization().quantize_dynamic(
            graph,
            out,
            op_types_to_quantize=["MatMul", "Attention"],
            nodes_to_quantize=[
                node.name for node in graph.graph.node if any(name.startswith("blocks.") for name in node.input)
            ],
            per_channel=True,
            # 7 bits: without VNNI instructions two products of 8 bits are added up in 16 bits, which would clip.
            reduce_range=True,
            weight_type=quantization().QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what ONNX Runtime's own operators give
        )
    quantized = onnx.load(out)
    quantized.ir_version = graph.ir_version
    onnx.helper.set_model_props(quantized, metadata)
    onnx.save(quantized, out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice on preparing a graph, which goes through the root logger, away from users."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
