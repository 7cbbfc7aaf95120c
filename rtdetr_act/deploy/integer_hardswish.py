"""Hardswish as a sum, a clipping and a product, all of which ONNX Runtime computes in integers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from rtdetr_act.deploy.onnx_graph import OnnxGraph

if TYPE_CHECKING:
    import onnx

_ROOT = math.sqrt(6)


def rewrite_hardswish(model: onnx.ModelProto) -> int:
    """Rewrite Hardswish behind convolutions in place, and return at how many sites.

    Hardswish is x·clip(x + 3, 0, 6)/6. With z = x/√6 it is z·clip(z + 3/√6, 0, √6), and the convolution can give z
    itself, if its weights are divided by √6. The clipping then costs nothing in 8 bits, since the range of what
    QuantizeLinear can write is that of the clipping. Sites that do not follow a convolution of their own are left.

    Args:
        model: ONNX model whose nodes have names.
    """
    from onnx import helper, numpy_helper

    graph = OnnxGraph(model)
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        conv = graph.producers.get(node.input[0]) if node.op_type == "HardSwish" else None
        if conv is None or not _can_scale(graph, conv):
            nodes.append(node)
            continue
        count += 1
        for name in conv.input[1:]:
            graph.set_array(name, graph.array(name) / _ROOT)
        # The convolution's value gets another name, since it is no longer what it was. Constants are not shared among
        # sites: one that a site in float32 shares with others would be converted there.
        z, shift, low, high, shifted, gate = (
            f"{node.name}_{part}" for part in ("scaled", "shift", "low", "high", "shifted", "gate")
        )
        conv.output[0] = z
        for name, value in ((shift, 3 / _ROOT), (low, 0.0), (high, _ROOT)):
            model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
        nodes += [
            helper.make_node("Add", [z, shift], [shifted], shifted),
            helper.make_node("Clip", [shifted, low, high], [gate], gate),
            helper.make_node("Mul", [z, gate], list(node.output), node.name),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return count


def _can_scale(graph: OnnxGraph, conv: onnx.NodeProto) -> bool:
    """Return whether a node is a convolution with constants of its own, which only one node reads."""
    if conv.op_type != "Conv" or graph.only_consumer(conv.output[0]) is None:
        return False
    return all(name in graph.constants and graph.only_consumer(name) is conv for name in conv.input[1:])
