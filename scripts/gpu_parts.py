"""The parts of `check_gpu.py`: what each of them checks or measures, item by item.

Nothing here needs more than torch, NumPy and what the package imports for its activations; a part that needs a GPU or
Ultralytics says so.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from published import MOVED, NAMES, PUBLISHED, both_ways
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtdetr_act import create
from rtdetr_act.analysis.memory import measure_step_memory
from rtdetr_act.integrations.ultralytics.costs import compare_costs
from rtdetr_act.integrations.ultralytics.models import STOCK, load_variants
from rtdetr_act.kernels import blocks
from rtdetr_act.kernels.backend import triton
from rtdetr_act.timing import Ratio, compute_ratios, time_medians

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import gpu_checks
import op_checks

Need = Literal["GPU", "Ultralytics"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALF = FLOATS[1:]


@dataclass(frozen=True)
class Place:
    """Where a part runs.

    Attributes:
        device: "cuda", or "cpu" with Triton's interpreter.
        folder: For what trainings write.
    """

    device: str
    folder: Path

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Outcome:
    """What an item found.

    Attributes:
        error: Largest error in units of what is allowed; None where nothing was compared.
        measures: Median, quartiles and seconds by name, or one number in their place.
        said: Words for the report.
    """

    error: float | None = None
    measures: Mapping[str, Ratio | float] = field(default_factory=dict)
    said: str = ""

    def as_data(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        measures = {name: asdict(m) if isinstance(m, Ratio) else m for name, m in self.measures.items()}
        return {"error": self.error, "measures": measures, "said": self.said}


NOT_RUN = "not run"  # how `said` begins where an item asks for more than there is
Item = tuple[str, Callable[[], Outcome]]


@dataclass(frozen=True)
class Part:
    """Some items that belong together.

    Attributes:
        title: What they show, for the report.
        items: Yields their names, and what runs them.
        needs: What they cannot do without.
    """

    title: str
    items: Callable[[Place], Iterator[Item]]
    needs: tuple[Need, ...] = ()


def missing_for(part: Part, place: Place) -> list[Need]:
    """Return what a part needs and does not find."""
    there = {"GPU": place.on_gpu, "Ultralytics": importlib.util.find_spec("ultralytics") is not None}
    return [need for need in part.needs if not there[need]]


def short(dtype: torch.dtype) -> str:
    """Return the name of a type."""
    return str(dtype).removeprefix("torch.")


def checked(check: Callable[..., float], *arguments: Any) -> Callable[[], Outcome]:
    """Return a call of a check as an item."""
    return lambda: Outcome(check(*arguments))


# ---------------------------------------------------------------- the ops

SHAPES = ((3, 5, 9, 7), (1, 1, 1, 1), (0, 4, 3, 3), (2, 40, 3, 3))
# Whole tiles and none, images by the ten thousand (a grid's second dimension ends at 65535), and odd sides.
LARGER = ((2, 64, 40, 40), (1, 300, 13, 13), (3, 3, 161, 163), (70_000, 3, 1, 1))


class _OwnOperators(TorchDispatchMode):
    """Notes which of the package's operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rtdetr_act":
            self.seen.add(func.name().removeprefix("rtdetr_act::"))
        return func(*args, **(kwargs or {}))


KERNELS = {
    "arelu": {"arelu", "arelu_backward"},
    "arelu-inplace": {"arelu_", "arelu_backward"},
    "prelu": {"prelu_backward"},
    "prelu-channels": {"prelu_backward"},
    "dyrelu-2": {"dyrelu", "dyrelu_backward"},
    "dyrelu-c": {"dyrelu", "dyrelu_backward"},
    "acon": {"acon", "acon_backward"},
    "acon-meta": {"acon", "acon_backward"},
    "maximum": {"maximum_backward"},
}


def kernels(place: Place) -> Iterator[Item]:
    """Say which kernels run, so that no other part proves something else than it says."""
    if triton is None:
        return

    def check(name: str) -> Outcome:
        x, grad = op_checks.draw_pair((2, 8, 9, 7), torch.float32, "contiguous", place.device)
        with _OwnOperators() as noted:
            op_checks.run(op_checks.OPS[name][0], op_checks.draw_inputs(name, x), grad)
        if noted.seen != KERNELS[name]:
            raise AssertionError(f"{name} ran {sorted(noted.seen)}, not {sorted(KERNELS[name])}")
        return Outcome(said=", ".join(sorted(noted.seen)))

    for name in KERNELS:
        yield name, partial(check, name)


CAPABILITIES = {75: "T4", 80: "A100", 90: "H100", 100: "B200"}


def machine_code(place: Place) -> Iterator[Item]:
    """Compile all kernels for GPUs that need not be there, each time anew."""
    if triton is None:
        return

    def check(capability: int) -> Outcome:
        command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)]
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(done.stderr[-500:])
        return Outcome(said=done.stdout.strip())

    for capability, cards in CAPABILITIES.items():
        yield f"{capability // 10}.{capability % 10} ({cards})", partial(check, capability)


def ops(place: Place) -> Iterator[Item]:
    """Hold results and gradients against the formulas, in every type and layout."""

    def check(name: str, dtype: torch.dtype, layout: str) -> Outcome:
        shapes = (*SHAPES, *LARGER) if place.on_gpu else SHAPES
        pairs = (op_checks.draw_pair(shape, dtype, layout, place.device) for shape in shapes)
        return Outcome(max(op_checks.assert_right(name, x, grad) for x, grad in pairs))

    for name in op_checks.OPS:
        for dtype in FLOATS:
            for layout in op_checks.LAYOUTS:
                yield f"{name}, {short(dtype)}, {layout}", partial(check, name, dtype, layout)
        if name not in ("mean", "logits"):  # whose gradients are views
            for channels_last in (False, True):
                label = "channels_last" if channels_last else "contiguous"
                yield f"{name}, {label} kept", checked(op_checks.check_layout, name, channels_last, place.device)


def derivatives(place: Place) -> Iterator[Item]:
    """Hold second derivatives against the formulas, and all in float64 against differences."""

    def check(name: str, dtype: torch.dtype, layout: str) -> Outcome:
        pair = op_checks.draw_pair((2, 5, 4, 3), dtype, layout, place.device)
        return Outcome(op_checks.check_second_derivatives(name, *pair))

    for name in op_checks.OPS:
        yield f"{name}, differences", checked(op_checks.check_derivatives, name, place.device)
        for dtype in FLOATS:
            for layout in ("contiguous", "channels_last"):
                yield f"{name}, {short(dtype)}, {layout}", partial(check, name, dtype, layout)


def modules(place: Place) -> Iterator[Item]:
    """Hold every activation of the zoo, its generator included, against NumPy."""
    for name in gpu_checks.module_names():
        layouts = ["contiguous", "channels_last", *(["tokens"] if gpu_checks.takes_tokens(name) else [])]
        for dtype in FLOATS:
            for layout in layouts:
                check = checked(gpu_checks.check_module, name, dtype, layout, place.device)
                yield f"{name}, {short(dtype)}, {layout}", check


def repeats(place: Place) -> Iterator[Item]:
    """Repeat to the bit; on a GPU on a stream of its own and on every further device too."""
    for name in op_checks.OPS:
        yield f"{name}, three times", checked(op_checks.check_repeats, name, place.device)
        if place.on_gpu:
            yield f"{name}, on a stream of its own", checked(gpu_checks.check_stream, name, place.device)
        for index in range(1, torch.cuda.device_count()):
            yield f"{name}, on device {index}", checked(_on_device, name, f"cuda:{index}")


def _on_device(name: str, device: str) -> float:
    return float(op_checks.assert_right(name, *op_checks.draw_pair((2, 8, 9, 7), torch.float32, "contiguous", device)))


def compiled(place: Place) -> Iterator[Item]:
    """Compile each op as one graph; where Inductor cannot run, its graph is run without it."""
    backend = "inductor" if place.on_gpu else "aot_eager"

    def check(name: str, dtype: torch.dtype) -> Outcome:
        pair = op_checks.draw_pair((2, 8, 20, 17), dtype, "contiguous", place.device)
        return Outcome(op_checks.check_compiled(name, *pair, backend), said=backend)

    for name in op_checks.OPS:
        for dtype in FLOATS:
            yield f"{name}, {short(dtype)}", partial(check, name, dtype)


def graphs(place: Place) -> Iterator[Item]:
    """Capture each op in a CUDA graph and replay it with other inputs."""
    for name in op_checks.OPS:
        for dtype in FLOATS:
            yield f"{name}, {short(dtype)}", checked(gpu_checks.check_graph, name, dtype, place.device)


def mixed_precision(place: Place) -> Iterator[Item]:
    """Train a small network with each activation under autocast, in float16 with a GradScaler."""
    for name in (*gpu_checks.LEARNED, "silu"):
        for dtype in HALF:
            yield f"{name}, {short(dtype)}", checked(gpu_checks.check_training, name, dtype, place.device)


def low_memory(place: Place) -> Iterator[Item]:
    """Compare gradients with and without `memory="low"`."""
    for name in (*gpu_checks.LEARNED, "silu", "mish", "gelu", "relu", "leaky_relu"):
        for dtype in FLOATS:
            yield f"{name}, {short(dtype)}", checked(gpu_checks.check_low_memory, name, dtype, place.device)


def large(place: Place) -> Iterator[Item]:
    """Hold ops on maps of more than 2 ** 31 elements against their formulas."""

    def check(name: str, shape: tuple[int, ...], channels_last: bool) -> Outcome:
        needed = gpu_checks.bytes_for_large(shape)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < needed:
            return Outcome(said=f"{NOT_RUN}: it takes {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
        return Outcome(gpu_checks.check_large(name, shape, torch.bfloat16, channels_last, place.device))

    for name in gpu_checks.LARGE_OPS:
        for label, shape in gpu_checks.LARGE_SHAPES.items():
            for channels_last in (False, True):
                layout = "channels_last" if channels_last else "contiguous"
                yield f"{name}, {label}, {layout}", partial(check, name, shape, channels_last)


# ---------------------------------------------------------------- what the ops cost

BENCHED = (*NAMES, "aglu")
# 52 million elements, past every cache, and a map of a small detector at batch 16, which the L2 of a GPU may hold.
BENCH_SHAPES = ((32, 256, 80, 80), (16, 64, 80, 80))


def bench(dtype: torch.dtype) -> Callable[[Place], Iterator[Item]]:
    """Return the items that time each activation of a type, forward and backward."""

    def items(place: Place) -> Iterator[Item]:
        for shape in BENCH_SHAPES:
            for name in BENCHED:
                title = f"{name}, {'x'.join(map(str, shape))}"
                yield title, lambda name=name, shape=shape: bench_op(name, shape, dtype, place.device)  # type: ignore[misc]

    return items


def bench_op(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, turns: int = 20, compiles: bool = True
) -> Outcome:
    """Time an activation in its forms, in turns, and the bytes that they keep for the backward.

    All forms in one type, parameters included, since published ones answer in the wider of both.
    """
    torch._dynamo.reset()
    forms: dict[str, nn.Module] = {"silu": nn.SiLU(), "ours": create(name, shape[1])}
    forms["published"] = PUBLISHED[name](shape[1])
    if compiles:
        forms["ours, compiled"] = torch.compile(create(name, shape[1]))  # type: ignore[assignment]
        forms["published, compiled"] = torch.compile(PUBLISHED[name](shape[1]))  # type: ignore[assignment]
    forms = {key: module.to(device, dtype) for key, module in forms.items()}
    x, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    to = torch.empty_like(x)
    calls = {key: both_ways(module, x, grad) for key, module in forms.items()}
    calls["copy"] = lambda: to.copy_(x)
    found: dict[str, Ratio | float] = dict(compute_ratios(time_turns_of(calls, turns, device), "silu"))
    # What the host needs to launch it all, which counts where maps are small.
    walls = compute_ratios(time_medians(calls, turns, repeat=4, device=device), "silu")
    found |= {f"{key}, with launches": ratio for key, ratio in walls.items()}
    x.requires_grad_()
    for key in ("ours", "published"):
        # Of a copy, which counts if it is kept, as the result of the layer before would.
        memory = measure_step_memory(lambda form=forms[key]: form(x.clone()), device=device)  # type: ignore[misc]
        found[f"{key}, MiB kept"] = memory.kept / 2**20
    ours, copy = found["ours"], found["copy"]
    assert isinstance(ours, Ratio) and isinstance(copy, Ratio)
    found["ours, of the limit"] = MOVED[name] / 2 * copy.median / ours.median  # a copy moves two maps
    return Outcome(measures=found)


def time_turns_of(calls: Mapping[str, Callable[[], Any]], turns: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of a call by name and turn: of a GPU's work alone, without the time that launches take.

    A GPU first gets something to wait for, so that all is queued when its clock starts. Ten calls stand in each turn.
    """
    if not device.startswith("cuda"):
        return time_medians(calls, turns, repeat=4)
    found: dict[str, list[float]] = {name: [] for name in calls}
    queueing = {name: _queue(call) for name, call in calls.items()}
    for turn in range(turns):
        first = turn % len(calls)
        for name in [*calls][first:] + [*calls][:first]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(2 * queueing[name] * 2e9))  # cycles, of a clock of 2 GHz
            start.record()
            for _ in range(_CALLS):
                calls[name]()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) / 1e3 / _CALLS)
    return found


_CALLS = 10


def _queue(call: Callable[[], Any]) -> float:
    """Return the seconds that the host takes to queue a turn, warmed up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


# ---------------------------------------------------------------- dynamic convolution


def dynamic_convolution(place: Place) -> Iterator[Item]:
    """Hold dynamic convolution against one convolution for each image, and time it on a GPU."""
    for groups, side in ((1, 1), (1, 3), (8, 3)):
        for dtype in FLOATS:
            for channels_last in (False, True):
                layout = "channels_last" if channels_last else "contiguous"
                check = checked(gpu_checks.check_dynamic_conv, groups, side, dtype, channels_last, place.device)
                yield f"{side}x{side}, groups {groups}, {short(dtype)}, {layout}", check
    if place.on_gpu:
        from dynamic_forms import LAYERS, bench_layer

        for layer in LAYERS:
            _, inside, outside, side, stride, groups, size = layer
            title = f"time: {inside} to {outside}, {side}x{side}, stride {stride}, groups {groups}, map {size}x{size}"
            yield title, lambda layer=layer: Outcome(measures=bench_layer(layer, 15, place.device))  # type: ignore[misc]


# ---------------------------------------------------------------- networks, with Ultralytics

DETECTORS = {"rtdetr-l.yaml": 8, "yolo11n.yaml": 16}  # images of a training step
VARIANTS = ("silu", "arelu", "dyrelu_b", "silu memory=low", "arelu memory=low")


def detectors(place: Place) -> Iterator[Item]:
    """Time training steps and inference of whole detectors at 640 pixels, and their peak memory."""
    for source, batch in DETECTORS.items():
        for half in (False, True):
            label = "autocast float16" if half else "float32"
            yield f"{Path(source).stem}, {label}", partial(bench_detector, source, batch, half, place.device)


def bench_detector(source: str, batch: int, half: bool, device: str, imgsz: int = 640, turns: int = 10) -> Outcome:
    """Compare a detector with other activations with its stock form."""
    # Without its cache, which would hold the casts of one step's weights for the next one.
    scope = torch.autocast(device, torch.float16, cache_enabled=False) if half else nullcontext()
    with scope:
        models = load_variants(source, [STOCK, *VARIANTS])
        costs = compare_costs(models, imgsz=imgsz, batch=batch, device=device, rounds=turns)
    found: dict[str, Ratio | float] = {}
    for cost in costs:
        found[f"{cost.activation}, step"], found[f"{cost.activation}, inference"] = cost.train, cost.inference
        found[f"{cost.activation}, peak MiB"] = cost.peak_bytes / 2**20
        found[f"{cost.activation}, MiB kept"] = cost.saved_bytes / 2**20
    return Outcome(measures=found, said=f"batch {batch}, inference of one image")


def trainings(place: Place) -> Iterator[Item]:
    """Train detectors through Ultralytics, with and without AMP, and open what they leave."""
    if not place.on_gpu:
        yield "a tiny RT-DETR, float32, arelu", partial(train_tiny, "arelu", place)
        yield "a tiny RT-DETR, float32, dyrelu_b", partial(train_tiny, "dyrelu_b", place)
        return
    for source in ("rtdetr-n.yaml", "yolo11n.yaml"):
        for activation in ("arelu", "dyrelu_b"):
            for amp in (False, True):
                label = "AMP" if amp else "float32"
                yield f"{Path(source).stem}, {label}, {activation}", partial(train, source, activation, amp, place)


def train(source: str, activation: str, amp: bool, place: Place) -> Outcome:
    """Train two epochs on the embedded shapes."""
    from rtdetr_act import shapes
    from rtdetr_act.integrations.ultralytics.shapes import SHAPES_SETTINGS

    settings = {**SHAPES_SETTINGS, "epochs": 2, "batch": 16, "nbs": 16, "amp": amp, "device": 0, "workers": 4}
    return train_and_reopen(source, activation, shapes(place.folder), settings, place)


def train_tiny(activation: str, place: Place) -> Outcome:
    """Train two steps of the tests' RT-DETR on eight drawn images."""
    import tiny

    with tempfile.TemporaryDirectory() as folder:
        tiny.draw_images(Path(folder), {"detect": ["{cls} {x} {y} 0.375 0.375"]})
        content = {"path": f"{folder}/detect", "train": "images", "val": "images", "names": ["a", "b"]}
        data = tiny.write_yaml(Path(folder, "data.yaml"), content)
        source = tiny.write_yaml(Path(folder, "rtdetr-tiny.yaml"), tiny.RTDETR)
        settings = {**tiny.train_args(data, Path(folder)), "device": "cpu"}
        return train_and_reopen(str(source), activation, data, settings, place)


def train_and_reopen(source: str, activation: str, data: Path, settings: dict[str, Any], place: Place) -> Outcome:
    """Train, and check the losses, what moved, the checkpoint that is left and what it finds."""
    from ultralytics import RTDETR, YOLO

    from rtdetr_act import patch_model

    kind = RTDETR if "rtdetr" in source else YOLO
    model = kind(source)
    count = len(patch_model(model, activation))
    folder = place.folder / "trainings" / f"{Path(source).stem}-{activation}-{'amp' if settings['amp'] else 'float32'}"
    shutil.rmtree(folder, ignore_errors=True)
    start: dict[str, Tensor] = {}
    model.add_callback(
        "on_train_start",
        lambda trainer: start.update({name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}),
    )
    model.train(**{**settings, "data": str(data), "project": str(folder.parent), "name": folder.name, "exist_ok": True})
    trainer = model.trainer
    with Path(trainer.csv).open(encoding="utf-8") as file:
        last = {key.strip(): float(value) for key, value in [*csv.DictReader(file)][-1].items()}
    losses = [value for key, value in last.items() if key.startswith("train/")]
    assert losses and all(map(math.isfinite, losses)), f"losses {losses}"
    assert bool(trainer.amp) == bool(settings["amp"]), f"amp={settings['amp']} was asked, {trainer.amp} came of it"
    reopened = kind(str(trainer.last))
    wanted = type(create(activation, 8))
    placed = sum(type(module) is wanted for module in reopened.model.modules())
    assert placed == count, f"{placed} of {count} activations are in the checkpoint"
    inside = {f"{name}." for name, module in reopened.model.named_modules() if type(module) is wanted}
    learned = {name: p for name, p in reopened.model.named_parameters() if name.startswith(tuple(inside))}
    still = [name for name, p in learned.items() if torch.equal(p.cpu().half(), start[name].half())]
    assert len(still) < len(learned) / 2, f"{len(still)} of {len(learned)} parameters of activations did not move"
    results = reopened.predict(torch.rand(1, 3, 128, 128), device=settings["device"], verbose=False)
    assert len(results) == 1 and results[0].boxes.data.isfinite().all()
    measures = {"sites": float(count), "parameters that moved": float(len(learned) - len(still))}
    measures |= {"loss": sum(losses), "mAP50-95": last["metrics/mAP50-95(B)"]}
    return Outcome(measures=measures, said="AMP on" if trainer.amp else "AMP off")


def refits(place: Place) -> Iterator[Item]:
    """Refit a small network as on a CPU, and swapped detectors closer to what they gave before the swap."""
    yield "a small network", partial(refit_small, place)
    for source in ("yolo11n.yaml", "rtdetr-n.yaml"):
        yield Path(source).stem, partial(refit_detector, source, place)


def refit_small(place: Place) -> Outcome:
    """Refit the network of the checks on a device and on the CPU, and compare the weights."""
    from rtdetr_act import calibrate, patch_model, refit

    network, images = gpu_checks.SmallNet("silu").eval(), torch.randn(32, 3, 16, 16)
    calibrate(network, images)
    want = network(images).detach()
    patch_model(network, "arelu")
    before = _distance([network(images)], [want])
    here = copy.deepcopy(network).to(place.device)
    refit(network, images)
    count = refit(here, images.to(place.device))
    after = _distance([here(images.to(place.device)).cpu()], [want])
    assert after < before / 2, f"refit left the result {after:.3f} away, {before:.3f} before"
    error = 0.0
    for (name, found), exact in zip(here.state_dict().items(), network.state_dict().values(), strict=True):
        scale = max(1.0, exact.abs().max().item())
        error = max(error, op_checks.excess(found.float(), exact.double(), 1e-3, 1e-3 * scale))
        assert error <= 1, f"{name} is another one than on a CPU, by {error:.3g} times what is allowed"
    return Outcome(error, {"convolutions": float(count), "off before": before, "off after": after})


def refit_detector(source: str, place: Place) -> Outcome:
    """Refit a detector on random images, and check the maps that its head reads of others."""
    from rtdetr_act import calibrate, patch_model, refit
    from rtdetr_act.integrations.ultralytics.models import load_model

    side, batch = (320, 64) if place.on_gpu else (96, 16)
    network = load_model(source).model.to(place.device).eval()
    images, others = (torch.rand(batch, 3, side, side).to(place.device) for _ in range(2))
    # Where nothing is trained, maps vanish layer by layer; with the statistics of images none does.
    calibrate(network, images)
    want = _features(network, others)
    patch_model(network, "arelu", init="match")
    before = _distance(_features(network, others), want)
    start = time.perf_counter()
    count = refit(network, images)
    if place.on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = _distance(_features(network, others), want)
    assert after < before / 2, f"refit left the maps {after:.3f} away, {before:.3f} before"
    return Outcome(
        measures={"convolutions": float(count), "off before": before, "off after": after, "seconds": seconds},
        said=f"untrained, {batch} images of {side} pixels",
    )


def _features(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the maps that the head reads."""
    found: list[Tensor] = []
    head: nn.Module = network.model[-1]  # type: ignore[index,assignment]
    handle = head.register_forward_pre_hook(lambda _, given: found.extend(t.clone() for t in given[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    return found


def _distance(found: list[Tensor], want: list[Tensor]) -> float:
    """Return the error of maps in units of their standard deviation."""
    return statistics.mean(((f - w).norm() / (w - w.mean()).norm()).item() for f, w in zip(found, want, strict=True))


PARTS = {
    "kernels": Part("Which of the package's operators run", kernels),
    "machine-code": Part("All kernels compiled for compute capabilities 7.5 to 10.0", machine_code),
    "ops": Part("Each op against its formula in float64: result, gradients and layout", ops),
    "derivatives": Part("Second derivatives against float64", derivatives),
    "modules": Part("Every activation of the zoo against NumPy in float64", modules),
    "repeats": Part("Runs repeated to the bit, on streams and further devices", repeats),
    "compile": Part("Each op by `torch.compile` as one graph, forward and backward", compiled),
    "graphs": Part("Each op in a CUDA graph, replayed with other inputs", graphs, ("GPU",)),
    "mixed-precision": Part("A small network under autocast, float16 with GradScaler", mixed_precision),
    "low-memory": Part("Gradients of blocks that keep less for the backward", low_memory),
    "large": Part("Maps of more than 2³¹ elements", large, ("GPU",)),
    "bench-float32": Part("Time of each activation in float32", bench(torch.float32), ("GPU",)),
    "bench-float16": Part("Time of each activation in float16", bench(torch.float16), ("GPU",)),
    "bench-bfloat16": Part("Time of each activation in bfloat16", bench(torch.bfloat16), ("GPU",)),
    "dynamic-convolution": Part("Dynamic convolution against one convolution an image", dynamic_convolution),
    "detectors": Part("Detectors at 640 pixels: step, inference, memory", detectors, ("GPU", "Ultralytics")),
    "trainings": Part("Short trainings through Ultralytics", trainings, ("Ultralytics",)),
    "refit": Part("Refit of a swapped detector", refits, ("Ultralytics",)),
}


def prepare(folder: Path) -> Place:
    """Set what all parts rely on, and return where they run."""
    # No network is looked for, and the settings of the user stay as they are.
    os.environ["YOLO_OFFLINE"] = "True"
    os.environ["YOLO_CONFIG_DIR"] = str(folder)
    # Small maps on a CPU take torch's own graph, which would leave little to check.
    blocks.SMALL_NUMEL = 0
    # TF32 has 10 bits: with it, a convolution in float32 is off by 1e-3.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return Place("cuda" if torch.cuda.is_available() else "cpu", folder)
