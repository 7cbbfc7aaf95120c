"""PWLU: a piecewise linear unit with learned values at its knots (Zhou et al., ICCV 2021, arXiv:2104.03693)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtdetr_act.activations.checks import check_count, check_positive
from rtdetr_act.activations.exporting import Lambda
from rtdetr_act.activations.fitting import ROOT_WEIGHTS
from rtdetr_act.activations.protocol import GRID, Entry
from rtdetr_act.activations.temperature import Scheduled
from rtdetr_act.kernels.aten import is_tracing
from rtdetr_act.kernels.backend import compute_dtype
from rtdetr_act.kernels.blocks import scratch_like
from rtdetr_act.kernels.elementwise import Elementwise, Reduce, apply_elementwise
from rtdetr_act.kernels.recomputable import recomputable

PAPER = "Zhou et al., ICCV 2021, arXiv:2104.03693"
INTERVALS, REALIGN_EPOCH = 16, 5  # the paper's
DEVIATIONS = 3  # half the width of a realigned region, in standard deviations of the input: the paper's
MOMENTUM = 0.1  # of a batch in the running statistics: the paper's
LEAST_WIDTH = 0.01  # of the region, by which slopes are divided


class PWLU(Scheduled):
    """Interpolate linearly between learned values at equidistant knots, with learned slopes outside of them.

    It starts as ReLU. The region of the knots is learned too. In training, a running mean and standard deviation of the
    input are collected until `realign_epoch`, when the region becomes the mean ± 3 standard deviations. The paper keeps
    the function a ReLU until then, and makes it one again on the new knots. Here it learns from the first step, and its
    values at the new knots become those that it has there: the result is the same for a ReLU, a function fitted by
    `init="match"` is kept, and so is what an average of weights (EMA) has learned.

    `set_epoch` realigns: Ultralytics' training calls it, other training loops call `rtdetr_act.set_epoch`. Without it
    the initial region is learned on. The statistics are buffers, which DistributedDataParallel copies to all processes
    before each step; those before the last step are used, which are the same in all of them.

    Shapes: any to the same. `values` is (intervals + 1,), `slopes` (2,), left and right, and `bounds` (2,), the ends of
    the region; they are shared by all channels and positions.

    Args:
        intervals: Number of intervals between knots, even, so that 0 is a knot. Default: 16.
        bound: Half the width of the initial region around 0. Default: 3.0, in which the output of a BatchNorm is.
        realign_epoch: Epoch at which the region is realigned. Default: 5; None for never.

    Raises:
        ValueError: `intervals` is not an even integer of at least 2, `bound` not positive or `realign_epoch` negative.

    Paper: Zhou et al., ICCV 2021, arXiv:2104.03693.

    >>> PWLU()(torch.tensor([-4.0, -1.0, 1.0, 4.0])).detach()
    tensor([0., 0., 1., 4.])
    """

    statistics: Tensor
    realigned: Tensor

    def __init__(
        self, intervals: int = INTERVALS, bound: float = 3.0, realign_epoch: float | None = REALIGN_EPOCH
    ) -> None:
        super().__init__()
        if check_count("intervals", intervals, 2) % 2:
            raise ValueError(f"intervals is an even number, so that 0 is a knot, not {intervals}")
        check_positive("bound", bound)
        if realign_epoch is not None:
            check_positive("realign_epoch", realign_epoch, or_zero=True)
        self.realign_epoch = realign_epoch
        self.values = nn.Parameter(torch.linspace(-bound, bound, intervals + 1).relu())
        self.slopes = nn.Parameter(torch.tensor([0.0, 1.0]))
        self.bounds = nn.Parameter(torch.tensor([-bound, bound], dtype=torch.float32))
        # The mean and the standard deviation of the input, now and before the last step. Both buffers are always there,
        # so that a state dict can be loaded whatever has happened to the module since.
        self.register_buffer("statistics", torch.tensor([[0.0, bound / DEVIATIONS]] * 2))
        self.register_buffer("realigned", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x, in the shape and dtype of x."""
        if self.training and self.realign_epoch is not None:
            self._collect_statistics(x)
        return pwlu(x, self.values, self.slopes, self.bounds)

    @torch.no_grad()
    def _collect_statistics(self, x: Tensor) -> None:
        if not x.numel():
            return
        x, dtype, last = x.detach(), compute_dtype(x.dtype), self.statistics[0].clone()
        mean = x.mean(dtype=dtype)
        # By the norm, in two passes that take 0.9 ns per element on a CPU, where torch.std_mean takes 7.9.
        variance = torch.linalg.vector_norm(x, dtype=dtype) ** 2 / x.numel() - mean**2
        batch = torch.stack([mean, variance.clamp(min=0).sqrt()]).to(last.dtype)
        found = torch.lerp(last, batch, MOMENTUM)
        # A half type may overflow in a step that is skipped.
        self.statistics[0] = torch.where(found.isfinite().all(), found, last)
        self.statistics[1] = last

    @torch.no_grad()
    def set_epoch(self, epoch: float) -> None:
        """Realign the region from `realign_epoch` on, once, and stop collecting statistics."""
        if self.realign_epoch is None or epoch < self.realign_epoch:
            return
        self.realign_epoch = None
        if self.realigned:  # a loaded state dict says so
            return
        self.realigned.fill_(True)
        mean, deviation = self.statistics[1].to(self.bounds.dtype)
        bounds = mean + DEVIATIONS * deviation * torch.tensor([-1.0, 1.0]).to(self.bounds)
        self.values.copy_(pwlu(_place_knots(bounds, self.values.numel() - 1), self.values, self.slopes, self.bounds))
        self.bounds.copy_(bounds)

    def extra_repr(self) -> str:
        """Return the arguments of the constructor that are not defaults, and when it will be realigned."""
        intervals = self.values.numel() - 1
        parts = [f"intervals={intervals}"] if intervals != INTERVALS else []
        return ", ".join([*parts, f"realign_epoch={self.realign_epoch}"])


# ---------------------------------------------------------------- callbacks of the entry


@torch.no_grad()
def _fit(module: PWLU, target: Tensor) -> Tensor:
    """Implement `Entry.fit`: fit values and slopes to a target curve on `GRID`, and return the fitted curve."""
    count = module.values.numel()
    bounds = module.bounds.double()
    # The function is linear in values and slopes, so that each column is the function for one of them being 1.
    columns = [_compute_function(GRID, one[:count], one[count:], bounds) for one in torch.eye(count + 2).double()]
    design = torch.stack(columns, 1) * ROOT_WEIGHTS[:, None]
    # Without inputs from which to learn them, outer values and slopes stay.
    start = torch.cat([module.values, module.slopes]).double()
    residual = target * ROOT_WEIGHTS - design @ start
    found = start + torch.linalg.pinv(design, rtol=1e-6) @ residual
    module.values.copy_(found[:count])
    module.slopes.copy_(found[count:])
    return _compute_function(GRID, module.values.double(), module.slopes.double(), bounds)


def _exportable(module: PWLU) -> nn.Module:
    """Implement `Entry.exportable`: the sum of what the function gains on each segment.

    The terms are bounded and cancel out in part only, where those of a sum of ReLUs grow with the input and cancel out
    in full, which half types do not stand.
    """
    values, slopes, bounds = (each.detach().double() for each in (module.values, module.slopes, module.bounds))
    segments = _list_segments(values, slopes, bounds)
    constant = float(values[0] - sum(_compute_gain(bounds[0], *segment) for segment in segments))

    def compute(x: Tensor) -> Tensor:
        gains = [_compute_gain(x, *segment) for segment in segments]
        return sum(gains[1:], gains[0]) + constant

    return Lambda(compute)


def _compute_gain(x: Tensor, slope: float, low: float | None, high: float | None) -> Tensor:
    """Return what a function of one slope gains from one end of a segment to x, if x is in the segment."""
    end = high if low is None else low
    return x * slope if end is None else (x.clamp(low, high) - end) * slope


def _list_segments(values: Tensor, slopes: Tensor, bounds: Tensor) -> list[tuple[float, float | None, float | None]]:
    """Return the slope and the ends of each segment that is not constant, at least one.

    Neighbours of one slope are joined, to a single segment for a ReLU.
    """
    ends = [None, *_place_knots(bounds, values.numel() - 1).tolist(), None]
    segments: list[tuple[float, float | None, float | None]] = []
    for slope, low, high in zip(_compute_slopes(values, slopes, bounds).tolist(), ends, ends[1:], strict=False):
        if segments and segments[-1][0] == slope:
            low = segments.pop()[1]
        segments.append((slope, low, high))
    return [segment for segment in segments if segment[0]] or segments[:1]


def _learned(module: PWLU) -> dict[str, Tensor]:
    """Return the slopes outside of the region, its ends, and the least and the largest value at a knot."""
    (left, right), (low, high) = module.slopes, module.bounds
    least, largest = module.values.aminmax()
    return {"slope_left": left, "slope_right": right, "low": low, "high": high, "least": least, "largest": largest}


# ---------------------------------------------------------------- op


@recomputable
def pwlu(x: Tensor, values: Tensor, slopes: Tensor, bounds: Tensor) -> Tensor:
    """Return a piecewise linear function of x, in the dtype and memory format of x.

    Args:
        x: Any shape.
        values: (N + 1,), the values at the knots, which divide the region into N equal intervals.
        slopes: (2,), the slopes on the left and on the right of the region.
        bounds: (2,), the ends of the region.

    Paper: Zhou et al., ICCV 2021, arXiv:2104.03693.

    >>> x = torch.tensor([-2.0, 0.5, 3.0])
    >>> pwlu(x, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, 1.0]))
    tensor([2.0000, 0.5000, 5.0000])
    """
    # In float32 for half types, in which knots and slopes would be rounded.
    dtype = compute_dtype(x.dtype)
    return apply_elementwise(_FUNCTION, x, *_tabulate(values.to(dtype), slopes.to(dtype), bounds.to(dtype)))


def _compute_function(x: Tensor, values: Tensor, slopes: Tensor, bounds: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    return _compute_plain(x, *_tabulate(values, slopes, bounds))


def _tabulate(values: Tensor, slopes: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slope and the intercept of each segment, and the line that maps x to the number of its segment.

    The last segment is repeated up to a power of two. The function is continuous, so that neither x nor the bounds have
    a gradient through the number of the segment.

    Returns:
        The slopes and the intercepts, each (R,), and the factor and the offset of the line, (2,).
    """
    intervals = _count(values) - 1
    slope, knots = _compute_slopes(values, slopes, bounds), _place_knots(bounds, intervals)
    intercept = torch.cat([values[:1], values]) - slope * torch.cat([knots[:1], knots])
    rows = 2
    while rows < intervals + 2:  # bit_length() breaks a graph in torch 2.4
        rows *= 2
    missing = rows - (intervals + 2)
    slope, intercept = (torch.cat([each, each[-1:].expand(missing)]) for each in (slope, intercept))
    rate = intervals / _measure_width(bounds)
    return slope, intercept, torch.stack([rate, 1 - rate * bounds[0]]).detach()


def _compute_slopes(values: Tensor, slopes: Tensor, bounds: Tensor) -> Tensor:
    """Return the slopes of all segments, (N + 2,)."""
    inner = values.diff() * ((_count(values) - 1) / _measure_width(bounds))
    return torch.cat([slopes[:1], inner, slopes[1:]])


def _place_knots(bounds: Tensor, intervals: int) -> Tensor:
    """Return the knots, (intervals + 1,)."""
    return bounds[0] + _measure_width(bounds) * (torch.arange(intervals + 1).to(bounds) / intervals)


def _count(values: Tensor) -> int:
    """Return the number of elements of a vector, a plain number also while a graph is traced, which numel() is not."""
    return len(values.unbind()) if is_tracing() else values.numel()


def _measure_width(bounds: Tensor) -> Tensor:
    return (bounds[1] - bounds[0]).clamp(min=LEAST_WIDTH)


def _find_segments(x: Tensor, line: Tensor, rows: int, position: Tensor, segments: Tensor) -> Tensor:
    """Return the numbers of the segments: 0 on the left of the region, 1 to N inside, and above on the right.

    Args:
        x: Any shape.
        line: (2,), as `_tabulate` returns it.
        rows: Number of rows of the tables, a power of two.
        position: Buffer like x.
        segments: Buffer of the same shape, int32, to which the result is written.
    """
    torch.mul(x, line[0], out=position).add_(line[1]).clamp_(0, rows - 1)
    # NaN becomes any integer.
    return segments.copy_(position).bitwise_and_(rows - 1)


def _compute_plain(x: Tensor, slope: Tensor, intercept: Tensor, line: Tensor) -> Tensor:
    """Compute the activation in torch's own differentiable operators."""
    rows = _count(slope)
    segments = (x.detach() * line[0] + line[1]).clamp(0, rows - 1).long().bitwise_and(rows - 1)
    return x * slope[segments] + intercept[segments]


def _forward(x: Tensor, slope: Tensor, intercept: Tensor, line: Tensor, out: Tensor) -> None:
    """Compute a block of the activation."""
    position = scratch_like(x)
    segments = _find_segments(x, line, slope.numel(), position, scratch_like(torch.empty_like(x, dtype=torch.int32)))
    product = torch.index_select(slope, 0, segments, out=scratch_like(x, 1)).mul_(x)
    torch.add(product, torch.index_select(intercept, 0, segments, out=position), out=out)


def _backward(
    grad: Tensor, x: Tensor, slope: Tensor, intercept: Tensor, line: Tensor, out: Tensor, reduce: Reduce
) -> list[Tensor]:
    """Compute a block of the gradient of x, and return those of the slopes, of the intercepts, and 0 for the line."""
    buffer, rows = scratch_like(x), slope.numel()
    segments = _find_segments(x, line, rows, buffer, scratch_like(torch.empty_like(x, dtype=torch.int32)))
    torch.mul(torch.index_select(slope, 0, segments, out=buffer), grad, out=out)
    return [
        _sum_by_segment(segments, torch.mul(grad, x, out=buffer), rows),
        _sum_by_segment(segments, grad, rows),
        torch.zeros_like(line),
    ]


def _sum_by_segment(segments: Tensor, values: Tensor, rows: int) -> Tensor:
    """Return the sum of the values of each segment, (rows,)."""
    if values.is_cpu:
        # Both sums take 3.6 ns per element on a loaded core, in blocks of 64 K: 7.2 with int64 instead of int32, 4.5 by
        # scatter_add_, 7.4 by index_add_, 7.8 as products with 18 clamped copies of x.
        return torch.bincount(segments, values, rows)
    return _sum_by_one_hot(segments, values, rows)


def _sum_by_one_hot(segments: Tensor, values: Tensor, rows: int) -> Tensor:
    """Return the sums as products with the rows of a matrix: deterministic, and without waiting for the device."""
    total = values.new_zeros(rows)
    numbers = torch.arange(rows, device=values.device, dtype=segments.dtype)[:, None]
    for part, of_part in zip(segments.split(_ONE_HOT), values.split(_ONE_HOT), strict=True):
        total.addmv_((part == numbers).to(values.dtype), of_part)
    return total


_ONE_HOT = 1 << 20  # elements, of which the matrix takes 128 MiB for 32 rows in float32


# Per element on one loaded core where SiLU takes 1.2 + 1.6 ns (the best of 32 K, 64 K and 128 K elements per block):
# forward 4.3 ns, and 8.1 as a sum of 18 clamped copies of x; backward 7.1 ns.
_FUNCTION = Elementwise(_compute_plain, _forward, _backward, buffers=8)


ENTRIES = (
    Entry(
        "pwlu",
        PWLU,
        "piecewise linear through 17 learned values, with learned slopes outside",
        PAPER,
        aliases=("piecewise_linear_unit",),
        fit=_fit,
        exportable=_exportable,
        learned=_learned,
        use_when=(
            "To learn any function of one number, with 21 parameters per site. It starts as relu exactly, or with "
            "init=match close to the activation that it replaces."
        ),
    ),
)
