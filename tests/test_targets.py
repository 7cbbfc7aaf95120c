"""What edge targets run natively, as the lists have it and as commands tell it."""

from __future__ import annotations

import builtins
import csv
import importlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_cli import run
from ultralytics import YOLO

from rtdetr_act import names, patch_model
from rtdetr_act.activations.edge_targets import DATES
from rtdetr_act.activations.registry import get_entry
from rtdetr_act.deploy.operators import (
    ACTIVATIONS,
    FILE,
    STATUSES,
    count_operators,
    format_operators,
    get_operator_support,
    judge_operators,
    list_operator_warnings,
    list_operators,
    read_operators,
    summarise_operators,
)
from rtdetr_act.deploy.targets import TARGETS, get_native_support, list_target_warnings
from rtdetr_act.errors import InputError

ROWS = list(csv.DictReader(FILE.read_text(encoding="utf-8").splitlines()))


def test_every_entry_is_of_the_zoo_and_names_its_source() -> None:
    assert set(TARGETS) == {
        "rknn", "hailo", "edgetpu", "vitis-dpu", "openvino", "qualcomm-htp", "ti-tidl", "axelera"
    }  # fmt: skip
    for name in names():
        for target, native in get_entry(name).targets.items():
            assert target in TARGETS and any(site in native.source for site in ("github.com/", ".com/", ".ai/"))
            assert native.date
    assert all(get_native_support("relu", target) for target in TARGETS)


def test_what_folds_is_judged_by_what_it_becomes() -> None:
    for target in TARGETS:
        assert (
            get_native_support("arelu", target)
            == get_native_support("leaky_relu", target)
            == get_native_support("rrelu", target)
        )
    assert get_native_support("arelu", "edgetpu") is None


def test_a_model_is_warned_of_what_its_target_does_not_run(tmp_path: Path) -> None:
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())))
    (stock,) = list_target_warnings(model, "vitis-dpu")
    assert stock.startswith("silu (") and "not native on vitis-dpu" in stock
    (product,) = list_target_warnings(model, "edgetpu")
    assert "as two operators, Sigmoid and Mul" in product
    sites = len(patch_model(model, "arelu"))
    (folded,) = list_target_warnings(model, "vitis-dpu")
    assert (
        folded.startswith(f"arelu ({sites} sites) on vitis-dpu: the slope becomes 26/256") and "docs.amd.com" in folded
    )
    assert list_target_warnings(model, "rknn") == []
    patch_model(model, "relu")
    assert [list_target_warnings(model, name) for name in ("edgetpu", "vitis-dpu", "openvino", "rknn")] == [
        [],
        [],
        [],
        [],
    ]


def test_commands_tell(tmp_path: Path) -> None:
    printed = run("acts", "--for", "vitis-dpu")
    assert "26/256" in printed and "not native: aconc," in printed
    with pytest.raises(InputError, match="there is no target 'rknm'; did you mean 'rknn'"):
        run("acts", "--for", "rknm")
    with pytest.raises(InputError, match="there is no target 'tpu'"):
        run("train", "--act", "arelu", "--for", "tpu")


# ---------------------------------------------------------------- operators


def build(nodes: list[Any], initializers: Mapping[str, float] | None = None, opset: int = 18) -> Any:
    """Return an ONNX model of one input x and one output y."""
    onnx = pytest.importorskip("onnx")
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4])  # noqa: E731
    constants = [
        onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [number])
        for name, number in (initializers or {}).items()
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [value("x")], [value("y")], constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def node(operator: str, inputs: str, output: str = "y", **attributes: Any) -> Any:
    """Return an ONNX node; its inputs are separated by spaces."""
    return pytest.importorskip("onnx").helper.make_node(operator, inputs.split(), [output], **attributes)


def test_every_row_names_operators_of_a_target_with_source_and_date() -> None:
    assert {row["target"] for row in ROWS} == set(TARGETS)
    for row in ROWS:
        assert row["status"] in STATUSES and row["source"] and row["date"]
        assert row["date"] == DATES.get(row["source"], row["date"]), "one source has one date"
    pairs = Counter((row["target"], operator) for row in ROWS for operator in row["operators"].split())
    assert max(pairs.values()) == 1 and all((target, "*") in pairs for target in TARGETS)


def test_operators_have_the_names_of_onnx() -> None:
    onnx = pytest.importorskip("onnx")
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""} | {"*"}
    # Newer than the oldest supported onnx.
    known |= {"RMSNormalization", "RotaryEmbedding", "STFT", "GroupNormalization", "DeformConv", "BitwiseAnd"}
    known |= {"BitwiseNot", "BitwiseOr", "BitwiseXor", "Mish", "Gelu"}
    named = {operator for row in ROWS for operator in row["operators"].split()}
    assert named <= known and set(ACTIVATIONS) <= known


def test_an_activation_is_native_by_its_entry_alone() -> None:
    for target, rows in read_operators().items():
        assert not {operator for operator, each in rows.items() if each.status == "native"} & set(ACTIVATIONS)
        for operator, name in ACTIVATIONS.items():
            native = get_native_support(name, target)
            support = get_operator_support(operator, target)
            assert (support.status == "native") == (native is not None)
            assert native is None or (support.note, support.source) == (native.note, native.source)
            assert native is None or operator not in rows


def test_softmax_over_channels_is_native_only_where_the_operator_is() -> None:
    for target in TARGETS:
        if get_native_support("softmax", target):
            assert get_operator_support("Softmax", target).status == "native"


@pytest.mark.parametrize(
    ("nodes", "initializers", "counted"),
    [
        ([("Sigmoid", "x", "s"), ("Mul", "x s")], {}, {"SiLU (Sigmoid, Mul)": 1}),
        ([("Sigmoid", "x", "s"), ("Mul", "s x")], {}, {"SiLU (Sigmoid, Mul)": 1}),
        ([("Sigmoid", "x", "s"), ("Mul", "s s")], {}, {"Sigmoid": 1, "Mul": 1}),
        # The gate is read by another operator, too: it is computed, whatever a compiler makes of the product.
        ([("Sigmoid", "x", "s"), ("Mul", "x s", "p"), ("Add", "p s")], {}, {"Sigmoid": 1, "Mul": 1, "Add": 1}),
        ([("Softplus", "x", "s"), ("Tanh", "s", "t"), ("Mul", "x t")], {}, {"Mish (Softplus, Tanh, Mul)": 1}),
        (
            [("HardSigmoid", "x", "s", {"alpha": 1 / 6}), ("Mul", "x s")],
            {},
            {"HardSwish (HardSigmoid, Mul)": 1},
        ),
        ([("HardSigmoid", "x", "s"), ("Mul", "x s")], {}, {"HardSigmoid": 1, "Mul": 1}),
        ([("Clip", "x low high")], {"low": 0.0, "high": 6.0}, {"ReLU6 (Clip)": 1}),
        ([("Clip", "x low high")], {"low": -1.0, "high": 1.0}, {"HardTanh (Clip)": 1}),
        ([("Clip", "x low")], {"low": 0.0}, {"Clip": 1}),
        (
            [
                ("Div", "x root", "d"), ("Erf", "d", "e"), ("Add", "e one", "a"),
                ("Mul", "x a", "m"), ("Mul", "m half"),
            ],
            {"root": 2**0.5, "one": 1.0, "half": 0.5},
            {"GELU (Div, Erf, Add, Mul)": 1},
        ),
        (
            [
                ("Div", "x root", "d"), ("Erf", "d", "e"), ("Add", "e one", "a"),
                ("Mul", "x half", "m"), ("Mul", "m a"),
            ],
            {"root": 2**0.5, "one": 1.0, "half": 0.5},
            {"GELU (Div, Erf, Add, Mul)": 1},
        ),
        ([("Erf", "x")], {}, {"Erf": 1}),
        ([("Identity", "x", "i"), ("Sigmoid", "i", "s"), ("Mul", "x s")], {}, {"SiLU (Sigmoid, Mul)": 1}),
    ],
)  # fmt: skip
def test_an_activation_of_several_operators_counts_once(
    nodes: list[Any], initializers: dict[str, float], counted: dict[str, int]
) -> None:
    made = [node(*[part for part in each if isinstance(part, str)],
                 **next((part for part in each if isinstance(part, dict)), {})) for each in nodes]  # fmt: skip
    assert count_operators(build(made, initializers)) == counted


def test_quantised_graphs_subgraphs_functions_and_other_domains_count() -> None:
    onnx = pytest.importorskip("onnx")
    quantised = [
        node("Sigmoid", "x", "s"),
        node("QuantizeLinear", "s scale", "q"),
        node("DequantizeLinear", "q scale", "d"),
        node("Mul", "x d"),
    ]
    assert count_operators(build(quantised, {"scale": 0.1})) == {
        "QuantizeLinear": 1, "DequantizeLinear": 1, "SiLU (Sigmoid, Mul)": 1
    }  # fmt: skip
    branch = onnx.helper.make_graph([node("GridSample", "x x", "b")], "branch", [], [])
    chosen = build([node("If", "x", then_branch=branch, else_branch=branch)])
    assert count_operators(chosen) == {"If": 1, "GridSample": 2}
    own = build([node("Gelu", "x", domain="com.microsoft")])
    (row,) = list_operators(own, "rknn")
    assert (row.operator, row.status, row.source) == ("com.microsoft:Gelu", "unknown", "")
    function = onnx.helper.make_function("local", "Gate", ["x"], ["y"], [node("TopK", "x x")], own.opset_import[:1])
    called = build([node("Gate", "x", domain="local")])
    called.opset_import.append(onnx.helper.make_opsetid("local", 1))
    called.functions.append(function)
    assert count_operators(called) == {"TopK": 1}


def test_what_is_no_graph_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(InputError, match=r"missing\.onnx cannot be read: No such file"):
        list_operators(tmp_path / "missing.onnx", "rknn")
    for content in (b"", b"no graph at all"):
        (tmp_path / "wrong.onnx").write_bytes(content)
        with pytest.raises(InputError, match=r"wrong\.onnx is not an ONNX model"):
            list_operators(tmp_path / "wrong.onnx", "rknn")
    with pytest.raises(InputError, match="there is no target 'tpu'"):
        list_operators(tmp_path / "wrong.onnx", "tpu")
    load = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "onnx":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"needs onnx: pip install 'rtdetr-act\[export\]'"):
        list_operators(tmp_path / "wrong.onnx", "rknn")


def test_summary_and_warnings_name_what_is_not_native() -> None:
    counts = {"Conv": 72, "GridSample": 6, "TopK": 2, "GatherElements": 1, "Gemm": 27, "LeakyRelu": 51}
    rows = judge_operators(counts, "rknn")
    assert summarise_operators(rows, "rknn") == (
        "rknn: 123 of 159 operators native; fallback: GridSample (6), TopK (2) and GatherElements (1); "
        "unknown: Gemm (27)"
    )
    refused, on_cpu, unknown = list_operator_warnings(rows, "rknn")
    assert refused.startswith("GridSample (6) is not native on rknn: rknn-toolkit2 does not take it")
    assert on_cpu.startswith(
        "TopK (2) and GatherElements (1) are not native on rknn: on the CPU (github.com/airockchip"
    )
    assert unknown.startswith("Gemm (27) is not known to be native on rknn") and "2025-07-29" in unknown
    assert format_operators(rows).splitlines()[1].split() == ["Conv", "72", "native"]
    assert summarise_operators(judge_operators({"Conv": 1}, "hailo"), "hailo") == "hailo: 1 of 1 operator native"
    assert list_operator_warnings(judge_operators({"Conv": 1}, "hailo"), "hailo") == []


def test_an_activation_runs_as_its_worst_operator_where_the_target_does_not_know_it() -> None:
    silu = get_operator_support("SiLU (Sigmoid, Mul)", "vitis-dpu")
    assert silu.status == "fallback" and silu.note.startswith("Sigmoid: on the CPU")
    assert get_operator_support("Mish (Softplus, Tanh, Mul)", "qualcomm-htp").note == "as Softplus, Tanh and Mul"
    assert get_operator_support("ReLU6 (Clip)", "axelera").status == "native"
    assert get_operator_support("Clip", "axelera").status == "fallback"


@pytest.mark.parametrize(
    ("activation", "operator"), [("arelu", "LeakyRelu"), ("relu", "Relu"), ("silu", "SiLU (Sigmoid, Mul)")]
)
@pytest.mark.integration
def test_the_command_tells_of_the_operators_of_an_export(activation: str, operator: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model = YOLO(str(tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())))
    sites = len(patch_model(model, activation))
    model.save(tmp_path / "best.pt")
    printed = run("export", str(tmp_path / "best.pt"), "imgsz=64", "for=vitis-dpu")
    (line,) = [line for line in printed.splitlines() if line.startswith(operator)]
    assert line.removeprefix(operator).split()[0] == str(sites)
    assert line.split()[len(operator.split()) + 1] == ("fallback" if activation == "silu" else "native")
    (summary,) = [line for line in printed.splitlines() if line.startswith("vitis-dpu: ")]
    assert " operators native; fallback: " in summary and "Sigmoid (1)" in summary
    assert "warning: Sigmoid (1) is not native on vitis-dpu: on the CPU" in printed
    assert "are not known to be native on vitis-dpu" in printed


def test_the_page_of_targets_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    script = importlib.import_module("operator_tables")
    counts = script.read_counts()
    assert counts["rtdetr-l"]["stock"]["GridSample"] == 18 and counts["rtdetr-l"]["relu"]["TopK"] == 2
    assert script.PAGE.read_text(encoding="utf-8") == script.compose_markdown(counts)
