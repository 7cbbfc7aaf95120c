"""Conversion of trained networks to other activations: in Python, and checkpoints from the command line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Data
from torch import nn
from typer.testing import CliRunner

from rtdetr_act import convert, convert_checkpoint, find_sites
from rtdetr_act.cli.main import app
from rtdetr_act.errors import InputError, Interrupted, RtdetrActError
from rtdetr_act.workflows.conversion import read_conversion

# --- any trained network ----------------------------------------------------------------------------------------------


def draw_patterns(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images with values up to 170, which nobody normalised, and the class of the square in each."""
    generator = torch.Generator().manual_seed(seed)
    images = 50 * torch.rand(count, 3, 16, 16, generator=generator)
    kinds = torch.randint(0, 4, (count,), generator=generator)
    corners = torch.randint(2, 10, (count, 2), generator=generator).tolist()
    for image, kind, (row, column) in zip(images, kinds.tolist(), corners, strict=True):
        image[kind % 3, row : row + 4, column : column + (4 if kind < 3 else 2)] += 120
    return images, kinds


def build_network(kind: str) -> nn.Sequential:
    if kind == "dense":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(768, 64), nn.PReLU(64), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4)
        )
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    if kind == "prelu":
        convs = [nn.Conv2d(3, 16, 3, 2, 1), nn.PReLU(16), nn.Conv2d(16, 32, 3, 2, 1), nn.PReLU()]
        return nn.Sequential(*convs, *pool, nn.Linear(128, 32), nn.PReLU(32), nn.Linear(32, 4))
    first = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU(), *pool, nn.Linear(128, 4))


@pytest.fixture(scope="module", params=["prelu", "dense", "batch norm"])
def small(request: pytest.FixtureRequest) -> nn.Module:
    """Train a small network of someone who has never heard of Ultralytics."""
    torch.manual_seed(0)
    network, (images, kinds) = build_network(request.param), draw_patterns(1024, 0)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(200):
        chosen = torch.randint(0, len(images), (64,))
        loss = nn.functional.cross_entropy(network(images[chosen]), kinds[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "hardswish", "arelu", "relu6"])
def test_small_networks_keep_their_decisions(small: nn.Module, activation: str) -> None:
    images, kinds = draw_patterns(512, 1)
    converted = copy.deepcopy(small)
    report = convert(converted, activation, draw_patterns(512, 2)[0], scope="all")
    assert len(report) == len(find_sites(small, images[:1]))
    with torch.no_grad():
        before, after = (network(images).argmax(1) for network in (small, converted))
    assert (before == kinds).float().mean() > 0.95
    assert (before == after).float().mean() > 0.97


def test_conversion_takes_batches_of_several_sizes_and_keeps_sites() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    batches = [torch.rand(8, 3, 24, 24), torch.rand(5, 3, 32, 16)]
    before = copy.deepcopy(network)
    assert convert(network, "relu", batches, keep="3").sites == ["1"]
    test = torch.rand(4, 3, 24, 24)
    with torch.no_grad():
        expected, found = before(test), network(test)
        before[1] = nn.ReLU()
        swapped = before(test)
    assert (found - expected).norm() < 0.5 * (swapped - expected).norm()


@pytest.mark.parametrize("images", [torch.rand(0, 3, 8, 8), []])
def test_conversion_without_images_is_refused(images: Any) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3))
    with pytest.raises(InputError, match="no images"):
        convert(network, "relu", images)
    assert type(network[1]) is nn.SiLU


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Return settings of a conversion that takes seconds."""
    monkeypatch.chdir(tmp_path)
    yield {"formats": (), "images": 8, "arguments": {"device": "cpu", "workers": 0}}


@pytest.mark.integration
def test_a_conversion_ends_in_a_folder_that_anybody_can_use(
    trained: Path, shared_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'export'")
    monkeypatch.chdir(tmp_path)
    words = ["convert", str(trained), "act=relu,arelu", f"data={shared_data.detect}", "for=rknn", "epochs=1", "bound=0"]
    words += ["images=8", "device=cpu", "workers=0", "keep=4", "int8=True", "-o", "out"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    done = read_conversion(tmp_path / "out")
    assert done is not None and done.stock is not None and done.kept is not None
    assert done.stock.score > 0.3, "the network has learned too little to lose anything"
    for activation in ("relu", "arelu"):
        names = [step.name for step in done.steps if step.activation == activation]
        assert names[:3] == ["swapped", "refitted", "calibrated"]
        best = max(step.score for step in done.steps if step.activation == activation and step.name != "trained")
        assert ("trained" in names) == (best < done.stock.score)
        refitted = done.find_step(activation, "refitted")
        swapped = done.find_step(activation, "swapped")
        assert refitted is not None and swapped is not None and refitted.score >= swapped.score
    best = max((s for s in done.steps if s.activation == done.winner and s.path), key=lambda step: step.score)
    assert done.kept == best
    # What is left is torch's own, and the layer that was to stay has stayed.
    checkpoint = tmp_path / "out" / next(each.path for each in done.files if each.format == "torch" and each.path)
    code = "import sys, torch; from ultralytics import YOLO\nmodel = YOLO(sys.argv[1])\n" + (
        "print(sorted({type(m).__name__ for m in model.model.modules() if 'activation' in type(m).__module__}))\n"
        "model.predict(torch.zeros(1, 3, 64, 64), verbose=False)\nassert 'rtdetr_act' not in sys.modules"
    )
    loaded = tiny.run_python(code, tmp_path / "script", checkpoint)
    assert loaded.returncode == 0, loaded.stderr
    assert ("LeakyReLU" if done.winner == "arelu" else "ReLU") in loaded.stdout and "AReLU" not in loaded.stdout
    kept = {type(m) for m in tiny.load(checkpoint).model[4].modules()} & {nn.SiLU, nn.ReLU, nn.LeakyReLU}
    assert kept == {nn.SiLU}
    graph = onnx.load(tmp_path / "out" / next(each.path for each in done.files if each.format == "onnx" and each.path))
    assert {"Relu", "LeakyRelu"} & {node.op_type for node in graph.graph.node}
    # Quantised, it is the same network, and the report says in which layer it is least so, beside the checkpoint.
    scores = {each.format: list(each.scores.values())[-1] for each in done.files if each.activation == done.winner}
    assert abs(scores["onnx int8"] - scores["onnx"]) < 0.1
    assert list(done.quantisation) == ["stock", done.winner]
    for activation, errors in done.quantisation.items():
        rows = (tmp_path / "out" / f"int8-errors-{activation}.csv").read_text().splitlines()
        assert len(rows) == len(errors.tensors) + 1 and all(each.sqnr > 10 for each in errors.tensors)
        worst = errors.find_drops(1)[0]
        assert f"{worst.name} | {worst.operator}" in (tmp_path / "out" / "report.md").read_text()
    assert done.operators.startswith("rknn") and any(row["operator"] == "Conv" for row in done.operator_rows)
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert f"{done.kept.score:.4f}" in text and f"{done.stock.score:.4f}" in text and "Conv" in text
    assert text.count('<img src="data:image/svg+xml;base64,') == 2
    assert "<script" not in text and "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")
    # The same once more has nothing left to do.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")}
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0 and "going on with out" in again.output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")} == times


@pytest.mark.integration
def test_an_interrupted_conversion_goes_on(trained: Path, shared_data: Data, quick: dict[str, Any]) -> None:
    def interrupt(sentence: str) -> None:
        if "refitted" in sentence:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on in runs"):
        convert_checkpoint(trained, "relu", shared_data.detect, epochs=0, show=interrupt, **quick)
    refitted = Path("runs", "convert", "relu", "refitted.pt")
    before, shown = refitted.stat().st_mtime_ns, list[str]()
    done = convert_checkpoint(trained, "relu", shared_data.detect, epochs=0, show=shown.append, **quick)
    assert done.folder == Path("runs", "convert") and refitted.stat().st_mtime_ns == before
    assert "going on with" in shown[0] and not any("refitted" in sentence for sentence in shown)
    assert done.winner == "relu" and [each.format for each in done.files] == ["torch", "torch"]
    # Another one gets a folder of its own.
    with pytest.raises(InputError, match="holds another conversion"):
        convert_checkpoint(trained, "mish", shared_data.detect, done.folder, epochs=0, **quick)


@pytest.mark.kill
def test_a_full_disk_leaves_the_record_as_it_was(trained: Path, shared_data: Data, quick: dict[str, Any]) -> None:
    with tiny.full_disk(), pytest.raises(RtdetrActError, match=r"relu|runs"):
        convert_checkpoint(trained, "relu", shared_data.detect, epochs=0, **quick)
    done = read_conversion(Path("runs", "convert"))
    assert done is not None and [step.name for step in done.steps] == ["as trained"]
    assert not list(Path("runs").rglob("*.pt"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["act=relo"], "did you mean 'relu'"),
        ([], "convert needs an activation"),
        (["act=relu", "bound=2"], "bound is a share of the score"),
        (["act=relu", "keep=modle.3"], "keep=modle.3 names none of the model's"),
        (["act=relu", "for=toaster"], "there is no target 'toaster'"),
        (["act=relu", "format=onx"], "there is no export format 'onx'"),
        (["act=relu", "data=nowhere.yaml"], "there is no data set 'nowhere.yaml'"),
        (["act=relu", "images=0"], "images is 1 or more"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    words: list[str], message: str, stock_run: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {word.partition("=")[0] for word in words}
    more = {"data": f"data={data.detect}", "format": "format=none"}
    rest = [word for key, word in more.items() if key not in given]
    result = CliRunner().invoke(app, ["convert", str(stock_run.pt), *words, *rest])
    assert result.exit_code != 0 and message in f"{result.output} {result.exception}"
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_of_other_classes_is_refused(stock_run: Any, data: Data, tmp_path: Path) -> None:
    text = data.detect.read_text().replace("- a", "- cat").replace("- b", "- dog")
    other = tmp_path / "other.yaml"
    other.write_text(text)
    with pytest.raises(InputError, match=r"has other classes \(cat, dog, …\) than the checkpoint"):
        convert_checkpoint(stock_run.pt, "relu", other, tmp_path / "out", formats=())
    assert not (tmp_path / "out").exists()


def test_an_untrained_network_has_nothing_to_lose(stock_run: Any, data: Data, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has a score of 0"):
        convert_checkpoint(stock_run.pt, "relu", data.detect, tmp_path / "out", formats=(), images=4)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "conversion.json").write_text(json.dumps({"request": {}}))
    with pytest.raises(InputError, match="is not the record of a conversion"):
        read_conversion(tmp_path)


def test_a_dry_run_writes_nothing(stock_run: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["convert", str(stock_run.pt), "act=relu,mish", f"data={data.detect}", "format=none", "dry_run=True"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "relu: swap, refit on 8 images" in result.output and "in all about" in result.output
    assert list(tmp_path.iterdir()) == []
