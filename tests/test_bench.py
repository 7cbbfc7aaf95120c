"""The benchmark of models: what it measures, prints and writes, and what it shows of AReLU's memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import run
from torch import Tensor, nn
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg

from rtdetr_act import patch_model
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.analysis.memory import measure_peak_bytes, measure_saved_bytes
from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.integrations.ultralytics.costs import draw_bars, draw_batch
from rtdetr_act.timing import compute_ratios, time_medians
from rtdetr_act.workflows.bench import bench_training


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("ultralytics")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def test_turns_run_every_call_as_often_and_the_first_alternates() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = time_medians(calls, 4, warmup=1, repeat=2)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert len(order) == 3 * 2 * 5
    assert [order[turn * 6] for turn in range(5)] == ["c", "a", "b", "c", "a"]


def test_ratios_are_taken_turn_by_turn() -> None:
    # The machine halves its speed after the second turn: the ratio stays 3.
    times = {"base": [1.0, 1.0, 2.0, 2.0], "other": [3.0, 3.0, 6.0, 6.0]}
    found = compute_ratios(times, "base")["other"]
    assert (found.median, found.low, found.high, found.seconds) == (3, 3, 3, 4.5)


def test_peak_counts_what_lives_at_the_same_time() -> None:
    def step() -> None:
        a = torch.zeros(1000)
        del a
        b, c = torch.zeros(1000), torch.zeros(500)
        del b, c

    assert measure_peak_bytes(step) == 6000


def test_saved_bytes_leave_weights_out_and_count_memory_once() -> None:
    net, x = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 2, 1)), torch.zeros(1, 2, 10, 10)
    # The image, and the result of the Sigmoid, which the second convolution keeps as well.
    assert measure_saved_bytes(lambda: net(x), net) == 2 * 200 * 4


@pytest.mark.integration
@pytest.mark.parametrize(("source", "share"), [("rtdetr-n.yaml", 0.96), ("yolo11n.yaml", 0.78)])
def test_models_keep_less_with_arelu_than_with_silu_and_learn_the_same(source: str, share: float) -> None:
    kept, losses = {}, {}
    for name in ("silu", "arelu", "arelu(inplace=False)"):
        torch.manual_seed(0)
        model = (RTDETR if source.startswith("rtdetr") else YOLO)(source)
        patch_model(model, name)
        module = model.model.train()
        module.args, module.nc = get_cfg(), module.yaml["nc"]
        drawn = draw_batch(module, "detect", 96, 2, "cpu")

        def loss(module: nn.Module = module, drawn: dict[str, Tensor] = drawn) -> Tensor:
            torch.manual_seed(1)
            return module.loss(drawn)[0].sum()

        kept[name], losses[name] = measure_saved_bytes(loss, module), loss().item()
    assert kept["arelu"] <= share * kept["silu"]
    assert losses["arelu"] == pytest.approx(losses["arelu(inplace=False)"], rel=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("task", tiny.YOLO_HEADS)
def test_every_task_has_a_training_step(task: str, tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / f"tiny-{task}.yaml", tiny.yolo(task))
    (stock, arelu), _ = bench_training(str(path), ["arelu"], tmp_path / "bench", imgsz=64, batch=2, rounds=2)
    assert stock.train.median == stock.inference.median == stock.peak == stock.saved == 1
    assert arelu.activation == "arelu"
    assert arelu.saved < 1  # the stock activation is SiLU
    assert arelu.train.low <= arelu.train.median <= arelu.train.high


def test_an_unknown_task_is_refused() -> None:
    model = nn.Module()
    model.nc = 2
    with pytest.raises(InputError, match="no benchmark for the task 'depth'"):
        draw_batch(model, "depth", 32, 1, "cpu")


@pytest.mark.integration
def test_command_prints_a_table_and_writes_figures_and_a_chart(tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / "tiny.yaml", tiny.RTDETR)
    folder = tmp_path / "bench"
    printed = run(
        "bench", "--model", str(path), "--act", "arelu", "--turns", "2", "-o", str(folder), "imgsz=64", "batch=2"
    )
    assert "saved for backward" in printed and "arelu" in printed
    (costs,) = json.loads((folder / "tiny.json").read_text()).values()
    assert [cost["activation"] for cost in costs] == ["stock", "arelu"]
    assert (folder / "tiny.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "name activations with act="),
        (("--act", "arelu", "epochs=3"), "bench takes imgsz, batch, device, not 'epochs'"),
        (("--act", "arleu"), "did you mean 'arelu'"),
        (("--act", "arelu", "imgsz=0"), "imgsz must be a size in pixels"),
        (("--act", "arelu", "imgsz=[64,64]"), "imgsz must be one positive integer"),
        (("--act", "arelu", "device=cuda:77"), "device 'cuda:77' cannot be used"),
        (("--act", "arelu", "device=abacus"), "device 'abacus' cannot be used"),
        (("--act", "arelu", "device=0,0"), "device must be a single one"),
    ],
)
def test_command_says_what_is_wrong(words: tuple[str, ...], error: str) -> None:
    with pytest.raises(RtdetrActError, match=error):
        run("bench", *words)


def test_bars_take_panels_of_unlike_rows(tmp_path: Path) -> None:
    panels = {"first": {"one": {"a": 1.0, "b": 2.0}, "two": {"a": 1.5}}, "second": {"one": {"b": 0.5}}}
    assert draw_bars(panels, tmp_path / "bars.png", axis="x").stat().st_size > 5_000


def test_in_place_is_what_saves() -> None:
    model = RTDETR("rtdetr-n.yaml")
    patch_model(model, "arelu")
    assert sum(m.inplace for m in model.model.modules() if isinstance(m, AReLU)) == 51
