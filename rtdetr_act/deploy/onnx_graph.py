"""Who makes and who reads each value of an ONNX graph, and what its constants are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


class OnnxGraph:
    """The main graph of an ONNX model, indexed by the names of its values; it is built anew after a change.

    Attributes:
        model: The model.
        producers: The node that makes a value, by the name of the value; none for inputs and constants.
        consumers: The nodes that read a value, by the name of the value.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.producers = {output: node for node in model.graph.node for output in node.output if output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.outputs = {value.name for value in model.graph.output}

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """The nodes, each behind those whose values it reads."""
        return self.model.graph.node

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """The initializers and the values of Constant nodes, by name."""
        found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                found[node.output[0]] = node.attribute[0].t
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the values, as far as they were inferred, by name; 0 for a size that is not known."""
        values = [*self.model.graph.value_info, *self.model.graph.output]
        return {each.name: tuple(size.dim_value for size in each.type.tensor_type.shape.dim) for each in values}

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Return the node that alone reads a value; None if several do, or if it is an output of the graph."""
        readers = self.consumers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def parents(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes whose values a node reads, without Constant nodes."""
        found = (self.producers.get(name) for name in node.input)
        return [parent for parent in found if parent is not None and parent.op_type != "Constant"]

    def children(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes that read the values of a node."""
        return [child for name in node.output for child in self.consumers[name]]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return the value of a constant."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name])

    def set_array(self, name: str, value: np.ndarray[Any, Any]) -> None:
        """Replace the value of a constant, in its type."""
        from onnx import numpy_helper

        tensor = self.constants[name]
        old = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(value.astype(old.dtype), name))

    def attribute(self, node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        """Return the value of an attribute of a node, or the default if it has none."""
        from onnx import helper

        return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)
