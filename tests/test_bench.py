"""The benchmark of models: what it measures, prints and writes, and what it shows of AReLU's memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import run
from torch import Tensor, nn
from torch.nn.modules import module
from torch.overrides import TorchFunctionMode
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg

from rtdetr_act import create, patch_model
from rtdetr_act.activations.arelu import AReLU
from rtdetr_act.analysis.memory import OUTSIDE, measure_step_memory
from rtdetr_act.cli.bench import print_costs
from rtdetr_act.errors import InputError, RtdetrActError
from rtdetr_act.integrations.ultralytics.costs import Cost, compare_costs, draw_bars, draw_batch
from rtdetr_act.integrations.ultralytics.models import load_variants
from rtdetr_act.kernels import blocks
from rtdetr_act.timing import Ratio, compute_ratios, time_medians
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


MAP = 2 * 4 * 8 * 8 * 4  # bytes of a map of four channels of the nets below


def make_image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), *layers)


def sum_saved(forward: Callable[[], Any], *without: Tensor) -> int:
    """Return the bytes of the tensors that autograd itself saves, but for some, each storage once."""
    left_out = {t.untyped_storage().data_ptr() for t in without}
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in left_out)


def test_peak_counts_what_lives_at_the_same_time() -> None:
    weight = torch.zeros(1, requires_grad=True)

    def forward() -> Tensor:
        a = torch.zeros(1000)
        del a
        b, c = torch.zeros(1000), torch.zeros(500)
        del b, c
        return weight * 2

    assert measure_step_memory(forward).peak == 6000


def test_peak_is_that_of_forward_and_backward() -> None:
    x = torch.zeros(1000, requires_grad=True)
    # In the backward of sin: the result of exp, the cosine, its product with the gradient, and two numbers, the sum and
    # its gradient; the gradient that is passed on is a view of the latter.
    assert measure_step_memory(lambda: x.exp().sin()).peak == 3 * 4000 + 2 * 4


# Kept by hand: a convolution keeps what it reads, BatchNorm what it reads and two numbers a channel, SiLU what it
# reads, and LeakyReLU in place what it gives. The image is not the result of an operator, and what the last layer
# gives is kept by none.
NUMBERS = 2 * 4 * 4
HAND_COMPUTED = {
    "silu": (lambda: make_net(nn.SiLU()), {"native_batch_norm": MAP + NUMBERS, "convolution": MAP}),
    "silu, convolution": (
        lambda: make_net(nn.SiLU(), nn.Conv2d(4, 4, 1)),
        {"native_batch_norm": MAP + NUMBERS, "convolution": MAP, "silu": MAP},
    ),
    "leaky_relu, convolution": (
        lambda: make_net(nn.LeakyReLU(), nn.Conv2d(4, 4, 1)),
        {"native_batch_norm": MAP + NUMBERS, "convolution": MAP, "leaky_relu": MAP},
    ),
    "leaky_relu in place, convolution": (
        lambda: make_net(nn.LeakyReLU(inplace=True), nn.Conv2d(4, 4, 1)),
        {"native_batch_norm": MAP + NUMBERS, "convolution": MAP},
    ),
    "sigmoid, convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)),
        {"sigmoid": MAP},
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(192, 4)), {"addmm": 2 * 192 * 4}),
}


@pytest.mark.parametrize("name", HAND_COMPUTED)
def test_kept_is_what_autograd_saves_of_the_results_of_operators(name: str) -> None:
    make, expected = HAND_COMPUTED[name]
    net, x = make(), make_image()
    memory = measure_step_memory(lambda: net(x), net)
    assert memory.by_operator == expected
    assert memory.kept == sum(expected.values()) == sum(memory.by_layer.values())
    assert memory.kept == sum_saved(lambda: net(x), x, *net.parameters(), *net.buffers())
    assert memory.peak > memory.kept


def test_of_a_concatenation_only_the_result_is_kept() -> None:
    one, two, last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
    x = make_image()
    assert measure_step_memory(lambda: last(torch.cat([one(x), two(x)], 1))).by_operator == {"cat": 2 * MAP}


@pytest.mark.parametrize(("side", "elements"), [(8, 2**19), (160, 2**19), (160, 2**12)])  # plain, one block, many
@pytest.mark.parametrize("name", ["arelu", "arelu(inplace=True)", "dyrelu_a", "dyrelu_b", "dyrelu_c"])
def test_kept_by_ops_of_the_zoo_is_what_autograd_saves(
    name: str, side: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS_PER_THREAD", elements)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    net = make_net(create(name, 4), nn.Conv2d(4, 4, 1))
    net(x)  # which makes the scratch memory of the ops
    memory = measure_step_memory(lambda: net(x), net)
    assert memory.kept == sum_saved(lambda: net(x), x, *net.parameters(), *net.buffers())
    assert not {"empty", "empty_like", "empty_strided"} & memory.by_operator.keys()
    if name.startswith("arelu"):
        maps = memory.by_layer.get("2 (AReLU)", 0) // (2 * 4 * side * side * 4)
        assert maps == ("inplace" not in name)  # its result, which the convolution reads


def test_results_that_a_model_holds_in_place_of_saved_tensors_are_what_counts() -> None:
    class Passing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Packing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with Passing(), torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed()):
                return super().forward(x)

    def pack(t: Tensor) -> Callable[[], Tensor]:
        if recomputing:
            return (lambda: net[1](net[0](x)).detach()) if t.shape[1:] == (4, 8, 8) else lambda: t
        half = t.half()
        return lambda: half.float()

    net, x = Packing(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)), make_image()
    recomputing = False
    memory = measure_step_memory(lambda: net(x), net)
    # The map twice, for the Sigmoid and for the convolution behind it; the image and the weights are results here, too.
    assert memory.by_operator == {"_to_copy": (2 * MAP + x.nbytes + net[0].weight.nbytes + net[2].weight.nbytes) // 2}

    recomputing = True
    assert measure_step_memory(lambda: net(x), net).kept == 0


def test_layers_are_named_to_a_depth_of_two() -> None:
    class Block(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.conv, self.act = nn.Sequential(nn.Conv2d(4, 4, 1)), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.Sigmoid()  # one for all, as in Ultralytics
            self.stem = nn.Conv2d(3, 4, 1)
            self.model = nn.Sequential(Block(act), Block(act))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(self.stem(x)).exp()

    net, x = Net(), make_image()
    memory = measure_step_memory(lambda: net(x), net)
    assert memory.by_layer == dict.fromkeys(("stem (Conv2d)", "model.0 (Block)", "model.1 (Block)", OUTSIDE), MAP)
    assert measure_step_memory(lambda: net(x)).by_layer == {OUTSIDE: memory.kept}


def test_layers_are_right_where_modules_call_themselves_and_catch_errors() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.refusing = nn.Conv2d(4, 4, 1), Refusing()

        def forward(self, x: Tensor, times: int = 2) -> Tensor:
            with suppress(ValueError):
                self.refusing(x)
            return self(self.conv(x).sigmoid(), times - 1) if times else x

    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), Again(), nn.Conv2d(4, 4, 1), nn.Sigmoid()), make_image()
    memory = measure_step_memory(lambda: net(x), net)
    again = memory.by_layer.pop("1.conv (Conv2d)", 0) + memory.by_layer.pop("1 (Again)")
    assert again == 2 * MAP
    assert memory.by_layer == {"0 (Conv2d)": MAP, "3 (Sigmoid)": MAP}


def test_measuring_leaves_no_hook() -> None:
    before = len(module._global_forward_pre_hooks), len(module._global_forward_hooks)
    net, x = make_net(nn.SiLU()), make_image()
    measure_step_memory(lambda: net(x), net)
    with pytest.raises(RuntimeError):
        measure_step_memory(lambda: net(x[:, :2]), net)
    assert (len(module._global_forward_pre_hooks), len(module._global_forward_hooks)) == before


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

        kept[name], losses[name] = measure_step_memory(loss, module).kept, loss().item()
    assert kept["arelu"] <= share * kept["silu"]
    assert losses["arelu"] == pytest.approx(losses["arelu(inplace=False)"], rel=1e-5)


@pytest.mark.integration
def test_the_batch_that_fits_is_that_of_measured_steps(tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())
    models = load_variants(str(path), ["stock", "arelu"])
    costs = compare_costs(models, imgsz=64, batch=2, rounds=2, fits=1 / 64)
    assert costs[1].largest_batch.batch > costs[0].largest_batch.batch > 4
    for cost, model in zip(costs, models.values(), strict=True):
        parameters = [p for p in model.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0)
        copy = deepcopy(model.model)  # the moving average of the weights
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        held = [*parameters, *model.model.buffers(), *(p.grad for p in parameters), *copy.state_dict().values()]
        held += [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        drawn = draw_batch(model.model, "detect", 64, cost.largest_batch.batch, "cpu")
        memory = measure_step_memory(lambda m=model.model, d=drawn: m.loss(d)[0])
        total = sum(t.nbytes for t in held) + sum(t.nbytes for t in drawn.values()) + memory.peak
        assert total == pytest.approx(2**24, rel=0.02)


@pytest.mark.integration
def test_no_batch_fits_where_there_is_no_room(tmp_path: Path) -> None:
    path = tiny.write_yaml(tmp_path / "tiny.yaml", tiny.yolo())
    costs, _ = bench_training(path, "arelu", tmp_path / "bench", imgsz=64, batch=1, rounds=2, fits=1e-6)
    assert [cost.largest_batch.batch for cost in costs] == [0, 0]


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
    options = ("--model", str(path), "--act", "arelu", "--turns", "2", "-o", str(folder))
    printed = run("bench", *options, "imgsz=64", "batch=2", "fits=2")
    assert "saved for backward" in printed and "arelu" in printed
    (costs,) = json.loads((folder / "tiny.json").read_text()).values()
    assert [cost["activation"] for cost in costs] == ["stock", "arelu"]
    for cost in costs:
        assert sum(cost["saved_by_operator"].values()) == sum(cost["saved_by_layer"].values()) == cost["saved_bytes"]
        assert f" {cost['largest_batch']['batch']} " in printed
    assert "model.14 (RTDETRDecoder)" in printed and "native_batch_norm" in printed and "batch in 2 GiB" in printed
    assert (folder / "tiny.png").stat().st_size > 10_000


def test_tables_of_memory_show_ten_rows_and_the_sum_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    ratio = Ratio(1, 1, 1, 1)
    sizes = {f"op{number}": number * 2**20 for number in range(1, 13)} | {"small": 1000}
    one = Cost("stock", ratio, ratio, 1, 1, 0, 0, sizes, {"model.0 (Conv)": 78 * 2**20})
    two = Cost("arelu", ratio, ratio, 1, 1, 0, 0, {"op1": 20 * 2**20}, {})
    print_costs("tiny", [one, two])
    rows = [[word.strip() for word in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    assert rows[0] == ["op1", "1.0", "20.0"]
    assert [row[0] for row in rows[1:10]] == [f"op{number}" for number in range(12, 3, -1)]
    assert rows[10:] == [
        ["3 others", "5.0", "-"],
        ["all", "78.0", "20.0"],
        ["model.0 (Conv)", "78.0", "-"],
        ["all", "78.0", "-"],
    ]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "name activations with act="),
        (("--act", "arelu", "fits=0"), "fits must be the memory of a device in GiB, such as 24, not 0"),
        (("--act", "arelu", "fits=nan"), "fits must be the memory of a device in GiB"),
        (("--act", "arelu", "fits=24", "format=onnx"), "leave out format="),
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
