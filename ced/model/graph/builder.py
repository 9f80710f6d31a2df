"""Builder of ONNX graphs: named nodes and constants."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Attribute = int | float | str | list[int]


class Nodes:
    """Collects nodes and constants; each method that adds a value returns its name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: Attribute) -> str:
        """Add a node with one output."""
        return self._add(kind, inputs, 1, domain, attributes)[0]

    def split(self, x: str, axis: int, parts: int) -> list[str]:
        """Cut an axis into equal parts."""
        return self._add("Split", (x,), parts, "", {"axis": axis, "num_outputs": parts})

    def _add(
        self, kind: str, inputs: Sequence[str], outputs: int, domain: str, attributes: dict[str, Attribute]
    ) -> list[str]:
        name = f"{kind}_{len(self._nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{each}" for each in range(outputs)]
        node = helper.make_node(kind, inputs, names, name, None, domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)
        return names

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Add a float32 constant."""
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name)
        return name

    def number(self, value: float) -> str:
        """Add a float32 number."""
        name = f"number {value:.9g}"
        self._constants[name] = numpy_helper.from_array(np.array(value, np.float32), name)
        return name

    def ints(self, *values: int) -> str:
        """Add integers along one axis."""
        return self.indices(np.array(values))

    def indices(self, values: NDArray[np.integer] | np.integer) -> str:
        """Add integers of any shape."""
        name = f"ints {np.array2string(np.asarray(values), separator=',')}".replace("\n", "")
        self._constants[name] = numpy_helper.from_array(np.asarray(values, np.int64), name)
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps the size of an axis, -1 infers it."""
        return self.add("Reshape", x, self.ints(*shape))

    def size(self, x: str, axis: int) -> str:
        """Add the size of an axis, as integers along one axis."""
        return self.add("Shape", x, start=axis, end=axis + 1)

    def joined(self, *parts: str | int) -> str:
        """Concatenate constants and computed integers along their one axis."""
        return self.add("Concat", *(self.ints(part) if isinstance(part, int) else part for part in parts), axis=0)

    def linear(self, name: str, arrays: Mapping[str, NDArray[Any]], x: str) -> str:
        """Apply the linear layer of this name."""
        product = self.add("MatMul", x, self.weight(f"{name}.weight", arrays[f"{name}.weight"].T))
        return self.add("Add", product, self.weight(f"{name}.bias", arrays[f"{name}.bias"]))

    def layer_norm(self, name: str, arrays: Mapping[str, NDArray[Any]], x: str, epsilon: float) -> str:
        """Apply the LayerNorm of this name over the last axis."""
        weight, bias = (self.weight(f"{name}.{part}", arrays[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon)

    def graph(
        self, source: tuple[str, list[str | int]], results: dict[str, tuple[str, list[str | int]]]
    ) -> onnx.GraphProto:
        """Return the graph with its one input (name, shape) and its outputs (name: value, shape)."""
        ends = [helper.make_node("Identity", [value], [name], name=name) for name, (value, _) in results.items()]
        return helper.make_graph(
            [*self._nodes, *ends],
            "ced",
            [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, (_, shape) in results.items()],
            list(self._constants.values()),
        )
