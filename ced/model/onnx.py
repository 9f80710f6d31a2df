"""ONNX: a network as a graph that runs without torch, compared with the network before it is handed out.

The graph of the published program takes log-mel features, so its user brings a front end.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

import ced
from ced.errors import ExportError
from ced.files import written_aside
from ced.model.vit import CED, PATCH
from ced.sound.labels import ClassTable

OPSET = 18
IR_VERSION = 8  # the one opset 18 came with; older runtimes refuse a later one
LARGEST_DIFFERENCE = 1e-4  # in probability, between the float graph and the network
LABELS_FILE = "class_labels_indices.csv"
METADATA = {
    "model_type": "CED",
    "version": ced.__version__,
    "model_author": "ced",
    "url": "https://arxiv.org/abs/2308.11957",
}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how far from the network its graphs are (largest difference in probability)."""

    path: Path
    int8_path: Path | None
    labels_path: Path
    largest_difference: float
    int8_difference: float | None


def export_feats(model: CED, path: Path, *, int8: bool = True) -> ExportReport:
    """Write a graph from log-mel features to probabilities, and beside it an int8 one and the class table.

    Input `feats` float32 (batch, 64, time) in dB, at least 16 frames; output `prob` (batch, classes); batch and time
    are free. Inputs longer than the network's `target_length` are cut and joined as the network does; only with its
    `pad_last` off they must not be longer. `<name>.int8.onnx` has the weights of its matrix products, but for the
    output layer, in 8 bits. `class_labels_indices.csv` has the columns index, mid, display_name.

    Raises:
        ExportError: the graph differs from the network by more than `LARGEST_DIFFERENCE`; nothing is written then.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = _graph(model)
    with written_aside(path) as aside:
        onnx.save(graph, aside)
        difference = _difference(model, aside)
        if not difference <= LARGEST_DIFFERENCE:
            raise ExportError(
                f"the graph {path} differs from the network by {difference:.2g} in probability; "
                f"at most {LARGEST_DIFFERENCE:g} is allowed"
            )
    labels_path = path.with_name(LABELS_FILE)
    _write_labels(labels_path, model.labels)
    int8_path, int8_difference = None, None
    if int8:
        int8_path = path.with_name(path.name.removesuffix(".onnx") + ".int8.onnx")
        with written_aside(int8_path) as aside:
            _quantize(graph, aside)
            int8_difference = _difference(model, aside)
    return ExportReport(path, int8_path, labels_path, difference, int8_difference)


class _FromFeats(nn.Module):
    """The network as the graph has it."""

    def __init__(self, model: CED) -> None:
        super().__init__()
        self.model = model

    def forward(self, feats: Tensor) -> Tensor:
        return self.model.as_probs(self.model.forward_mel(feats))


def _graph(model: CED) -> onnx.ModelProto:
    """Trace a network from features to probabilities, for any batch and time."""
    config = model.config
    longest = None if config.pad_last else config.target_length
    free = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("time", min=PATCH, max=longest)}
    with _quiet():
        program = torch.onnx.export(
            _FromFeats(model).eval(),
            (torch.zeros(2, config.n_mels, config.target_length),),
            input_names=["feats"],
            output_names=["prob"],
            opset_version=OPSET,
            dynamic_shapes={"feats": free},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    _strip(graph)
    graph.ir_version = IR_VERSION
    onnx.helper.set_model_props(graph, METADATA)
    onnx.checker.check_model(graph)
    return graph


def _strip(graph: onnx.ModelProto) -> None:
    """Remove the exporter's notes, among them paths of this machine; IR 8 does not know them either."""
    for item in (*graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.graph.metadata_props[:]


def _quantize(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph with the weights of its matrix products in 8 bits a channel, the output layer left in float."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    *_, head = [
        node.name for node in graph.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights
    ]
    onnx.helper.set_model_props(graph, {"onnx.quant.pre_process": "onnxruntime.quant"})  # it is optimised already
    quantize_dynamic(
        graph,
        path,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[head, f"{head}_MatMul"],  # the quantizer's name for it, when it was a Gemm
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    quantized = onnx.load(path)
    quantized.ir_version = IR_VERSION
    onnx.helper.set_model_props(quantized, METADATA)
    onnx.save(quantized, path)


def _difference(model: CED, path: Path) -> float:
    """Return the largest difference in probability between a graph and its network, over batch sizes and lengths."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    differences = []
    for feats in _examples(model):
        with torch.inference_mode():
            expected = model.as_probs(model.forward_mel(feats)).numpy()
        (found,) = session.run(["prob"], {"feats": feats.numpy()})
        differences.append(float(np.abs(found - expected).max()))
    return max(differences)


def _examples(model: CED) -> Iterator[Tensor]:
    """Yield features like real ones: one patch, short, the longest piece, and longer where that is allowed."""
    generator = torch.Generator().manual_seed(0)
    longest = model.config.target_length
    shapes = [(1, PATCH), (3, longest // 4 + PATCH), (2, longest)]
    if model.config.pad_last:
        shapes += [(1, longest + 1), (2, 2 * longest)]
    for clips, frames in shapes:
        yield 15.0 * torch.randn(clips, model.config.n_mels, frames, generator=generator) - 30.0


def _write_labels(path: Path, labels: ClassTable) -> None:
    """Write the class table as AudioSet's, every name quoted: readers in other languages count on the quotes."""
    mids: Sequence[str] = labels.mids or [""] * len(labels)
    lines = ["index,mid,display_name"]
    for index, (mid, name) in enumerate(zip(mids, labels.names, strict=True)):
        quoted = name.replace('"', '""')
        lines.append(f'{index},{mid},"{quoted}"')
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice to its developers away from users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
