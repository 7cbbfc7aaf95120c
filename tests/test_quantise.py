"""INT8 by ONNX Runtime: what is computed in integers, what stays in float32, and the error of each layer."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdetr_act.analysis.quantisation_error import measure_quantisation, name_module, read_errors
from rtdetr_act.analysis.quantisation_figure import draw_quantisation_errors
from rtdetr_act.deploy.integer_hardswish import rewrite_hardswish
from rtdetr_act.deploy.onnx_graph import OnnxGraph
from rtdetr_act.deploy.quantise import choose_nodes, quantise_onnx
from rtdetr_act.errors import InputError

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")

CHANNELS = 16
Act = Callable[[str, str], list[Any]]


def node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(operator, list(inputs), [output], f"/model/{output}/{operator}", **attributes)


def relu(x: str, y: str) -> list[Any]:
    return [node("Relu", [x], y)]


def leaky_relu(x: str, y: str) -> list[Any]:
    return [node("LeakyRelu", [x], y, alpha=0.1)]


def silu(x: str, y: str) -> list[Any]:
    return [node("Sigmoid", [x], f"{y}_gate"), node("Mul", [x, f"{y}_gate"], y)]


def hardswish(x: str, y: str) -> list[Any]:
    return [node("HardSwish", [x], y)]


def mish(x: str, y: str) -> list[Any]:
    nodes = [node("Softplus", [x], f"{y}_soft"), node("Tanh", [f"{y}_soft"], f"{y}_gate")]
    return [*nodes, node("Mul", [x, f"{y}_gate"], y)]


def detector(act: Act) -> Any:
    """Return a network with a stem, a block with a shortcut and a concatenation, and a head with DFL."""
    rng = np.random.default_rng(0)
    weights = {
        "stem": (CHANNELS, 3, 3, 3),
        "a": (CHANNELS, CHANNELS, 3, 3),
        "b": (CHANNELS, CHANNELS, 3, 3),
        "head": (64, 2 * CHANNELS, 1, 1),
    }
    constants = {name: rng.normal(0, np.prod(shape[1:]) ** -0.5, shape) for name, shape in weights.items()}
    constants |= {f"{name}_bias": rng.normal(0, 0.1, shape[0]) for name, shape in weights.items()}
    constants |= {"dfl": np.arange(16).reshape(1, 16, 1, 1), "stride": np.array(8.0)}

    def conv(x: str, name: str, **attributes: Any) -> Any:
        return node("Conv", [x, name, f"{name}_bias"], f"{name}_out", **attributes)

    padded = {"pads": [1, 1, 1, 1]}
    nodes = [
        conv("images", "stem", strides=[2, 2], **padded), *act("stem_out", "x"),
        conv("x", "a", **padded), *act("a_out", "a_act"),
        conv("a_act", "b", **padded), *act("b_out", "b_act"),
        node("Add", ["x", "b_act"], "sum"),
        node("Concat", ["sum", "a_act"], "both", axis=1),
        conv("both", "head"),
        node("Reshape", ["head_out", "shape"], "split"),
        node("Transpose", ["split"], "bins", perm=[0, 2, 1, 3]),
        node("Softmax", ["bins"], "chances", axis=1),
        node("Conv", ["chances", "dfl"], "sides"),
        node("Mul", ["sides", "stride"], "output0"),
    ]  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(np.float32(value), name) for name, value in constants.items()]
    tensors.append(onnx.numpy_helper.from_array(np.array([1, 4, 16, 256]), "shape"))
    image = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 32, 32])
    output = onnx.helper.make_tensor_value_info("output0", onnx.TensorProto.FLOAT, [1, 1, 4, 256])
    graph = onnx.helper.make_graph(nodes, "detector", [image], [output], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(model, {"task": "detect", "names": "{0: 'cell'}"})
    onnx.checker.check_model(model)
    return model


def images(count: int = 4, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.random((1, 3, 32, 32), np.float32) for _ in range(count)]


def run(model: Path | bytes, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return runtime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"images": image})[0]


def fused_operators(path: Path) -> Counter[str]:
    """Count the operators of the graph that ONNX Runtime makes of a file."""
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".fused.onnx"))
    options.log_severity_level = 3  # it says that such a file is for this machine only
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(each.op_type for each in onnx.load(options.optimized_model_filepath).graph.node)


def quantise(folder: Path, act: Act = relu) -> tuple[Path, Path, Any]:
    original, quantised = folder / "best.onnx", folder / "best_int8.onnx"
    onnx.save(detector(act), original)
    return original, quantised, quantise_onnx(original, quantised, images())


# The operators in integers of the block: two convolutions and the head, the sum, the concatenation.
ALL = {"QLinearConv": 3, "QLinearAdd": 1, "QLinearConcat": 1}


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (relu, {}),
        (leaky_relu, {"QLinearLeakyRelu": 2}),
        (silu, {"QLinearSigmoid": 2, "QLinearMul": 2}),
        (hardswish, {"QLinearAdd": 3, "QLinearMul": 2}),
    ],
)
def test_all_between_the_layers_is_computed_in_integers(act: Act, expected: dict[str, int], tmp_path: Path) -> None:
    original, quantised, report = quantise(tmp_path, act)
    found = fused_operators(quantised)
    assert {name: count for name, count in found.items() if name.startswith("QLinear")} == {**ALL, **expected}
    assert found["Conv"] == 2, "the stem and the mean of the distribution"
    # The output of the stem once in, and that of the head once out.
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1
    assert len(report.quantised) == 3 and set(report.left) == {"/model/stem_out/Conv", "/model/sides/Conv"}
    image = images(1, seed=1)[0]
    expected_output, output = run(str(original), image), run(str(quantised), image)
    assert 0 < np.abs(output - expected_output).max() < 0.02 * np.abs(expected_output).max()


def test_an_activation_without_integer_kernel_leaves_the_convolutions_in_integers(tmp_path: Path) -> None:
    _, quantised, _ = quantise(tmp_path, mish)
    found = fused_operators(quantised)
    assert found["QLinearConv"] == 3 and found["Tanh"] == 3 and "QLinearMul" not in found


def test_weights_are_quantised_per_channel_and_metadata_kept(tmp_path: Path) -> None:
    _, quantised, _ = quantise(tmp_path)
    model = onnx.load(quantised)
    scales = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer if tensor.name.endswith("_scale")}
    assert scales["a_scale"] == [CHANNELS] and scales["head_scale"] == [64]
    assert {"task", "names"} <= {entry.key for entry in model.metadata_props}


def test_hardswish_is_rewritten_exactly() -> None:
    model, image = detector(hardswish), images(1)[0]
    for each in model.graph.initializer:  # so that the clipping is reached on both sides
        if each.name == "a":
            each.CopyFrom(onnx.numpy_helper.from_array(20 * onnx.numpy_helper.to_array(each), "a"))
    expected = run(model.SerializeToString(), image)
    assert rewrite_hardswish(model) == 3
    assert "HardSwish" not in {each.op_type for each in model.graph.node}
    onnx.checker.check_model(model)
    np.testing.assert_allclose(run(model.SerializeToString(), image), expected, rtol=1e-4, atol=1e-4)


def test_hardswish_is_left_where_others_read_the_convolution() -> None:
    model = detector(hardswish)
    reader = next(each for each in model.graph.node if each.op_type == "Add")
    reader.input[1] = "b_out"
    assert rewrite_hardswish(model) == 2
    assert [each.output[0] for each in model.graph.node if each.op_type == "HardSwish"] == ["b_act"]


def test_what_depends_on_a_selection_stays_in_float() -> None:
    model = detector(relu)
    count = onnx.numpy_helper.from_array(np.array([16]), "count")
    model.graph.initializer.append(count)
    top = onnx.helper.make_node("TopK", ["x", "count"], ["best", "indices"], "top", axis=1)
    index = next(index for index, each in enumerate(model.graph.node) if "a_out" in each.output)
    model.graph.node.insert(index, top)
    model.graph.node[index + 1].input[0] = "best"
    chosen = {each.name for each in choose_nodes(OnnxGraph(model))}
    assert not chosen


def test_layers_of_pooled_values_stay_in_float() -> None:
    model = detector(relu)
    weight = onnx.numpy_helper.from_array(np.zeros((CHANNELS, CHANNELS, 1, 1), np.float32), "squeeze")
    model.graph.initializer.append(weight)
    pool = node("GlobalAveragePool", ["x"], "pooled")
    conv = node("Conv", ["pooled", "squeeze"], "squeezed")
    scaled = node("Mul", ["x", "squeezed"], "scaled")
    index = next(index for index, each in enumerate(model.graph.node) if "a_out" in each.output)
    for offset, each in enumerate((pool, conv, scaled)):
        model.graph.node.insert(index + offset, each)
    model.graph.node[index + 3].input[0] = "scaled"
    chosen = {each.output[0] for each in choose_nodes(OnnxGraph(onnx.shape_inference.infer_shapes(model)))}
    assert "a_out" in chosen and not {"pooled", "squeezed", "scaled"} & chosen


def test_constant_nodes_count_as_weights(tmp_path: Path) -> None:
    model = detector(relu)
    expected = [each.name for each in choose_nodes(OnnxGraph(model))]
    for tensor in list(model.graph.initializer):
        model.graph.initializer.remove(tensor)
        constant = onnx.helper.make_node("Constant", [], [tensor.name], tensor.name, value=tensor)
        model.graph.node.insert(0, constant)
    assert [each.name for each in choose_nodes(OnnxGraph(model))] == expected


def test_wrong_input_is_one_sentence(tmp_path: Path) -> None:
    original, output = tmp_path / "best.onnx", tmp_path / "best_int8.onnx"
    model = detector(relu)
    onnx.save(model, original)
    with pytest.raises(InputError, match="images to calibrate on, and there are none"):
        quantise_onnx(original, output, [])
    model.opset_import[0].version = 12
    onnx.save(model, original)
    with pytest.raises(InputError, match="INT8 takes opset 13 or newer of ONNX, not 12"):
        quantise_onnx(original, output, images())
    model.opset_import[0].version = 17
    for each in model.graph.node:
        if each.op_type == "Conv":
            each.input[1] = "chances"
    onnx.save(model, original)
    with pytest.raises(InputError, match=r"none of the 0 layers of best\.onnx can be computed in 8 bits"):
        quantise_onnx(original, output, images())
    assert not output.exists()


def test_the_error_of_each_tensor(tmp_path: Path) -> None:
    original, quantised, _ = quantise(tmp_path)
    held_out = images(3, seed=1)
    errors = measure_quantisation(original, quantised, held_out)
    names = ["x", "a_act", "b_act", "sum", "both", "head_out"]
    assert [each.name for each in errors.tensors] == [f"model.{name}" for name in names]
    assert errors.images == 3 and all(25 < each.sqnr <= each.own_sqnr + 0.1 < 60 for each in errors.tensors)
    assert errors.tensors[0].low == 0 and errors.tensors[0].operator == "Relu"
    # Of an error that is uniform over a step, the mean square is a twelfth of that of the step.
    values = np.concatenate([read(original, "head_out", image).ravel() for image in held_out])
    scales = {tensor.name: tensor for tensor in onnx.load(quantised).graph.initializer}
    step = onnx.numpy_helper.to_array(scales["head_out_scale"])
    assert errors.tensors[5].own_sqnr == pytest.approx(10 * np.log10(np.square(values).mean() / (step**2 / 12)), abs=1)
    assert errors.to_csv().splitlines()[0] == "name,operator,low,high,sqnr,own_sqnr,drop"
    assert "SQNR, dB" in str(errors) and repr(errors).startswith("<QuantisationErrors: 6 tensors, ")


def read(path: Path, name: str, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([name], {"images": image})[0]


def test_a_spoiled_layer_is_the_one_that_drops(tmp_path: Path) -> None:
    original, quantised, _ = quantise(tmp_path)
    model = onnx.load(quantised)
    for tensor in model.graph.initializer:
        if tensor.name == "b_act_scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(0.5), tensor.name))
    onnx.save(model, quantised)
    errors = measure_quantisation(original, quantised, images(2))
    drops = {each.name: each.drop for each in errors.tensors}
    assert errors.find_drops(1)[0].name == "model.b_act" and drops["model.b_act"] > 10
    # The stem's output is from no other one, and the concatenation has what its worst input has.
    assert drops["model.x"] == 0 and abs(drops["model.both"]) < 3
    ratios = {each.name: each.sqnr for each in errors.tensors}
    assert drops["model.sum"] == pytest.approx(min(ratios["model.x"], ratios["model.b_act"]) - ratios["model.sum"])


def test_errors_are_drawn_beside_one_another(tmp_path: Path) -> None:
    original, quantised, _ = quantise(tmp_path)
    errors = {name: measure_quantisation(original, quantised, images(1, seed)) for seed, name in enumerate("ab")}
    above, below = draw_quantisation_errors(errors).axes
    for index, (name, each) in enumerate(errors.items()):
        assert above.lines[index].get_label() == name
        assert list(above.lines[index].get_ydata()) == [tensor.sqnr for tensor in each.tensors]
        assert list(below.lines[index].get_ydata()) == [tensor.high - tensor.low for tensor in each.tensors]


def test_errors_survive_their_record(tmp_path: Path) -> None:
    original, quantised, _ = quantise(tmp_path)
    errors = measure_quantisation(original, quantised, images(1))
    first = replace(errors.tensors[0], sqnr=math.inf)
    errors = replace(errors, tensors=(first, *errors.tensors[1:]))
    assert read_errors(json.loads(json.dumps(errors.to_dict()))) == errors


def test_errors_of_nothing_are_refused(tmp_path: Path) -> None:
    original, quantised, _ = quantise(tmp_path)
    with pytest.raises(InputError, match="measured on images, and there are none"):
        measure_quantisation(original, quantised, [])
    with pytest.raises(InputError, match="stores no tensor of"):
        measure_quantisation(original, original, images(1))


def test_modules_are_named_by_scopes() -> None:
    assert name_module("/model.2/m.0/cv1/act/Mul") == "model.2.m.0.cv1.act"
    assert name_module("node_conv2d_1") == "node_conv2d_1"
