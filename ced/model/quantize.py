"""int8: an exported graph with the weights of its matrix products in 8 bits. Needs the package onnx."""

from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from ced.files import written_aside


def int8_path(path: Path) -> Path:
    """Return where the int8 graph of a float one lies: beside it."""
    return path.with_name(path.name.removesuffix(".onnx") + ".int8.onnx")


def quantize(path: Path) -> Path:
    """Write the int8 graph of an exported float one beside it.

    The weights of the blocks' linear layers are in 8 bits, with a scale for each output channel; their inputs are
    quantised as they come. The front end, attention, patches and the output layer stay in float.
    """
    graph = onnx.load(path)
    inside = [node.name for node in graph.graph.node if any(name.startswith("blocks.") for name in node.input)]
    metadata = {each.key: each.value for each in graph.metadata_props}
    # The graph is as simple as it gets: the quantizer need not prepare it.
    onnx.helper.set_model_props(graph, {**metadata, "onnx.quant.pre_process": "onnxruntime.quant"})
    out = int8_path(path)
    with written_aside(out) as aside:
        quantize_dynamic(
            graph,
            aside,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=inside,
            per_channel=True,
            reduce_range=True,  # 7 bits: two products of 8 bits may exceed 16 bits, where older processors clip
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(aside)
        quantized.ir_version = graph.ir_version
        onnx.helper.set_model_props(quantized, metadata)
        onnx.save(quantized, aside)
    return out
