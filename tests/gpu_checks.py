"""What holds modules, training in half types, streams, CUDA graphs and large maps against float64; see `op_checks`."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from itertools import pairwise

import reference
import torch
from op_checks import OPS, ROUNDING, Inputs, clear_of_ties, draw_inputs, draw_map, exactly, excess, run, without_ties
from torch import Tensor, nn
from torch.nn import functional as F

from rtdetr_act import create
from rtdetr_act.activations.dynamic_conv import dynamic_conv
from rtdetr_act.activations.registry import get_entry, names
from rtdetr_act.errors import SpecError
from rtdetr_act.surgery.recomputation import Recomputation

# Without it cuBLAS refuses to run where only deterministic algorithms may; read when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
LEARNED = (
    *("arelu", "prelu", "frelu", "aconc", "meta_aconc", "aglu", "glu", "dyrelu_a", "dyrelu_b", "dyrelu_c"),
    *("pwlu", "rational", "repact", "smu", "smu1", "star_relu", "swish_beta"),
)
ARGUMENTS = {"threshold": "threshold(0.1, 0.05)"}
# Generators and convolutions add up products of rounded numbers, which a map rounded once does not.
CHAINED = {torch.float32: 4e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


# ---------------------------------------------------------------- modules


def module_names() -> list[str]:
    """Return the activations that can be made here: one is Ultralytics' own."""
    found = []
    for name in names():
        try:
            create(ARGUMENTS.get(name, name), 4)
        except SpecError:
            continue
        found.append(name)
    return found


def check_module(name: str, dtype: torch.dtype, layout: str, device: torch.device | str = "cpu") -> float:
    """Hold a module of a type, evaluating, against its formula in numpy; its gradients against those in float64.

    Args:
        name: In the zoo.
        dtype: Of the maps and of the parameters.
        layout: "contiguous", "channels_last", or "tokens" for (B, N, C).
        device: Of both.
    """
    tokens = layout == "tokens"
    module = create(ARGUMENTS.get(name, name), 6, layout="tokens" if tokens else "map")
    unsettle(module)
    module = module.to(device, dtype).eval()
    exact = copy.deepcopy(module).cpu().double()
    x = draw_map((2, 11, 6), dtype).to(device) if tokens else draw_map((2, 6, 7, 5), dtype, layout == "channels_last")
    x = x.to(device)
    grad = torch.randn_like(x)
    parameters = {key: value.numpy() for key, value in exact.state_dict().items()}
    more = {"threshold": 0.1, "value": 0.05} if name == "threshold" else {}
    formula = reference.REFERENCE[name](exactly([x])[0].numpy(), parameters, 2 if tokens else 1, **more)
    want = torch.from_numpy(formula)
    y, *grads = gradients(module, x, grad)
    exact_y, *exact_grads = gradients(exact, *exactly([x, grad]))
    assert y.dtype == dtype and y.device == x.device
    tolerance = CHAINED[dtype] if name in LEARNED else 2 * ROUNDING[dtype]
    worst = max(excess(y, want, tolerance, tolerance * scale_of(want)), excess(exact_y, want, 1e-10, 1e-10))
    assert worst <= 1, f"{name} is off by {worst:.3g} times what is allowed"
    for g, w in zip(grads, exact_grads, strict=True):
        error = excess(g, w, tolerance, tolerance * max(scale_of(w), grad.numel() / max(w.numel(), 1)))
        assert error <= 1, f"a gradient of {name} is off by {error:.3g} times what is allowed"
        worst = max(worst, error)
    return worst


def unsettle(module: nn.Module) -> None:
    """Move parameters away from their start, where many are 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def gradients(module: nn.Module, x: Tensor, grad: Tensor) -> Inputs:
    """Return the result of a module and the gradients of x and of all parameters."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], grad, materialize_grads=True)]


def scale_of(t: Tensor) -> float:
    return max(1.0, t.abs().max().item()) if t.numel() else 1.0


def takes_tokens(name: str) -> bool:
    return get_entry(name).tokens


# ---------------------------------------------------------------- mixed precision


class SmallNet(nn.Module):
    """Two convolutions, each with a BatchNorm and an activation, and a linear layer: four classes of 3-channel maps."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            create(activation, 8),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            create(activation, 16),
        )
        self.classify = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).mean((2, 3)))


def check_training(activation: str, dtype: torch.dtype, device: torch.device | str = "cpu", steps: int = 8) -> float:
    """Train a small network under autocast, in float16 with a GradScaler, and hold its losses against float32's."""
    torch.manual_seed(0)
    net = SmallNet(activation).to(device)
    images, labels = torch.randn(8, 3, 12, 12).to(device), torch.arange(8, device=device) % 4
    images = images + labels.view(-1, 1, 1, 1) / 2
    exact, start = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    want = losses_of(exact, images, labels, torch.float32, steps)
    got = losses_of(net, images, labels, dtype, steps)
    assert all(map(is_finite, [torch.tensor(got), *net.state_dict().values()])), f"{activation}: not finite: {got}"
    moved, expected = parameters_moved(net, start), parameters_moved(exact, start)
    assert moved == expected, f"{activation}: of parameters that move in float32, {expected - moved} did not"
    places = {f"features.{number}" for number in (2, 5) if next(net.features[number].parameters(), None) is not None}
    assert all(any(name.startswith(place) for name in moved) for place in places), f"{activation} did not learn"
    assert got[-1] < 0.95 * got[0], f"{activation}: the loss went from {got[0]:.3f} to {got[-1]:.3f}"
    # The first loss is before any step; later ones drift apart.
    first, later = {torch.float16: (2e-3, 0.02), torch.bfloat16: (0.01, 0.1)}[dtype]
    worst = max(abs(got[0] - want[0]) / first, max(abs(g - w) for g, w in zip(got, want, strict=True)) / later)
    assert worst <= 1, f"{activation}: losses {got} in {dtype}, {want} in float32"
    return worst


def parameters_moved(net: nn.Module, start: dict[str, Tensor]) -> set[str]:
    """Return the names of the parameters that are not where they were; a dead ReLU in a generator keeps its own."""
    return {name for name, parameter in net.named_parameters() if not torch.equal(parameter, start[name])}


def losses_of(net: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype, steps: int) -> list[float]:
    """Train, and return the loss of each step."""
    kind = images.device.type
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.5)
    # A quarter of the default, with which no gradient of this network overflows: a step left out would tell.
    scaler = torch.amp.GradScaler(kind, 2.0**14, enabled=dtype == torch.float16)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    assert not scaler.is_enabled() or scaler.get_scale() == 2**14, f"the scale went to {scaler.get_scale()}"
    return found


def check_low_memory(activation: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Hold the gradients of a block that keeps less for its backward against those of one that keeps everything.

    Args:
        activation: In the zoo.
        dtype: Of autocast, if it is a half type.
        device: Of the block.
    """
    torch.manual_seed(0)
    act = create(activation, 16)
    first, second, last = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(3))
    net = nn.Sequential(first, nn.BatchNorm2d(16), act, second, nn.BatchNorm2d(16), copy.deepcopy(act), last).to(device)
    nets = [net.train(), copy.deepcopy(net)]
    x = torch.randn(2, 16, 48, 48, device=device)
    found = []
    for each, context in zip(nets, (nullcontext(), Recomputation()), strict=True):
        with context, torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            y = each(x)
        y.float().square().mean().backward()
        found.append([parameter.grad for parameter in each.parameters() if parameter.grad is not None])
    worst = 0.0
    for kept, computed in zip(*found, strict=True):
        # What is computed again may be rounded to the neighbouring number of a half type.
        error = excess(computed, kept, CHAINED[dtype], CHAINED[dtype] * scale_of(kept))
        assert error <= 1, f"a gradient of {activation} is off by {error:.3g} times what is allowed"
        worst = max(worst, error)
    return worst


def is_finite(t: Tensor) -> bool:
    return bool(t.isfinite().all())


# ---------------------------------------------------------------- dynamic convolution


def check_dynamic_conv(
    groups: int, side: int, dtype: torch.dtype, channels_last: bool, device: torch.device | str = "cpu"
) -> float:
    """Hold a dynamic convolution and its gradients against one convolution for each image in float64."""
    x = draw_map((3, 8, 9, 7), dtype, channels_last).to(device)
    shares = torch.randn(3, 4).softmax(1).to(device, dtype)
    weight, bias = torch.randn(4, 16, 8 // groups, side, side).to(device, dtype), torch.randn(4, 16).to(device, dtype)
    where = {"padding": side // 2, "groups": groups}
    grad = torch.randn(3, 16, 9, 7).to(device, dtype)
    inputs = [x, shares, weight / (8 * side**2 / groups) ** 0.5, bias]

    def one_by_one(x: Tensor, shares: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernels, biases = torch.einsum("bk,koihw->boihw", shares, weight), shares @ bias
        return torch.stack([F.conv2d(image, k, b, **where) for image, k, b in zip(x, kernels, biases, strict=True)])

    got = run(lambda *t: dynamic_conv(*t, **where), inputs, grad)
    want = run(one_by_one, exactly(inputs), exactly([grad])[0])
    tolerance = CHAINED[dtype]
    worst = max(excess(g, w, tolerance, tolerance * scale_of(w)) for g, w in zip(got, want, strict=True))
    assert worst <= 1, f"dynamic_conv is off by {worst:.3g} times what is allowed"
    assert got[0].is_contiguous(memory_format=torch.channels_last) or not channels_last
    return worst


# ---------------------------------------------------------------- streams, devices and CUDA graphs


def check_stream(name: str, device: torch.device | str) -> float:
    """Run an op on a stream of its own, its input written there just before, and compare with the default stream."""
    x, grad = (draw_map((4, 16, 40, 40)).to(device) for _ in range(2))
    inputs = draw_inputs(name, x)
    want = run(OPS[name][0], inputs, grad)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)  # 10 ms: an op that does not wait for its own stream reads zeros
        late.copy_(x)
        got = run(OPS[name][0], [late, *inputs[1:]], grad)
    torch.cuda.current_stream(device).wait_stream(stream)
    limit = ROUNDING[torch.float32]  # cuBLAS may sum in another order there
    worst = max(excess(g, w.cpu().double(), limit, limit * scale_of(w)) for g, w in zip(got, want, strict=True))
    assert worst <= 1, f"{name} is off by {worst:.3g} times what is allowed on a stream of its own"
    return worst


def check_graph(name: str, dtype: torch.dtype, device: torch.device | str) -> float:
    """Capture an op, forward and backward, in a CUDA graph, and replay it with other inputs."""
    op = OPS[name][0]
    x = draw_map((2, 8, 21, 20), dtype).to(device)
    held, held_grad = draw_inputs(name, x), torch.randn_like(x)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is done once only, such as loading a kernel, cannot be captured
        for _ in range(3):
            run(op, held, held_grad)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(op, held, held_grad)
    worst = 0.0
    for _ in range(3):
        fresh = draw_inputs(name, draw_map(tuple(x.shape), dtype).to(device))
        grad = without_ties(name, fresh, torch.randn_like(x))
        for place, value in zip([*held, held_grad], [*fresh, grad], strict=True):
            place.copy_(value)
        graph.replay()
        want = run(op, fresh, grad)
        limit = ROUNDING[dtype]
        errors = [excess(g, w.cpu().double(), limit, limit * scale_of(w)) for g, w in zip(found, want, strict=True)]
        worst = max(worst, *errors)
        assert worst <= 1, f"{name}, replayed, is off by {worst:.3g} times what is allowed"
    return worst


# ---------------------------------------------------------------- more elements than 32 bits count

# One image that needs offsets of 64 bits inside it, and several that need them from one to the next.
LARGE_SHAPES = {"one image": (1, 3, 26_755, 26_756), "many images": (3, 64, 3_400, 3_300)}
LARGE_OPS = ("arelu", "aglu", "repact", "prelu", "prelu-channels", "dyrelu-2", "acon", "maximum")


def bytes_for_large(shape: tuple[int, ...]) -> int:
    """Return the memory that `check_large` takes: six maps of a half type, and blocks in float64."""
    return 6 * 2 * torch.Size(shape).numel() + 2**32


def check_large(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device | str = "cpu"
) -> float:
    """Hold an op on a map of any size against its formula in float64, block by block on the device."""
    op, formula, _ = OPS[name]
    images, channels, height, width = shape
    form = torch.channels_last if channels_last else torch.contiguous_format

    def draw() -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=form).normal_()

    x, grad = draw(), draw()
    small = draw_inputs(name, draw_map((images, channels, 1, 1)).to(device))[1:]
    more = [draw()] if name == "maximum" else small
    y, grad_x, *grads = run(op, [x, *more], grad)
    assert y.stride() == grad_x.stride() == x.stride()
    rows = max(2**25 // (channels * width), 1)
    totals = [torch.zeros_like(t, dtype=torch.float64) for t in more] if name != "maximum" else []
    magnitude, worst, tolerance = 0.0, 0.0, ROUNDING[dtype]
    for image in range(images):
        for first, last in pairwise([*range(0, height, rows), height]):
            part = slice(image, image + 1), slice(None), slice(first, last)
            inputs = [t.double() for t in (x[part], *(of_image(t, part, image, height) for t in more))]
            part_grad = grad[part].double()
            clear = clear_of_ties(name, inputs)
            want_y, want_x, *want = run(formula, inputs, part_grad)
            magnitude += (inputs[0] * part_grad).abs().sum().item()
            for got, exact in ((y[part], want_y), (grad_x[part], want_x)):
                error = (got.double() - exact).abs() / (tolerance * (1 + exact.abs()))
                worst = max(worst, (error * clear).nan_to_num(nan=float("inf")).max().item())
            for total, t in zip(totals, want, strict=False):
                (total[image : image + 1] if total.ndim == 4 else total).add_(t)
    assert worst <= 1, f"{name} on {shape} is off by {worst:.3g} times what is allowed"
    # Two terms within rounding of one another share no gradient by the formula: 1 of 10 ** 5 elements at most.
    coarse = tolerance if "arelu" in name else 1e-4
    for got, exact in zip(grads, totals, strict=False):
        error = excess(got, exact.cpu(), coarse, coarse * magnitude / exact.numel())
        assert error <= 1, f"a sum over {shape} by {name} is off by {error:.3g} times what is allowed"
        worst = max(worst, error)
    return worst


def of_image(t: Tensor, part: tuple[slice, ...], image: int, height: int) -> Tensor:
    """Return the part of a map, or what belongs to an image of what is per image."""
    if t.ndim < 4:
        return t
    return t[part] if t.shape[2] == height else t[image : image + 1]
