"""What commands write is whole or as it was, exported files too: after a full disk, Ctrl-C and a kill."""

from __future__ import annotations

import json
import logging
import re
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from test_cli import run
from test_files import dead_process
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from rtdetr_act import patch_model
from rtdetr_act.analysis.curves import plot_activations
from rtdetr_act.analysis.diagnosis import Diagnosis, SiteDiagnosis
from rtdetr_act.analysis.diagnosis_report import write_diagnosis
from rtdetr_act.analysis.history import make_history
from rtdetr_act.analysis.history_figure import draw_history
from rtdetr_act.analysis.learned import Quantity
from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.integrations.ultralytics.costs import Cost, write_costs
from rtdetr_act.integrations.ultralytics.export import export_model, export_staged
from rtdetr_act.integrations.ultralytics.latency import Latency, measure_latencies, write_latencies
from rtdetr_act.timing import Ratio
from rtdetr_act.workflows.fold import fold_checkpoint

pytest.importorskip("resource", reason="Windows has no limit on the size of files")
OLD = b"an old file"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = LOGGER.level
    LOGGER.setLevel(logging.CRITICAL)
    yield
    LOGGER.setLevel(level)


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def arelu(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(tmp_path_factory.mktemp("models"), "arelu")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(tmp_path_factory.mktemp("models"), "stock")


def save(folder: Path, activation: str) -> bytes:
    model = YOLO(str(tiny.write_yaml(folder / "tiny.yaml", tiny.yolo())))
    if activation != "stock":
        patch_model(model, activation)
    model.ckpt = model.ckpt or {}  # None in 8.3
    model.save(folder / "best.pt")
    return (folder / "best.pt").read_bytes()


def load(content: bytes, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best.pt").write_bytes(content)
    return YOLO(folder / "best.pt")


# --- pictures and tables --------------------------------------------------------------------------------------------


def draw_learned(path: Path) -> None:
    draw_history(make_history([Quantity(f"model.{i}.act", "arelu", "alpha", 0.5) for i in range(60)]), path)


def write_bench(folder: Path) -> None:
    ratio = Ratio(1, 1, 1, 1)
    costs = [Cost(name, ratio, ratio, 1, 1, 1, 1) for name in ("stock", *"abcdefghijkl")]
    write_costs({"tiny": costs}, folder, "tiny")


def write_formats(folder: Path) -> None:
    scores = {"mAP50": 0.5, "mAP50-95": 0.25}
    names = [f"a variant of a long name {index}" for index in range(12)]
    found = [
        Latency(name, "onnx", 1 + i, 2, Ratio(1, 1, 1, 1), 1, 1, 1, "x", scores, 224, 1) for i, name in enumerate(names)
    ]
    write_latencies(found, folder, "formats")


def write_sites(folder: Path) -> None:
    sites = [SiteDiagnosis(f"model.{i}.act", i, "neck", "arelu", True, *[float(i)] * 10) for i in range(20)]
    write_diagnosis({"arelu": Diagnosis(tuple(sites), 1)}, folder, "title")


@pytest.mark.kill
@pytest.mark.parametrize(
    ("write", "names"),
    [
        (lambda folder: plot_activations(["silu"], folder / "curves.png"), ["curves.png"]),
        (lambda folder: draw_learned(folder / "learned.png"), ["learned.png"]),
        (write_bench, ["tiny.json", "tiny.png"]),
        (write_formats, ["formats.json", "formats.png"]),
        (write_sites, ["diagnosis.csv", "diagnosis.png"]),
    ],
    ids=["plot", "learned", "bench", "bench of formats", "diagnose"],
)
def test_a_full_disk_leaves_the_old_files_together(
    write: Callable[[Path], object], names: list[str], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(OLD)
    with tiny.full_disk(), pytest.raises(InputError, match=r"cannot write .*: File too large"):
        write(tmp_path)
    assert read_all(tmp_path) == dict.fromkeys(names, OLD)
    write(tmp_path)
    after = read_all(tmp_path)
    assert sorted(after) == names and OLD not in after.values()


@pytest.mark.integration
def test_pictures_leave_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    from matplotlib import pyplot

    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    before = pyplot.get_fignums(), dict(matplotlib.rcParams)
    for write in (write_bench, write_formats, write_sites):
        write(tmp_path)
    plot_activations(["arelu"], tmp_path / "curves.png")
    assert (pyplot.get_fignums(), dict(matplotlib.rcParams)) == before


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("plot", "arelu", "-o", "{}"), "ending must be one of"),
        (("plot", "arelu", "-o", "{}/nowhere/x.png"), "there is no folder"),
        (("plot", "arelu", "-o", "{}/" + "a" * 300 + ".png"), "too long"),
        (("plot", "arelu", "-o", "{}/folder.png"), "it is a folder"),
        (("learned", "x.pt", "-o", "{}/folder.png"), "it is a folder"),
        (("maps", "x.pt", "image=x.jpg", "-o", "{}/folder.png"), "it is a folder"),
        (("bench", "--act", "arelu", "-o", "{}/file"), "it is a file, not a folder"),
        (("bench", "--act", "arelu", "-o", "{}/file/below"), "Not a directory"),
        (("diagnose", "-o", "{}/file"), "it is a file, not a folder"),
        (("diagnose", "-o", "{}/new/" + "a" * 300), "too long"),
        (("fold", "{}/best.pt", "-o", "{}/file/below/x.pt"), "Not a directory"),
        (("fold", "{}/best.pt", "-o", "{}/new/" + "a" * 300 + ".pt"), "too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_at_once(
    words: tuple[str, ...], error: str, arelu: bytes, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "best.pt").write_bytes(arelu)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RtdetrActError, match=error):
        run(*(word.format(tmp_path) for word in words))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_bytes() == OLD


def test_a_folder_is_not_made_for_a_benchmark_that_fails(data: Any, tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / "tiny.yaml", tiny.RTDETR)
    for words in (("bench", "--act", "arelu"), ("diagnose", "--act", "arelu", "--data", str(data.detect))):
        with pytest.raises(InputError, match="device"):
            run(*words, "--model", str(path), "device=cuda:77", "imgsz=64", "-o", str(tmp_path / "a" / "b"))
        assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.kill
def test_a_fold_is_whole_or_not_there(arelu: bytes, tmp_path: Path) -> None:
    load(arelu, tmp_path)
    target = tmp_path / "made" / "folded.pt"
    with tiny.full_disk(), pytest.raises(InputError, match=r"cannot write .*: File too large"):
        fold_checkpoint(str(tmp_path / "best.pt"), target)
    assert sorted(read_all(tmp_path)) == ["best.pt"] and not target.parent.exists()
    (tmp_path / f".folded.pt.{dead_process()}.partial").write_bytes(OLD)
    (tmp_path / "folded.pt").write_bytes(OLD)
    fold_checkpoint(str(tmp_path / "best.pt"), tmp_path / "folded.pt")
    assert sorted(read_all(tmp_path)) == ["best.pt", "folded.pt"]
    assert YOLO(tmp_path / "folded.pt").model


# --- exported files -------------------------------------------------------------------------------------------------

FORMATS = {"torchscript": "best.torchscript", "onnx": "best.onnx", "openvino": "best_openvino_model"}


def old_file(folder: Path, name: str) -> None:
    if not Path(name).suffix:
        (folder / name).mkdir()
        name = f"{name}/best.xml"
    (folder / name).write_bytes(OLD)


@pytest.mark.kill
@pytest.mark.parametrize("form", FORMATS)
def test_an_export_on_a_full_disk_leaves_the_old_files(form: str, arelu: bytes, tmp_path: Path) -> None:
    if form != "torchscript":
        pytest.importorskip(form, reason="the extra 'export' is not installed")
    model = load(arelu, tmp_path)
    old_file(tmp_path, FORMATS[form])
    before = read_all(tmp_path)
    with (
        tiny.full_disk(),
        pytest.raises(InputError, match=r"cannot write .*best.*; what was exported there before is as"),
    ):
        export_model(model, form, imgsz=64)
    assert read_all(tmp_path) == before and len(list(tmp_path.iterdir())) == 2
    if form == "torchscript":  # the others take seconds
        assert export_model(model, form, imgsz=64) == tmp_path / FORMATS[form]
        assert sorted(read_all(tmp_path)) == ["best.pt", FORMATS[form]] and OLD not in read_all(tmp_path).values()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("batch=-1",), "batch must be a positive number of images"),
        (("batch=0.5",), "batch must be a positive number of images"),
        (("opset=30",), "this torch cannot write this opset of ONNX"),
    ],
)
def test_what_no_file_can_be_exported_with(words: tuple[str, ...], error: str, arelu: bytes, tmp_path: Path) -> None:
    pytest.importorskip("onnxslim", reason="the extra 'export' is not installed")
    (tmp_path / "best.pt").write_bytes(arelu)
    with pytest.raises(InputError, match=error):
        run("export", str(tmp_path / "best.pt"), "imgsz=64", *words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.kill
def test_an_interrupted_export_leaves_the_old_file(arelu: bytes, tmp_path: Path) -> None:
    model = load(arelu, tmp_path)
    old_file(tmp_path, "best.torchscript")
    there: list[list[str]] = []

    def stop(exporter: Any) -> None:
        there.append([entry.name for entry in tmp_path.iterdir()])
        raise KeyboardInterrupt

    model.add_callback("on_export_start", stop)
    with pytest.raises(KeyboardInterrupt):
        export_model(model, "torchscript", imgsz=64)
    assert len(there[0]) == 3  # a folder of its own beside
    assert read_all(tmp_path) == {"best.pt": arelu, "best.torchscript": OLD} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.integration
def test_what_a_killed_export_left_goes_with_the_next(arelu: bytes, tmp_path: Path) -> None:
    model = load(arelu, tmp_path)
    left = tmp_path / f".best-export.{dead_process()}.partial"
    left.mkdir()
    (left / "best.torchscript").write_bytes(OLD)
    assert Path(model.export(format="torchscript", imgsz=64)) == tmp_path / "best.torchscript"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.pt", "best.torchscript"]


@pytest.mark.integration
def test_messages_and_callbacks_name_the_final_file(
    arelu: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load(arelu, tmp_path)
    model = YOLO("best.pt")
    seen = []
    model.add_callback(
        "on_export_end", lambda exporter: seen.append((exporter.file, Path("best.torchscript").exists()))
    )
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(caplog.handler)
    try:
        model.export(format="torchscript", imgsz=64)
        model.export(format="torchscript", imgsz=64)
    finally:
        LOGGER.removeHandler(caplog.handler)
    assert seen == [(Path("best.pt"), True)] * 2
    assert "saved as 'best.torchscript'" in caplog.text and "partial" not in caplog.text
    size = f"{len(arelu) / 2**20:.1f} MB"
    assert re.search(rf"starting from 'best.pt' with .* \({size}\)", caplog.text)


def test_files_that_name_one_another_name_the_final_ones(arelu: bytes, tmp_path: Path) -> None:
    def write(exporter: Any, model: Any) -> str:  # as PNNX does
        folder = Path(str(model.pt_path).replace(".pt", "_ncnn_model"))
        folder.mkdir()
        (folder / "model.ncnn.bin").write_bytes(OLD)
        (folder / "model_ncnn.py").write_text(f'net.load_model("{(folder / "model.ncnn.bin").as_posix()}")\n')
        return f"{folder}/"

    exporter = SimpleNamespace(args=SimpleNamespace(format="ncnn"), callbacks={}, run_callbacks=lambda event: None)
    folder = tmp_path / "best_ncnn_model"
    assert export_staged(write, exporter, load(arelu, tmp_path).model) == f"{folder}/"
    assert (folder / "model_ncnn.py").read_text() == f'net.load_model("{folder.as_posix()}/model.ncnn.bin")\n'


@pytest.mark.kill
@pytest.mark.parametrize("raised", [True, False])
def test_an_interruption_that_an_exporter_catches_is_one(raised: bool, arelu: bytes, tmp_path: Path) -> None:
    def convert(exporter: Any, model: Any) -> str:  # as OpenVINO does, in C++
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if raised:
                raise RuntimeError("Model wasn't fully converted") from None
        Path(model.pt_path).with_suffix(".xml").write_bytes(OLD)
        return str(model.pt_path)

    before = signal.getsignal(signal.SIGINT)
    exporter = SimpleNamespace(args=SimpleNamespace(format="ncnn"), callbacks={}, run_callbacks=lambda event: None)
    with pytest.raises(KeyboardInterrupt):
        export_staged(convert, exporter, load(arelu, tmp_path).model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.pt"] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.kill
def test_an_interruption_waits_until_openvino_is_left(arelu: bytes, tmp_path: Path) -> None:
    inside: dict[str, Any] = {"__name__": "openvino.frontend"}
    exec("def call_back(function): function(2); return True", inside)  # from C++, where an exception ends the process
    came_back = []

    def convert(exporter: Any, model: Any) -> None:
        came_back.append(inside["call_back"](signal.raise_signal))
        for _ in range(1000):  # it comes between two of Python's instructions
            time.sleep(0.01)
        came_back.append("and nothing comes")

    exporter = SimpleNamespace(args=SimpleNamespace(format="ncnn"), callbacks={}, run_callbacks=lambda event: None)
    with pytest.raises(KeyboardInterrupt):
        export_staged(convert, exporter, load(arelu, tmp_path).model)
    assert came_back == [True] and [entry.name for entry in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.integration
def test_a_stock_model_exports_as_ultralytics_does(stock: bytes, tmp_path: Path) -> None:
    model = load(stock, tmp_path)
    there = []
    model.add_callback("on_export_start", lambda exporter: there.append(len(list(tmp_path.iterdir()))))
    model.export(format="torchscript", imgsz=64)
    theirs = read_metadata(tmp_path / "best.torchscript")
    export_model(model, "torchscript", imgsz=64, fold=False)
    assert there == [1, 3]  # the checkpoint; then the exported file and a folder beside
    assert read_metadata(tmp_path / "best.torchscript") == theirs


def read_metadata(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("extra/config.txt"))
        return {**json.loads(archive.read(name)), "date": None}


@pytest.mark.integration
def test_a_folder_whose_name_has_the_ending_of_checkpoints(arelu: bytes, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra 'export' is not installed")
    folder = tmp_path / "all.pt-files"
    model = load(arelu, folder)
    old_file(folder, "best_openvino_model")
    assert export_model(model, "openvino", imgsz=64) == folder / "best_openvino_model"
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.pt-files"]
    assert len(list(folder.iterdir())) == 2 and OLD not in read_all(folder).values()


@pytest.mark.integration
def test_a_benchmark_of_formats_that_fails_leaves_the_old_files(arelu: bytes, stock: bytes, tmp_path: Path) -> None:
    models = {"stock": load(stock, tmp_path / "stock"), "arelu": load(arelu, tmp_path / "arelu")}
    folder = tmp_path / "bench"

    def stop(exporter: Any) -> None:
        raise KeyboardInterrupt

    models["arelu"].add_callback("on_export_start", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_latencies(models, ["torchscript"], folder, imgsz=64, rounds=2)
    assert not folder.exists()
    models["arelu"].clear_callback("on_export_start")
    found = measure_latencies({"arelu": models["arelu"]}, ["torchscript"], folder, imgsz=64, rounds=2)
    names = ["arelu/model.pt", "arelu/model.torchscript"]
    assert sorted(read_all(folder)) == names
    assert sorted(each.path for each in found) == [str(folder / name) for name in names]
