"""Export: graphs as files, with metadata, optimised for ONNX Runtime, in float or int8."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

import ced
from ced.errors import ExportError
from ced.files import written_aside
from ced.model.config import shapes
from ced.model.graph import (
    CLASSES,
    FRAME_HOP,
    HEAD,
    LABELS_FILE,
    LONGEST,
    NO_HEAD,
    OUTPUT,
    PIECE,
    PRECISION,
    PROBABILITIES,
    RATE,
    GraphInput,
)
from ced.model.graph.network import BLOCKS, RUNTIME, feats_graph, wave_graph
from ced.model.ort import GraphOptimizationLevel, InferenceSession, quantization, session_options
from ced.model.weights import HEAD_KEYS, Weights
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable

LARGEST_DIFFERENCE = 1e-4  # in probability, between a float graph and the network


@dataclass(frozen=True)
class ExportReport:
    """The files of an export, and the largest difference in probability from the network."""

    path: Path
    largest_difference: float | None  # None: not compared, as torch is not installed
    labels_path: Path | None  # the class table beside a graph of features; other graphs contain theirs


def export(weights: Weights, path: Path, source: GraphInput = "wave") -> ExportReport:
    """Write a graph, with `source` "wave" as by `write_graph`, with "feats" as by `write_feats_graph`.

    The class table of a graph of features is written beside it: `class_labels_indices.csv` with the columns index, mid,
    display_name. Where torch is installed, the graph is compared with the network first; nothing is written if they
    differ.

    Raises:
        CheckpointError: the weights do not fit their configuration, or have no output layer to score with.
        ExportError: as for those functions, or the folder has the class table of another model, or the graph differs
            from the network by more than `LARGEST_DIFFERENCE`.
    """
    from ced.model.graph.compare import largest_difference

    difference, labels_path, table = None, None, _labels_text(weights.classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if source == "feats":
        labels_path = path.with_name(LABELS_FILE)
        if labels_path.is_file() and labels_path.read_text(encoding="utf-8") != table:
            raise ExportError(
                f"{labels_path} belongs to a model with other classes; export {path.name} into another folder"
            )
    with written_aside(path) as aside:
        write = write_graph if source == "wave" else write_feats_graph
        write(weights, aside)
        if find_spec("torch") is not None:
            difference = largest_difference(weights, aside)
            if not difference <= LARGEST_DIFFERENCE:
                raise ExportError(
                    f"the graph {path} differs from the network by {difference:.2g} in probability; "
                    f"at most {LARGEST_DIFFERENCE:g} is allowed"
                )
    if labels_path is not None:
        with written_aside(labels_path) as aside:
            aside.write_text(table, encoding="utf-8", newline="\n")
    return ExportReport(path, difference, labels_path)


def write_graph(weights: Weights, path: Path) -> None:
    """Write the graph of a tagger, from waves to probabilities.

    Its input is `waves` float32 (batch, time), 16 kHz, any length; its outputs are `prob` (batch, classes), `embedding`
    (batch, width) and `columns` (batch, columns, classes), the probabilities of each column of patches. Class names
    and preprocessing are in its metadata. Inputs longer than the network's `target_length` are scored in pieces, as by
    the network; with its `pad_last` off they must not be longer. Weights of masked pre-training have no output layer:
    the graph then only embeds.

    Raises:
        CheckpointError: the weights do not fit their configuration.
        ExportError: the front end cannot be written as a graph.
    """
    made = wave_graph(weights if weights.has_head else _with_empty_head(weights))
    onnx.helper.set_model_props(made, _metadata(weights))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        onnx.save(made, aside)
        optimize(aside)


def write_feats_graph(weights: Weights, path: Path) -> None:
    """Write a graph of features, for other runtimes.

    Its input is `feats` float32 (batch, 64, time) in dB, at least 16 frames; its output is `prob`.

    Raises:
        CheckpointError: the weights do not fit their configuration, or have no output layer.
        ExportError: the features of the network are not the published ones.
    """
    if (other := weights.config.unpublished_feature) is not None:
        raise ExportError(f"a graph of features takes the published ones, but this network has others: {other}")
    made = feats_graph(weights)
    onnx.helper.set_model_props(made, _published_metadata())
    with written_aside(path) as aside:
        onnx.save(made, aside)


def optimize(path: Path) -> None:
    """Apply ONNX Runtime's graph optimisations in advance, so that the graph opens in half the time."""
    options = session_options(threads=1)
    # Higher levels make changes for the processor at hand.
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    properties = {each.key: each.value for each in onnx.load(path, load_external_data=False).metadata_props}
    with TemporaryDirectory(dir=path.parent) as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        InferenceSession(path, options, providers=["CPUExecutionProvider"])
        made = onnx.load(options.optimized_model_filepath)
    # It lists all operator sets that it knows, which other versions may not know.
    used = {node.domain for node in made.graph.node}
    opsets = [opset for opset in made.opset_import if opset.domain in used]
    del made.opset_import[:]
    made.opset_import.extend(opsets)
    onnx.helper.set_model_props(made, properties)
    onnx.save(made, path)


def _published_metadata() -> dict[str, str]:
    return {
        "model_type": "CED",
        "version": ced.__version__,
        "model_author": "ced",
        "url": "https://arxiv.org/abs/2308.11957",
    }


def _metadata(weights: Weights) -> dict[str, str]:
    config = weights.config
    front_end = asdict(config.front_end)
    del front_end["center"]  # every graph is centred
    special = {} if weights.has_head else {HEAD: NO_HEAD}
    if not config.pad_last:
        special[LONGEST] = str(config.target_length * config.hop_size - 1)
    return (
        _published_metadata()
        | special
        | {
            CLASSES: json.dumps(asdict(weights.classes), ensure_ascii=False),
            OUTPUT: PROBABILITIES,
            PRECISION: "float32",
            RATE: str(SAMPLE_RATE),
            FRAME_HOP: str(config.hop_size),
            PIECE: str(config.target_length),
            "preprocessing": json.dumps(front_end),
        }
    )


def _with_empty_head(weights: Weights) -> Weights:
    """Return weights of masked pre-training with an output layer of zeros, and without the decoder."""
    wanted = shapes(weights.config)
    arrays = {key: value for key, value in weights.arrays.items() if key in wanted and not key.startswith(HEAD_KEYS)}
    head = {key: np.zeros(shape, np.float32) for key, shape in wanted.items() if key.startswith(HEAD_KEYS)}
    return replace(weights, arrays=arrays | head)


def _labels_text(labels: ClassTable) -> str:
    """Return the class table in the format of AudioSet's, with every name in quotes, which readers elsewhere expect."""
    mids: Sequence[str] = labels.mids or [""] * len(labels)
    lines = ["index,mid,display_name"]
    for index, (mid, name) in enumerate(zip(mids, labels.names, strict=True)):
        quoted = name.replace('"', '""')
        lines.append(f'{index},{mid},"{quoted}"')
    return "\n".join(lines) + "\n"


def int8_path(path: Path) -> Path:
    """Return the path of the int8 graph of a float one, beside it."""
    return path.with_name(path.name.removesuffix(".onnx") + ".int8.onnx")


def quantize(path: Path, out: Path) -> None:
    """Write the int8 graph of a float one.

    The weights of the blocks' linear layers are in 8 bits, with a scale per output channel; their inputs are quantised
    dynamically. The front end, the patches, attention itself and the output layer, where 8 bits cost most accuracy,
    stay in float.
    """
    graph = onnx.load(path)
    fused = any(node.domain == RUNTIME for node in graph.graph.node)
    metadata = {each.key: each.value for each in graph.metadata_props}
    if PRECISION in metadata:
        metadata[PRECISION] = "int8"
    # The graph is simplified already: the quantizer need not preprocess it.
    onnx.helper.set_model_props(graph, {**metadata, "onnx.quant.pre_process": "onnxruntime.quant"})
    onnx_quantization = quantization()
    with _quiet():
        onnx_quantization.quantize_dynamic(
            graph,
            out,
            op_types_to_quantize=["MatMul", "Attention"],
            nodes_to_quantize=[
                node.name for node in graph.graph.node if any(name.startswith(BLOCKS) for name in node.input)
            ],
            per_channel=True,
            # 7 bits: without VNNI instructions, two products of 8 bits are added in 16 bits, which would overflow.
            reduce_range=True,
            weight_type=onnx_quantization.QuantType.QInt8,
            extra_options={
                "DefaultTensorType": onnx.TensorProto.FLOAT
            },  # the type of outputs of ONNX Runtime's own operators
        )
    quantized = onnx.load(out)
    quantized.ir_version = graph.ir_version
    onnx.helper.set_model_props(quantized, metadata)
    onnx.save(quantized, out)
    if fused:
        optimize(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer's advice to preprocess the graph, which it logs with the root logger."""

    def keep(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    logging.root.addFilter(keep)
    try:
        yield
    finally:
        logging.root.removeFilter(keep)
