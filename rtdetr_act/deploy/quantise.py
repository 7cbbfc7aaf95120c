"""Quantise ONNX files to 8 bits in such a way that ONNX Runtime computes them in integers from end to end.

ONNX Runtime's quantizer places QuantizeLinear and DequantizeLinear around the nodes that it is given. On loading, ONNX
Runtime fuses them into integer kernels, where it has one. If the activations are not among those nodes, the network
changes to float32 and back at each of them, and is slower than in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rtdetr_act.deploy.integer_hardswish import rewrite_hardswish
from rtdetr_act.deploy.onnx_graph import OnnxGraph
from rtdetr_act.errors import InputError

if TYPE_CHECKING:
    import onnx

_MIN_OPSET = 13  # scales per channel

# What ONNX Runtime computes in integers between two quantised layers, with a kernel of its own, as a part of the layer
# before it (Relu, Clip), or on bytes of any meaning. SiLU is a table of 256 entries and a product: the whole of yolo11n
# takes 0.68 of float32 so, and 0.95 if SiLU is computed in float32 between two conversions (scripts/bench_int8.py).
_BETWEEN = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
_LAYOUT = {"MaxPool", "Resize", "Split", "Slice", "Pad", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}

# Products that are summed up for an output of a convolution. With fewer, as in the first one (3 channels times 9), the
# integer kernel is slower than that in float32. With those below 32 in float32, rtdetr-n at 320 pixels takes 0.72 of
# float32 instead of 0.83; with those below 73 it takes 0.87 again.
_MIN_PRODUCTS = 32


@dataclass(frozen=True)
class Quantisation:
    """What was quantised.

    Attributes:
        quantised: Names of the layers with weights that are computed in integers.
        left: Names of those that are computed in float32.
    """

    quantised: tuple[str, ...]
    left: tuple[str, ...]


class _Reader:
    """Hands images to ONNX Runtime's calibration."""

    def __init__(self, name: str, images: Iterable[np.ndarray[Any, Any]]) -> None:
        self._name, self._remaining = name, iter(images)

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        image = next(self._remaining, None)
        return None if image is None else {self._name: image}


def quantise_onnx(source: Path, output: Path, images: Sequence[np.ndarray[Any, Any]]) -> Quantisation:
    """Quantise a float32 ONNX file to 8 bits: weights per channel, activations per tensor, metadata as they were.

    Computed in integers are the layers with weights and all that ONNX Runtime can compute in integers between two of
    them. What is behind the last of them (the decoding of boxes) stays in float32, and so do layers whose weights are
    not constant, those that take the mean of a distribution, and all that depends on a TopK: the decoder of RT-DETR,
    whose boxes say where features are read.

    Args:
        source: File in float32, opset 13 or newer.
        output: File to write.
        images: Inputs to calibrate on, of shape (1, C, H, W), float32. One is in memory at a time if they are loaded
            when they are indexed.

    Raises:
        InputError: There are no images, no layer can be quantised, or the opset is too old.
        OSError: The file cannot be written.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    if not len(images):
        raise InputError("INT8 takes images to calibrate on, and there are none")
    model = onnx.load(source)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset < _MIN_OPSET:
        raise InputError(f"INT8 takes opset {_MIN_OPSET} or newer of ONNX, not {opset}")
    name_nodes(model)
    rewrite_hardswish(model)
    graph = OnnxGraph(onnx.shape_inference.infer_shapes(model))
    chosen = choose_nodes(graph)
    layers = [node.name for node in graph.nodes if has_weights(graph, node)]
    if not chosen:
        raise InputError(f"none of the {len(layers)} layers of {source.name} can be computed in 8 bits")
    add_pre_process_metadata(graph.model)  # its shapes are inferred: ONNX Runtime would warn that they are not
    quantize_static(
        graph.model,
        output,
        _Reader(model.graph.input[0].name, images),
        op_types_to_quantize=sorted({node.op_type for node in chosen}),
        nodes_to_quantize=[node.name for node in chosen],
        per_channel=True,
        # Both signed is as fast on ARM, but on x86 only unsigned activations have kernels.
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # From the smallest to the largest value of all images. On yolo11n and rtdetr-n with six activations, at 160 and
        # 320 pixels on BCCD (11 networks, 64 images), that costs 0.000 of mAP50-95 on average and 0.002 at most; the
        # percentile 99.999 costs 0.001 and 0.006, entropy 0.003 and 0.009, means of the images' extremes 0.003 and
        # 0.006. It needs the least time, and the memory for one image, where the histograms of the others can grow.
        calibrate_method=CalibrationMethod.MinMax,
    )
    names = {node.name for node in chosen}
    return Quantisation(
        tuple(name for name in layers if name in names), tuple(name for name in layers if name not in names)
    )


def name_nodes(model: onnx.ModelProto) -> None:
    """Give each node without a name the one of its first output, since ONNX Runtime chooses nodes by name."""
    for node in model.graph.node:
        node.name = node.name or node.output[0]


def has_weights(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Return whether a node is a convolution or a product with a constant matrix."""
    return node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in graph.constants


def choose_nodes(graph: OnnxGraph) -> list[onnx.NodeProto]:
    """Return the nodes to compute in integers, in the order of the graph.

    Args:
        graph: The graph, with a name for each node.
    """
    selected = _behind_selections(graph)
    chosen = {
        node.name
        for node in graph.nodes
        if node.name not in selected and (_is_integer_layer(graph, node) or node.op_type in _BETWEEN | _LAYOUT)
    }
    before: set[str] = set()
    while chosen != before:
        before = set(chosen)
        chosen -= set(_outside_layers(graph, chosen))
    return [node for node in graph.nodes if node.name in chosen]


def _behind_selections(graph: OnnxGraph) -> set[str]:
    """Return the names of the nodes that depend on a selection of the best: of all other queries, one wrong bit."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "TopK" or any(parent.name in found for parent in graph.parents(node)):
            found.add(node.name)
    return found


def _is_integer_layer(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Return whether a layer with weights has an integer kernel that is both exact enough and faster."""
    if not has_weights(graph, node):
        return False
    shape = graph.shapes.get(node.output[0])
    is_conv = node.op_type == "Conv"
    if shape and math.prod(shape[2:] if is_conv else shape[:-1]) == 1:
        return False  # of pooled values: it costs less than the conversions
    if not is_conv:
        return True
    products = math.prod(graph.constants[node.input[1]].dims[1:])
    is_depthwise = graph.attribute(node, "group", 1) > 1
    return (is_depthwise or products >= _MIN_PRODUCTS) and not _is_expectation(graph, node)


def _is_expectation(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Return whether a layer takes the mean of a distribution, as YOLO's does for the sides of a box (DFL).

    Its result is a coordinate. 8 bits would be a step of 2 pixels in the coarsest map of YOLO.
    """
    parents = graph.parents(node)[:1]
    while parents and parents[0].op_type in _LAYOUT:
        parents = graph.parents(parents[0])[:1]
    return bool(parents) and parents[0].op_type == "Softmax"


def _outside_layers(graph: OnnxGraph, chosen: set[str]) -> Iterator[str]:
    """Yield the chosen nodes that are not among chosen ones: both conversions would cost more than the integers gain.

    A layer with weights needs another one before it or behind it, whatever is between them; any other node needs a
    chosen one before it and one behind. A product is left out as well if one of its factors is in float32, as in
    activations whose gate has no integer kernel.
    """
    before = _find_reached(graph, graph.nodes, graph.parents, chosen)
    behind = _find_reached(graph, list(reversed(graph.nodes)), graph.children, chosen)
    for node in graph.nodes:
        if node.name not in chosen:
            continue
        parents = [parent.name in chosen for parent in graph.parents(node)]
        follows = bool(parents) and (all if node.op_type == "Mul" else any)(parents)
        leads_on = any(child.name in chosen for child in graph.children(node))
        if not (node.name in before | behind if has_weights(graph, node) else follows and leads_on):
            yield node.name


def _find_reached(
    graph: OnnxGraph,
    nodes: Sequence[onnx.NodeProto],
    neighbours: Callable[[onnx.NodeProto], list[onnx.NodeProto]],
    chosen: set[str],
) -> set[str]:
    """Return the names of the nodes that a chosen layer with weights reaches, with no other such layer between them.

    Args:
        graph: The graph.
        nodes: Its nodes, each behind its neighbours.
        neighbours: Returns the nodes from which a node is reached: parents or children.
        chosen: Names of the chosen nodes.
    """
    reached: set[str] = set()
    for node in nodes:
        for each in neighbours(node):
            if each.name in (chosen if has_weights(graph, each) else reached):
                reached.add(node.name)
    return reached
