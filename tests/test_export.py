"""Exported files against torch: every activation, the graph of DY-ReLU, quantisation, and what is refused."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import run
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.utils import LOGGER

from rtdetr_act import create, patch_model
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.activations.dyrelu import ConvDyReLU
from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.integrations.ultralytics import int8
from rtdetr_act.integrations.ultralytics.datasets import check_data
from rtdetr_act.integrations.ultralytics.export import _int8_argument, check_export, export_model, exporting
from rtdetr_act.integrations.ultralytics.int8 import measure_int8
from rtdetr_act.integrations.ultralytics.latency import pareto_front
from rtdetr_act.surgery.sites import find_sites

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")

FORMATS = ("onnx", "openvino", "torchscript", "ncnn")
# Ours, and those of torch that one of the formats is given in other operators. `make parity` has each alone, and the
# others, which torch exports as they are.
ACTIVATIONS = ("aconc", "aglu", "apa", "arelu", "dyrelu_a", "dyrelu_b", "dyrelu_c", "frelu", "glu", "meta_aconc")
ACTIVATIONS += ("prelu", "prelu(per_channel=True)", "elu(inplace=True)", "hardshrink", "logsigmoid", "softmin")
ACTIVATIONS += ("softshrink", "softsign", "tanhshrink", "threshold(0.1, 0.05)", "golu", "hard_mish", "pwlu", "rational")
ACTIVATIONS += ("repact", "smu(0.1, 1.5)", "smu1(0.1, 0.5)", "squared_relu", "squareplus", "star_relu", "swish_beta")
ACTIVATIONS += ("swish_beta(per_channel=True)", "telu")
# Of the largest output: twice what rounding changes in NCNN, and a thirtieth of what 1 % on one activation does.
TOLERANCE = 2e-5
SIDE_BY_SIDE = {
    "nc": 2,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], *([0, 1, "Conv", [8, 3, 2], activation] for activation in ACTIVATIONS)],
    "head": [
        [list(range(1, 1 + len(ACTIVATIONS))), 1, "Concat", [1]],
        [-1, 1, "Conv", [32, 3, 2]],
        [[-2, -1], 1, "Detect", ["nc"]],
    ],
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    yield
    LOGGER.setLevel(level)


def settled(folder: Path, activation: str, model_yaml: dict | None = None) -> Any:
    """Return a tiny model as if it were trained: its outputs depend on all of its activations.

    Their parameters are away from the start, BatchNorm has statistics of its inputs, and predictions differ: the biases
    that an untrained model starts with hide what comes before.
    """
    torch.manual_seed(0)
    path = tiny.write_yaml(folder / "tiny.yaml", model_yaml or tiny.yolo())
    model = RTDETR(str(path)) if "RTDETRDecoder" in path.read_text() else YOLO(str(path))
    if activation != "stock":
        patch_model(model, activation)
    for site in find_sites(model):
        for parameter in site.module.parameters() if isinstance(site.module, nn.Module) else ():
            parameter.data += 0.2 * torch.randn_like(parameter)
    for module in model.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.normal_(0, 0.3)
            module.momentum = 1.0
    model.model.eval()  # in training, RT-DETR of older releases asks for labels
    for module in model.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        model.model(torch.rand(4, 3, 64, 64))
        head = model.model.model[-1]
        for layers in (*getattr(head, "cv2", ()), *getattr(head, "cv3", ())):
            layers[-1].weight *= 10
            layers[-1].bias.zero_()
    model.model.eval()
    model.model.pt_path = str(folder / "tiny.pt")
    return model


def answer(model: Any, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model(image)[0]


def run_file(path: Path, form: str, image: torch.Tensor) -> torch.Tensor:
    if form == "openvino":  # in float32; by itself it takes bfloat16 where the CPU has it
        import openvino

        compiled = openvino.Core().compile_model(next(path.glob("*.xml")), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled(image.numpy())[0])
    result = AutoBackend(str(path), device=torch.device("cpu"), verbose=False)(image)
    return torch.as_tensor(result[0] if isinstance(result, (list, tuple)) else result)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.integration
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_computes_every_activation(form: str, tmp_path: Path) -> None:
    if form != "torchscript":
        pytest.importorskip(form)
    model, image = settled(tmp_path, "stock", SIDE_BY_SIDE), torch.rand(1, 3, 64, 64)
    found = run_file(export_model(model, form, imgsz=64), form, image)
    assert difference(found, answer(model, image)) < TOLERANCE


def test_an_activation_that_is_off_by_a_hundredth_is_seen(tmp_path: Path) -> None:
    model, image = settled(tmp_path, "stock", SIDE_BY_SIDE), torch.rand(1, 3, 64, 64)
    expected = answer(model, image)
    for layer, activation in enumerate(ACTIVATIONS, 1):
        hook = model.model.model[layer].act.register_forward_hook(lambda module, inputs, output: 1.01 * output)
        assert difference(answer(model, image), expected) > 20 * TOLERANCE, activation
        hook.remove()


@pytest.mark.integration
def test_the_exported_graph_is_that_of_leaky_relu(tmp_path: Path) -> None:
    graphs = {}
    for activation in ("arelu", "leaky_relu(0.3)"):
        folder = tmp_path / activation[:5]
        path = export_model(settled(folder, activation, tiny.RTDETR), imgsz=64)
        graphs[activation] = operators(path)
    assert graphs["arelu"] == graphs["leaky_relu(0.3)"]
    assert graphs["arelu"]["LeakyRelu"] == tiny.CONV_SITES


@pytest.mark.integration
def test_export_leaves_the_model_and_can_be_told_not_to_fold(tmp_path: Path) -> None:
    model = settled(tmp_path, "arelu")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert operators(Path(model.export(format="onnx", imgsz=64)))["LeakyRelu"] == len(find_sites(model))
    with exporting(fold=False):
        assert "LeakyRelu" not in operators(Path(model.export(format="onnx", imgsz=64)))
    assert "LeakyRelu" not in operators(export_model(model, imgsz=64, fold=False))
    after = model.model.state_dict()
    assert sum(isinstance(module, AReLU) for module in model.model.modules()) == len(find_sites(model))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("activation", ["dyrelu_a", "dyrelu_b", "dyrelu_c", "dyrelu_b(reduction=4, k=3, lambda_a=0.7)"])
def test_dyrelu_is_pooling_two_layers_and_a_maximum(activation: str, tmp_path: Path) -> None:
    module = create(activation, channels=16)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(2, 16, 6, 7)
    written = ConvDyReLU(module)
    torch.testing.assert_close(written(x), module(x), rtol=1e-5, atol=1e-6)
    path = tmp_path / "one.onnx"
    torch.onnx.export(written.eval(), (x,), str(path), opset_version=17, dynamo=False)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    found = Counter(node.op_type for node in graph.node)
    layers = 3 if "_c" in activation else 2
    assert found["Conv"] == layers and found["GlobalAveragePool"] == layers - 1
    assert found["Max"] == module.k - 1
    assert not {"Transpose", "Reshape", "Unsqueeze", "Where", "Gather", "Shape"} & set(found)
    assert max(len(value.type.tensor_type.shape.dim) for value in graph.value_info) == 4


@pytest.mark.integration
def test_dynamic_batch_and_size(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = settled(tmp_path, "stock", SIDE_BY_SIDE)
    session = runtime.InferenceSession(str(export_model(model, imgsz=64, dynamic=True)))
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64), (2, 3, 96, 160)):
        image = torch.rand(shape)
        found = torch.from_numpy(session.run(None, {"images": image.numpy()})[0])
        assert difference(found, answer(model, image)) < TOLERANCE


@pytest.mark.integration
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_int8_keeps_the_answer_nearly(form: str, data: Any, tmp_path: Path) -> None:
    pytest.importorskip("nncf" if form == "openvino" else "onnxruntime")
    model = settled(tmp_path, "arelu")
    path = export_model(model, form, int8=True, imgsz=64, data=str(data.detect))
    image = torch.rand(1, 3, 64, 64)
    off = difference(run_file(path, form, image), answer(model, image))
    assert 1e-4 < off < 0.3, "quantised, and still the same network"
    if form == "onnx":
        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert metadata["task"] == "detect" and metadata["imgsz"] == "[64, 64]"
        assert "'quantize': 8" in metadata.get("args", "'quantize': 8")
        assert [each.name for each in tmp_path.iterdir() if each.suffix == ".onnx"] == ["tiny_int8.onnx"]
        original = export_model(model, imgsz=64)
        errors = measure_int8(model, original, path, check_data(str(data.detect), "detect"), 64, images=2)
        assert errors.images == 2 and all(each.sqnr > 10 for each in errors.tensors)
        assert {site.name for site in find_sites(model)} & {each.name for each in errors.tensors}


@pytest.mark.kill
def test_int8_on_a_full_disk_leaves_the_old_file(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model = settled(tmp_path, "relu")
    (tmp_path / "tiny_int8.onnx").write_bytes(b"old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with contextlib.ExitStack() as stack:
        load = int8.load_calibration_images

        def fill(exporter: Any) -> Any:  # after the float32 file was written
            images = load(exporter)
            stack.enter_context(tiny.full_disk(2000))
            return images

        monkeypatch.setattr(int8, "load_calibration_images", fill)
        with pytest.raises(InputError, match=r"cannot write .*tiny.*: File too large; what was exported there before"):
            export_model(model, int8=True, imgsz=64, data=str(data.detect))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.integration
def test_int8_of_rtdetr_keeps_its_decoder_in_float(data: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = settled(tmp_path, "relu", tiny.RTDETR)
    model.export(format="onnx", imgsz=64, data=str(data.detect), **_int8_argument())
    graph = onnx.load(tmp_path / "tiny_int8.onnx").graph
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = {node.name: node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    integers = {name for name, node in layers.items() if set(node.input) & dequantised}
    behind = {name for name in layers if "self_attn" in name or "dec_bbox_head" in name}
    assert len(integers) > 20 and len(behind) > 4 and not integers & behind


def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path: Path) -> None:
    model = settled(tmp_path, "arelu", tiny.RTDETR)
    wrong = {
        "onxx": "no export format 'onxx' in Ultralytics .* did you mean 'onnx'",
        "ncnn": "NCNN cannot hold RT-DETR's decoder",
    }
    if find_spec("coremltools") is None:
        wrong["coreml"] = "format=coreml needs packages that are not installed: pip install coremltools"
    if find_spec("tensorrt") is None:
        wrong["TensorRT"] = "format=engine needs packages that are not installed: pip install tensorrt"
    for form, words in wrong.items():
        if form == "ncnn" and not find_spec("pnnx"):
            continue
        with pytest.raises(InputError, match=words) as caught:
            export_model(model, form, imgsz=64)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="has no INT8 export to torchscript"):
        check_export(model, "torchscript", int8=True)
    with pytest.raises(InputError, match="name a data set with data="):
        export_model(model, "openvino" if find_spec("nncf") else "onnx", int8=True, imgsz=64)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_pareto_front_has_no_point_that_another_beats() -> None:
    points = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.6), (4.0, 0.6), (1.0, 0.3)]
    assert pareto_front(points) == [(1.0, 0.3), (2.0, 0.6)]


def test_command_exports_folded(patched_run: Any, tmp_path: Path) -> None:
    weights = tmp_path / "best.pt"
    weights.write_bytes(patched_run.pt.read_bytes())
    printed = run("export", str(weights), "imgsz=64")
    path = Path(re.search(r"^file: (.+\.onnx)$", printed, re.MULTILINE)[1])
    assert operators(path)["LeakyRelu"] == tiny.CONV_SITES
    run("export", str(weights), "imgsz=64", "--no-fold")
    assert "LeakyRelu" not in operators(path)


def test_an_argument_that_a_format_does_not_take_is_one_sentence(patched_run: Any) -> None:
    from ultralytics.engine import exporter

    if not hasattr(exporter, "validate_args"):
        pytest.skip("this Ultralytics ignores such arguments")
    with pytest.raises(InputError, match=r"^argument 'simplify' is not supported for format='torchscript'"):
        run("export", str(patched_run.pt), "format=torchscript", "imgsz=64", "simplify=False")


def test_command_validates_and_predicts_folded(patched_run: Any, data: Any, tmp_path: Path) -> None:
    arguments = ["imgsz=64", "batch=4", "workers=0", "plots=False", f"project={tmp_path}", "device=cpu"]
    plain = run("val", str(patched_run.pt), "--data", str(data.detect), *arguments)
    folded = run("val", str(patched_run.pt), "--data", str(data.detect), "--fold", *arguments)
    scores = [re.findall(r"mAP50 [\d.]+  mAP50-95 [\d.]+", printed) for printed in (plain, folded)]
    assert scores[0] and scores[0] == scores[1] and "arelu -> leaky_relu" in folded
    folded = run("predict", str(patched_run.pt), "--fold", f"source={data.image}", f"project={tmp_path}", "imgsz=64")
    assert "arelu -> leaky_relu" in folded


def test_command_measures_files_and_scores_them(patched_run: Any, stock_run: Any, data: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    words = ["--model", str(stock_run.pt), "--model", str(patched_run.pt), "--format", "onnx", "--turns", "3"]
    printed = run("bench", *words, "--data", str(data.detect), "-o", str(tmp_path), "imgsz=64")
    assert "mAP50-95" in printed
    rows = json.loads((tmp_path / "formats.json").read_text())
    assert [(row["activation"], row["format"]) for row in rows] == [
        ("stock", "torch"), ("arelu", "torch"), ("stock", "onnx"), ("arelu", "onnx"),
    ]  # fmt: skip
    assert all(0 < row["median"] <= row["p95"] and row["megabytes"] > 0.1 for row in rows)
    assert all(0 < row["gflops"] < row["gflops_640"] / 50 and row["imgsz"] == 64 for row in rows)
    for words in ("64 x 64 pixels", "GFLOPs (640)", "GFLOPs (64)", "median of paired ratios"):
        assert words in printed
    assert rows[1]["scores"] == pytest.approx(rows[3]["scores"], abs=0.02)
    assert (tmp_path / "formats.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--int8", "--act", "arelu"), "name their formats with format=onnx,openvino"),
        (("--format", "onnx", "--act", "arelu", "batch=3"), "bench takes imgsz with format=, not 'batch'"),
        (("--format", "onxx", "--act", "arelu"), "no export format 'onxx'"),
        (("--model", "yolo11n.yaml", "--model", "rtdetr-n.yaml", "--act", "arelu"), "compares one model"),
        (("--format", "onnx", "--data", "coco9.yaml"), "no data set 'coco9.yaml'"),
    ],
)
def test_bench_says_what_is_wrong(words: tuple[str, ...], error: str) -> None:
    with pytest.raises(RtdetrActError, match=error):
        run("bench", *words)
