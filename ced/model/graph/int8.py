"""A graph with the weights of its matrix products in 8 bits, made from the float graph."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from ced.model import ort
from ced.model.graph import PRECISION
from ced.model.graph.export import optimize
from ced.model.graph.network import RUNTIME


def int8_path(path: Path) -> Path:
    """Return where the int8 graph of a float one lies: beside it."""
    return path.with_name(path.name.removesuffix(".onnx") + ".int8.onnx")


def quantize(path: Path, out: Path) -> None:
    """Write the int8 graph of a float one.

    The weights of the blocks' linear layers are in 8 bits, with a scale for each output channel; what is multiplied
    with them is quantised as it comes. The front end, the patches, attention itself and the output layer, where 8 bits
    hurt most, stay in float.
    """
    graph = onnx.load(path)
    fused = any(node.domain == RUNTIME for node in graph.graph.node)
    metadata = {each.key: each.value for each in graph.metadata_props}
    if PRECISION in metadata:
        metadata[PRECISION] = "int8"
    # The graph is as simple as it gets: the quantizer need not prepare it.
    onnx.helper.set_model_props(graph, {**metadata, "onnx.quant.pre_process": "onnxruntime.quant"})
    quantization = ort.quantization()
    with _quiet():
        quantization.quantize_dynamic(
            graph,
            out,
            op_types_to_quantize=["MatMul", "Attention"],
            nodes_to_quantize=[
                node.name for node in graph.graph.node if any(name.startswith("blocks.") for name in node.input)
            ],
            per_channel=True,
            # 7 bits: without VNNI instructions two products of 8 bits are added up in 16 bits, which would clip.
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what ONNX Runtime's own operators give
        )
    quantized = onnx.load(out)
    quantized.ir_version = graph.ir_version
    onnx.helper.set_model_props(quantized, metadata)
    onnx.save(quantized, out)
    if fused:
        optimize(out)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer's advice on preparing a graph, which it logs with the root logger."""

    def keep(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.getMessage()

    logging.root.addFilter(keep)
    try:
        yield
    finally:
        logging.root.removeFilter(keep)
