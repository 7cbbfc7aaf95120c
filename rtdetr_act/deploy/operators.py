"""What a deployment target runs of an exported ONNX graph: each operator native, fallback or unknown, with the source.

The activations among the operators are judged by what their entries say (`Entry.targets`), all others by
`operators.csv`. A row of that file holds for several operators of a target, separated by spaces, and `*` for those that
no other row names. Where nothing could be read that tells, an operator is unknown.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

import numpy as np

from rtdetr_act.deploy.targets import get_native_support, get_target
from rtdetr_act.errors import InputError
from rtdetr_act.formatting import format_count, join_words
from rtdetr_act.tables import align_columns

if TYPE_CHECKING:
    import onnx

FILE = Path(__file__).with_name("operators.csv")
Status: TypeAlias = Literal["native", "fallback", "unknown"]
STATUSES: tuple[Status, ...] = get_args(Status)
_OTHERS = "*"  # the operators that no other row of a target names
_ONNX_DOMAINS = ("", "ai.onnx")
_NOT_COUNTED = ("Constant", "Identity")  # they compute nothing
_QUANTIZATION = ("QuantizeLinear", "DequantizeLinear")

# ONNX operators that are activations on their own, by the name under which the activation is registered.
ACTIVATIONS = {
    "Celu": "celu",
    "Elu": "elu",
    "Gelu": "gelu",
    "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish",
    "LeakyRelu": "leaky_relu",
    "Mish": "mish",
    "PRelu": "prelu",
    "Relu": "relu",
    "Selu": "selu",
    "Sigmoid": "sigmoid",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Tanh": "tanh",
}


@dataclass(frozen=True)
class _Pattern:
    """An activation that exporters write as one or several other operators.

    Attributes:
        title: How it is listed.
        activation: Its registered name.
        parts: The operators, in the order of the graph.
    """

    title: str
    activation: str
    parts: tuple[str, ...]

    @property
    def operator(self) -> str:
        """The title with the operators."""
        return f"{self.title} ({', '.join(self.parts)})"


_SILU = _Pattern("SiLU", "silu", ("Sigmoid", "Mul"))
_HARDSWISH = _Pattern("HardSwish", "hardswish", ("HardSigmoid", "Mul"))
_MISH = _Pattern("Mish", "mish", ("Softplus", "Tanh", "Mul"))
_GELU = _Pattern("GELU", "gelu", ("Div", "Erf", "Add", "Mul"))
_RELU6 = _Pattern("ReLU6", "relu6", ("Clip",))
_HARDTANH = _Pattern("HardTanh", "hardtanh", ("Clip",))
_PATTERNS = {each.operator: each for each in (_SILU, _HARDSWISH, _MISH, _GELU, _RELU6, _HARDTANH)}
_CLIPS = {(0.0, 6.0): _RELU6, (-1.0, 1.0): _HARDTANH}


@dataclass(frozen=True)
class Support:
    """What is known of one operator on a target.

    Attributes:
        status: "native" on the accelerator; "fallback" if it runs elsewhere, or is refused and has to; "unknown" if no
            source that could be read tells.
        note: A restriction, or where it runs instead; "" for none.
        source: Where that is documented; "" if nowhere.
        date: Date or release of the source; "" if there is none.
    """

    status: Status
    note: str = ""
    source: str = ""
    date: str = ""


@dataclass(frozen=True)
class OperatorSupport(Support):
    """An operator of a graph, and what is known of it on a target.

    Attributes:
        operator: Its name in ONNX, or an activation with the operators that it consists of, "SiLU (Sigmoid, Mul)".
        count: How often it occurs; an activation counts once, however many operators it consists of.
    """

    operator: str = ""
    count: int = 0


def list_operators(model: str | os.PathLike[str] | onnx.ModelProto, target: str) -> tuple[OperatorSupport, ...]:
    """List the operators of an ONNX graph with what is known of each on a target, in the order of the graph.

    Operators in subgraphs and functions count too. `Constant` and `Identity` do not, since they compute nothing.

    Args:
        model: An ONNX file, or a model that was loaded. External weights are not read.
        target: Name of the deployment target, such as "rknn".

    Raises:
        InputError: There is no such target or file, the file is not an ONNX model, or `onnx` is not installed.
    """
    get_target(target)
    return judge_operators(count_operators(model), target)


def judge_operators(counts: Mapping[str, int], target: str) -> tuple[OperatorSupport, ...]:
    """Return what is known of operators on a target.

    Args:
        counts: How often each operator occurs, as counted by `count_operators`.
        target: Name of the deployment target.

    >>> row, = judge_operators({"GridSample": 18}, "ti-tidl")
    >>> row.status, row.note
    ('native', 'nearest and bilinear, with padding of zeros; nearest rounds otherwise')
    """
    rows = ((get_operator_support(name, target), name, count) for name, count in counts.items())
    return tuple(
        OperatorSupport(each.status, each.note, each.source, each.date, name, count) for each, name, count in rows
    )


def get_operator_support(operator: str, target: str) -> Support:
    """Return what is known of an operator on a target.

    Args:
        operator: Its name, as counted by `count_operators`.
        target: Name of the deployment target.

    >>> get_operator_support("LeakyRelu", "vitis-dpu").note
    'the slope becomes 26/256 = 0.1016, whatever was trained'
    >>> get_operator_support("SiLU (Sigmoid, Mul)", "vitis-dpu").status
    'fallback'
    """
    pattern = _PATTERNS.get(operator)
    activation = pattern.activation if pattern else ACTIVATIONS.get(operator)
    native = get_native_support(activation, target) if activation else None
    if native:
        return Support("native", native.note, native.source, native.date)
    if pattern:
        return _combine(pattern.parts, target)
    if ":" in operator:
        return Support("unknown", "an operator outside of ONNX's own set")
    rows = read_operators()[target]
    return rows.get(operator) or rows[_OTHERS]


def _combine(parts: Sequence[str], target: str) -> Support:
    """Return what is known of an activation whose operators run one by one: the worst of them decides."""
    found = {part: get_operator_support(part, target) for part in parts}
    for status in ("fallback", "unknown"):
        for part, support in found.items():
            if support.status == status:
                return Support(
                    status, f"{part}: {support.note}" if len(parts) > 1 else support.note, support.source, support.date
                )
    last = found[parts[-1]]
    return Support("native", f"as {join_words(parts)}" if len(parts) > 1 else last.note, last.source, last.date)


@cache
def read_operators(path: Path = FILE) -> Mapping[str, Mapping[str, Support]]:
    """Return what the file says of operators that are not activations, by target and operator.

    >>> read_operators()["rknn"]["TopK"].note
    'on the CPU'
    """
    found: dict[str, dict[str, Support]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            support = Support(cast(Status, row["status"]), row["note"], row["source"], row["date"])
            found.setdefault(row["target"], {}).update(dict.fromkeys(row["operators"].split(), support))
    return found


def summarise_operators(rows: Sequence[OperatorSupport], target: str) -> str:
    """Return in one sentence how many operators are native, and which are not.

    >>> rows = judge_operators({"Conv": 72, "GridSample": 6, "TopK": 2, "Gemm": 27}, "rknn")
    >>> summarise_operators(rows, "rknn")
    'rknn: 72 of 107 operators native; fallback: GridSample (6) and TopK (2); unknown: Gemm (27)'
    """
    native = sum(row.count for row in rows if row.status == "native")
    total = format_count(sum(row.count for row in rows), "operator")
    named = {status: join_words(_name(rows, status)) for status in STATUSES[1:]}
    others = "".join(f"; {status}: {names}" for status, names in named.items() if names)
    return f"{target}: {native:,} of {total} native{others}"


def _name(rows: Iterable[OperatorSupport], status: Status) -> list[str]:
    """Return the operators of a status with their numbers, the most frequent first."""
    chosen = sorted((row for row in rows if row.status == status), key=lambda row: (-row.count, row.operator))
    return [f"{row.operator} ({row.count})" for row in chosen]


def list_operator_warnings(rows: Iterable[OperatorSupport], target: str) -> list[str]:
    """Return a sentence for the operators that a target runs elsewhere or not at all, and for those not known.

    Those of which the same source says the same share a sentence.

    Args:
        rows: The operators, as returned by `list_operators`.
        target: Name of the deployment target.
    """
    groups: dict[Support, list[OperatorSupport]] = {}
    for row in rows:
        if row.status != "native":
            groups.setdefault(Support(row.status, row.note, row.source, row.date), []).append(row)
    caveat = get_target(target).caveat
    return [
        _describe(support, _name(same, support.status), target) + (f"; {caveat}" if caveat else "")
        for support, same in sorted(groups.items(), key=lambda group: STATUSES.index(group[0].status))
    ]


def _describe(support: Support, operators: Sequence[str], target: str) -> str:
    """Return the sentence about operators that are not native."""
    verb = "is" if len(operators) == 1 else "are"
    said = f"{verb} not native" if support.status == "fallback" else f"{verb} not known to be native"
    where = f" ({support.source}; {support.date})" if support.source else ""
    return f"{join_words(operators, len(operators))} {said} on {target}: {support.note}{where}"


def format_operators(rows: Iterable[OperatorSupport]) -> str:
    """Return the operators as a table in plain text, without their sources."""
    cells = [(row.operator, str(row.count), row.status, row.note) for row in rows]
    return "\n".join(align_columns([("operator", "count", "status", "note"), *cells]))


# ---------------------------------------------------------------- counting


def count_operators(model: str | os.PathLike[str] | onnx.ModelProto) -> Counter[str]:
    """Return how often each operator occurs in an ONNX graph, in the order of the graph.

    Activations that consist of several operators count once, under their own name with their operators, such as
    "SiLU (Sigmoid, Mul)"; so do a `Clip` that is a ReLU6 or a HardTanh. Operators outside of ONNX's own set have their
    domain in front.

    Args:
        model: An ONNX file, or a model that was loaded.

    Raises:
        InputError: There is no such file, it is not an ONNX model, or `onnx` is not installed.
    """
    try:
        from onnx import inliner  # optional
    except ImportError:
        raise InputError("listing the operators of a graph needs onnx: pip install 'rtdetr-act[export]'") from None

    loaded = _load(model) if isinstance(model, str | os.PathLike) else model
    if loaded.functions:
        loaded = inliner.inline_local_functions(loaded)
    return Counter(chain.from_iterable(_iterate_operators(graph) for graph in _iterate_graphs(loaded.graph)))


def _load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Load an ONNX file without its external weights."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node:
        raise InputError(f"{path} is not an ONNX model")
    return model


def _iterate_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those in its nodes, such as the branches of an If."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            for each in inner:
                yield from _iterate_graphs(each)


def _iterate_operators(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield each operator of a graph, without those of its subgraphs; an activation once for all of its operators."""
    view = _View(graph)
    matched: dict[int, str] = {}  # what a node is listed as, by its position; "" for those that another one stands for
    for position, node in enumerate(view.nodes):
        for pattern, others in view.match(node):
            if position not in matched and not any(other in matched for other in others):
                matched.update(dict.fromkeys(others, ""))
                matched[position] = pattern.operator
    for position, node in enumerate(view.nodes):
        name = matched.get(position, _get_operator(node))
        if name and node.op_type not in _NOT_COUNTED:
            yield name


def _get_operator(node: onnx.NodeProto) -> str:
    """Return the name of a node's operator, with its domain if that is not ONNX's own."""
    return node.op_type if node.domain in _ONNX_DOMAINS else f"{node.domain}:{node.op_type}"


class _View:
    """A graph as the patterns see it: without identities, and without the quantisation of tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.initializers = {each.name: each for each in graph.initializer}
        self.producers: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = {}
        self.aliases: dict[str, str] = {}
        for position, node in enumerate(self.nodes):
            if node.op_type in ("Identity", *_QUANTIZATION):
                self.aliases[node.output[0]] = self.resolve(node.input[0])
                continue
            self.producers.update(dict.fromkeys(node.output, position))
            for name in node.input:
                self.consumers.setdefault(self.resolve(name), []).append(position)
        for result in graph.output:  # a result of the graph has a reader outside of it
            self.consumers.setdefault(self.resolve(result.name), []).append(-1)

    def resolve(self, name: str) -> str:
        """Return the tensor that a tensor is a copy of."""
        return self.aliases.get(name, name)

    def inputs(self, node: onnx.NodeProto) -> list[str]:
        """Return the inputs of a node."""
        return [self.resolve(name) for name in node.input]

    def match(self, node: onnx.NodeProto) -> Iterator[tuple[_Pattern, tuple[int, ...]]]:
        """Yield the patterns that end, or for GELU start, with a node, and the positions of their other nodes."""
        if node.op_type == "Clip" and (pattern := _CLIPS.get(self.read_limits(node))):
            yield pattern, ()
        elif node.op_type == "Mul" and len(node.input) == 2:
            left, right = self.inputs(node)
            for value, gate in ((left, right), (right, left)):
                yield from self._match_gate(value, gate)
        elif node.op_type == "Erf":
            yield from self._match_gelu(node)

    def _match_gate(self, value: str, gate: str) -> Iterator[tuple[_Pattern, tuple[int, ...]]]:
        """Yield x·g(x), where x is a tensor and g one of the gates."""
        for pattern in (_SILU, _HARDSWISH, _MISH):
            tensor, found = gate, []
            for part in reversed(pattern.parts[:-1]):
                position = self.find_producer(tensor, part)
                if position is None or not self.is_read_once(tensor):
                    break
                found.append(position)
                tensor = self.resolve(self.nodes[position].input[0])
            else:
                if tensor == value and (pattern is not _HARDSWISH or _has_sixths(self.nodes[found[0]])):
                    yield pattern, tuple(found)

    def _match_gelu(self, erf: onnx.NodeProto) -> Iterator[tuple[_Pattern, tuple[int, ...]]]:
        """Yield x·(1 + erf(x / √2)) / 2, the half being multiplied in front or behind."""
        scaled = self.resolve(erf.input[0])
        scale = self.find_producer(scaled, "Div", "Mul")
        added = self.find_only_consumer(erf.output[0], "Add")
        product = None if added is None else self.find_only_consumer(self.nodes[added].output[0], "Mul")
        if scale is None or added is None or product is None:
            return
        tensor = self.find_variable(self.nodes[scale])
        other = next(
            (name for name in self.inputs(self.nodes[product]) if name != self.resolve(self.nodes[added].output[0])), ""
        )
        if other == tensor:
            half = self.find_only_consumer(self.nodes[product].output[0], "Mul")
        else:
            half = self.find_producer(other, "Mul", "Div")
            if half is not None and self.find_variable(self.nodes[half]) != tensor:
                half = None
        if half is not None:
            yield _GELU, (scale, added, product, half)

    def find_producer(self, name: str, *operators: str) -> int | None:
        """Return the position of the node that computes a tensor, if it is one of some operators."""
        position = self.producers.get(name)
        return position if position is not None and self.nodes[position].op_type in operators else None

    def find_only_consumer(self, name: str, operator: str) -> int | None:
        """Return the position of the only node that reads a tensor, if it is a certain operator."""
        consumers = self.consumers.get(self.resolve(name), [])
        if len(consumers) != 1 or consumers[0] < 0 or self.nodes[consumers[0]].op_type != operator:
            return None
        return consumers[0]

    def is_read_once(self, name: str) -> bool:
        """Return whether one node alone reads a tensor."""
        return len(self.consumers.get(name, ())) == 1

    def find_variable(self, node: onnx.NodeProto) -> str:
        """Return the input of a node that is not a constant; "" if there are several, or none."""
        names = [name for name in self.inputs(node) if self.read_constant(name) is None]
        return names[0] if len(names) == 1 else ""

    def read_constant(self, name: str) -> np.ndarray | None:
        """Return the value of a constant tensor, None for others and for values in another file."""
        from onnx import TensorProto, numpy_helper

        tensor = self.initializers.get(name)
        position = self.producers.get(name)
        if tensor is None and position is not None and self.nodes[position].op_type == "Constant":
            tensor = next((each.t for each in self.nodes[position].attribute if each.name == "value"), None)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    def read_limits(self, clip: onnx.NodeProto) -> tuple[float, float]:
        """Return the limits of a Clip, which are inputs from opset 11 on and attributes before; NaN if not constant."""
        attributes = {each.name: each.f for each in clip.attribute}
        found = []
        for index, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
            limit = attributes.get(name, default)
            if len(clip.input) > index and clip.input[index]:
                value = self.read_constant(self.resolve(clip.input[index]))
                limit = np.nan if value is None else value.item()
            found.append(float(limit))
        return found[0], found[1]


def _has_sixths(hard_sigmoid: onnx.NodeProto) -> bool:
    """Return whether a HardSigmoid is clamp(x/6 + 1/2, 0, 1), which is not ONNX's default."""
    attributes = {each.name: each.f for each in hard_sigmoid.attribute}
    return bool(np.isclose([attributes.get("alpha", 0.2), attributes.get("beta", 0.5)], [1 / 6, 0.5]).all())
