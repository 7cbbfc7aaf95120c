"""What INT8 costs in each layer: the network in integers against that in float32, on the same images."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rtdetr_act.errors import InputError, quote
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Result, Table, TableResult
from rtdetr_act.tables import align_columns

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = "np.ndarray[Any, Any]"

# Kinds of modules that are a part of the layer that holds them, by the name of the attribute.
_PARTS = ("act", "bn", "conv")


@dataclass(frozen=True, repr=False)
class TensorError(Result):
    """The error of one activation tensor that is stored in 8 bits.

    Attributes:
        name: Module that computes it, such as "model.2.m.0.cv1.act", or the name of its node in graphs without.
        layer: Layer of that module, "model.2.m.0.cv1".
        operator: Operator that computes it.
        low: Smallest value in the float32 network.
        high: Largest value there.
        sqnr: Ratio of signal to quantisation noise in dB, between float32 and INT8: of all errors up to here.
        own_sqnr: The same of the rounding and clipping of this tensor alone.
        drop: How much lower the ratio is, in dB, than the lowest of the tensors in 8 bits that this one is computed
            from; 0 where there are none.
    """

    name: str
    layer: str
    operator: str
    low: float
    high: float
    sqnr: float
    own_sqnr: float
    drop: float

    def _summarise(self) -> str:
        """Return name and ratio."""
        return f"{self.name}, {self.operator}, {self.sqnr:.1f} dB"


@dataclass(frozen=True, repr=False)
class QuantisationErrors(TableResult):
    """The errors of all activation tensors that are stored in 8 bits.

    Attributes:
        tensors: In the order of the graph.
        images: Number of images.
    """

    tensors: tuple[TensorError, ...]
    images: int

    def find_drops(self, count: int = 5) -> list[TensorError]:
        """Return the tensors with the largest drops, in that order.

        Args:
            count: Number of tensors, at most.
        """
        return sorted((each for each in self.tensors if each.drop > 0), key=lambda each: -each.drop)[:count]

    def by_layer(self) -> dict[str, TensorError]:
        """Return the last tensor of each layer, its output, by the name of the layer."""
        return {tensor.layer: tensor for tensor in self.tensors}

    def _summarise(self) -> str:
        """Return the number of tensors and the lowest ratio."""
        found = format_count(len(self.tensors), "tensor")
        return f"{found}, {min(tensor.sqnr for tensor in self.tensors):.1f} dB at least"

    def _make_table(self) -> Table:
        """Return the titles of the columns, and a row per tensor."""
        header = ("name", "operator", "low", "high", "sqnr", "own_sqnr", "drop")
        return header, [astuple(each)[:1] + astuple(each)[2:] for each in self.tensors]

    def __str__(self) -> str:
        """Return the table in plain text."""
        rows = [
            (
                each.name,
                each.operator,
                f"{each.low:.3g}",
                f"{each.high:.3g}",
                f"{each.sqnr:.1f}",
                f"{each.own_sqnr:.1f}",
                f"{each.drop:.1f}",
            )
            for each in self.tensors
        ]
        return "\n".join(align_columns([("tensor", "operator", "low", "high", "SQNR, dB", "own", "drop"), *rows]))


def read_errors(plain: Mapping[str, Any]) -> QuantisationErrors:
    """Return measured errors from what `to_dict` made of them, in which ratios without noise are None.

    Args:
        plain: What `to_dict` returned.

    Raises:
        KeyError: A field is missing.
        TypeError: There are other fields.
    """
    tensors = []
    for each in plain["tensors"]:
        known: dict[str, Any] = {name: math.inf if value is None else value for name, value in each.items()}
        tensors.append(TensorError(**known))
    return QuantisationErrors(tuple(tensors), plain["images"])


@dataclass
class _Sums:
    """Sums over images from which the errors of one tensor follow."""

    low: float = math.inf
    high: float = -math.inf
    signal: float = 0.0
    noise: float = 0.0
    own_noise: float = 0.0

    def add(self, original: Array, quantised: Array, encoding: _Encoding) -> None:
        """Add the values of an image in float32 and in the INT8 network, and how the latter stores them."""
        self.low, self.high = min(self.low, float(original.min())), max(self.high, float(original.max()))
        self.signal += _power(original)
        self.noise += _power(original - quantised)
        self.own_noise += _power(original - encoding.round(original))


@dataclass(frozen=True)
class _Encoding:
    """The scale and the zero point of a tensor in 8 bits."""

    scale: Array
    zero_point: Array

    def round(self, values: Array) -> Array:
        """Return what is left of values that are stored so."""
        limits, zero = np.iinfo(self.zero_point.dtype), self.zero_point.astype(np.float32)
        return (np.clip(np.rint(values / self.scale) + zero, limits.min, limits.max) - zero) * self.scale


def measure_quantisation(original: Path, quantised: Path, images: Iterable[Array]) -> QuantisationErrors:
    """Measure the error of each activation tensor that a quantised ONNX file stores in 8 bits.

    Both networks are run unoptimised, so that each tensor can be read; one image is in memory at a time.

    Args:
        original: ONNX file in float32.
        quantised: The file that `quantise_onnx` made of it.
        images: Inputs of shape (1, C, H, W), float32, best those that it was not calibrated on.

    Raises:
        InputError: There are no images, or the files have no quantised tensor in common.
    """
    import onnx
    from onnxruntime.quantization.qdq_loss_debug import (
        collect_activations,
        create_activation_matching,
        modify_model_output_intermediate_tensors,
    )

    graph = onnx.load(original).graph
    encodings = _read_encodings(quantised)
    sums: dict[str, _Sums] = {}
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / "original.onnx", Path(folder) / "quantised.onnx"]
        for path, copy in zip((original, quantised), copies, strict=True):
            modify_model_output_intermediate_tensors(path, copy)
        for count, image in enumerate(images, 1):  # noqa: B007
            feed = {graph.input[0].name: image}
            reference, integers = (collect_activations(str(copy), [feed]) for copy in copies)
            for name, values in create_activation_matching(integers, reference).items():
                if "float" in values and name in encodings:
                    added = sums.setdefault(name, _Sums())
                    added.add(values["float"][0], values["post_qdq"][0], encodings[name])
    if not count:
        raise InputError("the error of INT8 is measured on images, and there are none")
    if not sums:
        raise InputError(f"{quote(str(quantised))} stores no tensor of {quote(str(original))} in 8 bits")
    return QuantisationErrors(tuple(_describe_tensors(graph, sums)), count)


def _describe_tensors(graph: onnx.GraphProto, sums: Mapping[str, _Sums]) -> Iterator[TensorError]:
    """Yield the errors of the tensors of a graph, in its order, from the sums over the images."""
    ratios = {name: _decibels(each.signal, each.noise) for name, each in sums.items()}
    sources: dict[str, set[str]] = {}  # of each value, the nearest tensors in 8 bits that it is computed from
    producers = {output: node for node in graph.node for output in node.output}
    for name in (graph.input[0].name, *producers):
        node = producers.get(name)
        parents = node.input if node else ()
        sources[name] = {
            source for parent in parents for source in ({parent} if parent in sums else sources.get(parent, ()))
        }
        if name not in sums:
            continue
        own = sums[name]
        module = name_module(node.name or name) if node else name
        lowest = min((ratios[source] for source in sources[name]), default=ratios[name])
        yield TensorError(
            name=module,
            layer=_name_layer(module),
            operator=node.op_type if node else "Input",
            low=own.low,
            high=own.high,
            sqnr=ratios[name],
            own_sqnr=_decibels(own.signal, own.own_noise),
            drop=lowest - ratios[name] if math.isfinite(lowest) else 0.0,
        )


def _read_encodings(path: Path) -> dict[str, _Encoding]:
    """Return how the activation tensors of a quantised ONNX file are stored, by their names."""
    import onnx
    from onnx import numpy_helper
    from onnxruntime.quantization.quant_utils import QUANT_INPUT_SUFFIX

    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return {
        node.input[0].removesuffix(QUANT_INPUT_SUFFIX): _Encoding(
            *(numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        )
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    }


def _power(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _decibels(signal: float, noise: float) -> float:
    """Return a ratio of powers in dB: infinite without noise."""
    if not noise:
        return math.inf
    return 10 * math.log10((signal or sys.float_info.min) / noise)


def name_module(node: str) -> str:
    """Return the name of the module that an exported node is of, by the scopes in its name.

    >>> name_module("/model.23/cv2.0/cv2.0.1/conv/Conv")
    'model.23.cv2.0.1.conv'
    """
    scopes = node.strip("/").split("/")[:-1]
    # A module in a list is named with the list before it: "cv2.0" and "cv2.0.1".
    last = [each for each, after in zip(scopes, [*scopes[1:], ""], strict=False) if not after.startswith(f"{each}.")]
    return ".".join(last) or node


def _name_layer(module: str) -> str:
    """Return the name of the layer that a module is a part of."""
    layer, _, part = module.rpartition(".")
    return layer if layer and part in _PARTS else module
