"""Time calls in turns, and compare them by the ratios of each turn.

What is compared takes turns, so that a machine that slows down slows all alike, and each turn gives one ratio: the
median of those is what is reported, with their quartiles as spread.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Key = TypeVar("Key")


@dataclass(frozen=True)
class Ratio:
    """A cost in units of another one, over the turns of one run.

    Attributes:
        median: Median of the ratios of the turns.
        low: Their first quartile.
        high: Their third quartile.
        seconds: Median time of one call, in seconds.
    """

    median: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        """Return the median, and the quartiles in brackets."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def time_medians(
    calls: Mapping[Key, Callable[[], Any]],
    turns: int,
    *,
    warmup: int = 2,
    repeat: int = 1,
    device: torch.device | str = "cpu",
) -> dict[Key, list[float]]:
    """Time calls in turns; each turn runs every call, the first one another each time.

    Args:
        calls: What to time, by name.
        turns: Number of turns that count.
        warmup: Turns before those.
        repeat: Calls in a row within a turn. With several, the median of all but the first, which finds the data of
            another one in the cache.
        device: Where the calls compute: the clock of a call on a GPU stops when that GPU has done its work.

    Returns:
        Seconds of each turn, by name.
    """
    found = time_rounds(calls, turns, warmup=warmup, repeat=repeat, device=device)
    return {name: [statistics.median(row) for row in rows] for name, rows in found.items()}


def time_rounds(
    calls: Mapping[Key, Callable[[], Any]],
    turns: int,
    *,
    warmup: int = 2,
    repeat: int = 1,
    device: torch.device | str = "cpu",
) -> dict[Key, list[list[float]]]:
    """Return the seconds of every call of each round; arguments as in `time_medians`."""
    found: dict[Key, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup, turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                row = [_time_call(calls[name], device) for _ in range(repeat)]
                if turn >= 0:
                    found[name].append(row[1:] or row)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return found


def _time_call(call: Callable[[], Any], device: torch.device | str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del result  # freed after the clock has stopped
    return seconds


def _synchronize(device: torch.device | str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)  # of the device given: without one it waits for the current device


def is_cuda(device: torch.device | str) -> bool:
    """Say whether a device is a GPU of CUDA."""
    return torch.device(device).type == "cuda"


def compute_ratios(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Ratio]:
    """Return the times in units of those of `base`, turn by turn.

    >>> print(compute_ratios({"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 9.0]}, "a")["b"])
    2.00 (2.00-2.50)
    """
    found = {}
    for name, values in times.items():
        each = [value / other for value, other in zip(values, times[base], strict=True)]
        low, median, high = statistics.quantiles(each, n=4, method="inclusive")
        found[name] = Ratio(median, low, high, statistics.median(values))
    return found
