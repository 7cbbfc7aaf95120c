"""Time calls in interleaved rounds, and compare them by the ratios within each round.

Interleaving makes a change of the machine's speed affect all calls alike. Each round gives one ratio; the median of the
ratios is reported, with their quartiles as spread.
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
    """A time relative to a baseline, over the rounds of one measurement.

    Attributes:
        median: Median of the ratios of the rounds.
        low: Their first quartile.
        high: Their third quartile.
        seconds: Median time of one call in seconds.
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
    rounds: int,
    *,
    warmup: int = 2,
    repeat: int = 1,
    device: torch.device | str = "cpu",
) -> dict[Key, list[float]]:
    """Return the median time of each call in each of several interleaved rounds, in seconds.

    Each round runs every call and starts with another one.

    Args:
        calls: Functions to time, by name.
        rounds: Number of measured rounds.
        warmup: Number of rounds before those, whose times are discarded.
        repeat: Consecutive calls of a function within a round. If greater than 1, the first is discarded, since it
            finds the data of another function in the cache.
        device: Device on which the calls compute. A CUDA device is synchronised before and after each call.

    Returns:
        For each name, a median in seconds per round.
    """
    times = time_rounds(calls, rounds, warmup=warmup, repeat=repeat, device=device)
    return {name: [statistics.median(repeats) for repeats in rows] for name, rows in times.items()}


def time_rounds(
    calls: Mapping[Key, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 2,
    repeat: int = 1,
    device: torch.device | str = "cpu",
) -> dict[Key, list[list[float]]]:
    """Return the time of every single call in each of several interleaved rounds, in seconds.

    Takes the arguments of `time_medians`.

    Returns:
        For each name, a list per round with the seconds of its calls.
    """
    times: dict[Key, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(-warmup, rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds = [_time_call(calls[name], device) for _ in range(repeat)]
                if number >= 0:
                    times[name].append(seconds[1:] or seconds)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return times


def _time_call(call: Callable[[], Any], device: torch.device | str) -> float:
    """Return the seconds that a call takes, including its work on the device."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del result  # freed outside the measured interval
    return seconds


def _synchronize(device: torch.device | str) -> None:
    """Wait for the work on a CUDA device; does nothing for other devices."""
    if is_cuda(device):
        torch.cuda.synchronize(device)  # without an argument it would synchronise the current device


def is_cuda(device: torch.device | str) -> bool:
    """Return whether a device is a CUDA device."""
    return torch.device(device).type == "cuda"


def compute_ratios(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Ratio]:
    """Return the times relative to those of a baseline, with the ratios taken within each round.

    Args:
        times: For each name, a time in seconds per round, of two or more rounds.
        baseline: Name in `times` whose ratio is 1.

    >>> print(compute_ratios({"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 9.0]}, "a")["b"])
    2.00 (2.00-2.50)
    """
    ratios = {}
    for name, values in times.items():
        quotients = [value / other for value, other in zip(values, times[baseline], strict=True)]
        low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
        ratios[name] = Ratio(median, low, high, statistics.median(values))
    return ratios
