"""Give a target many examples that Hypothesis makes, and make what fails as small as it can be."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from fuzzing.watch import Fault, Target, Verdict, Watch

_BATCH = 500  # examples of one call of Hypothesis, which ends at its first fault
_SHRINKING = 30.0  # seconds for each fault


@dataclass
class Found:
    """A fault, the smallest input found that has it, and how many had it."""

    target: str
    fault: Fault
    example: Any
    count: int = 1


@dataclass
class Tally:
    """What became of the examples of one kind.

    Attributes:
        target: The kind.
        wanted: Examples that were to be tried.
        examples: Those that were; the tries to make a fault small are no examples.
        accepted: Those that were taken rather than refused.
        faults: By kind of fault and place.
        slowest: CPU seconds of the slowest example that ended, and the example.
        memory: Bytes of the greediest example.
        peak: Bytes of the largest process.
        seconds: Wall time.
        stopped: Whether Ctrl-C ended it.
    """

    target: str
    wanted: int = 0
    examples: int = 0
    accepted: int = 0
    faults: dict[tuple[str, str], Found] = field(default_factory=dict)
    slowest: tuple[float, Any] = (0.0, None)
    memory: int = 0
    peak: int = 0
    seconds: float = 0.0
    stopped: bool = False

    def count(self, example: Any, verdict: Verdict) -> None:
        """Add one example, but for its fault."""
        self.examples += 1
        self.accepted += verdict.accepted and verdict.fault is None
        self.memory, self.peak = max(self.memory, verdict.memory), max(self.peak, verdict.peak)
        if verdict.seconds > self.slowest[0]:
            self.slowest = (verdict.seconds, example)

    def faults_by_kind(self) -> Counter[str]:
        """Return how many examples had a fault of each kind."""
        found: Counter[str] = Counter()
        for (kind, _), each in self.faults.items():
            found[kind] += each.count
        return found

    def join(self, other: Tally) -> None:
        """Add what another process counted."""
        self.wanted += other.wanted
        self.examples += other.examples
        self.accepted += other.accepted
        self.slowest = max(self.slowest, other.slowest, key=lambda each: each[0])
        self.memory, self.peak = max(self.memory, other.memory), max(self.peak, other.peak)
        self.stopped = self.stopped or other.stopped
        self.seconds = max(self.seconds, other.seconds)
        for key, found in other.faults.items():
            if key in self.faults:
                self.faults[key].count += found.count
                self.faults[key].example = min(
                    self.faults[key].example, found.example, key=lambda each: len(repr(each))
                )
            else:
                self.faults[key] = found


class _ShrunkEnough(BaseException):
    """Ends Hypothesis' shrinking; no Exception, which it would take for another fault."""


class _HasFault(Exception):
    """Tells Hypothesis that an example has the fault."""


def replay(target: Target, examples: Iterable[Any]) -> Tally:
    """Try given examples, such as those of faults that were mended."""
    tally, started = Tally(target.name), time.monotonic()
    with Watch(target) as watch:
        for example in examples:
            verdict = watch.try_example(example)
            tally.count(example, verdict)
            if verdict.fault:
                key = (verdict.fault.kind, verdict.fault.where)
                tally.faults.setdefault(key, Found(target.name, verdict.fault, example, 0)).count += 1
    tally.wanted, tally.seconds = tally.examples, time.monotonic() - started
    return tally


def fuzz(
    target: Target, inputs: st.SearchStrategy[Any], examples: int, seed: int, shrinking: float = _SHRINKING
) -> Tally:
    """Try that many examples, and go on behind each fault that is found; Ctrl-C ends it with what is done so far.

    Args:
        target: What they are given to.
        inputs: What makes them.
        examples: Their number.
        seed: Equal ones give equal examples.
        shrinking: Seconds to make an example of a fault small in.
    """
    tally, started, batch = Tally(target.name, wanted=examples), time.monotonic(), 0
    with Watch(target) as watch:
        try:
            while tally.examples < examples:
                before = tally.examples
                _run_batch(watch, inputs, min(_BATCH, examples - tally.examples), seed + batch, tally, shrinking)
                batch += 1
                if tally.examples == before:
                    break  # the strategy has no more
        except KeyboardInterrupt:
            tally.stopped = True
    tally.seconds = time.monotonic() - started
    return tally


def _run_batch(
    watch: Watch, inputs: st.SearchStrategy[Any], examples: int, seed: int, tally: Tally, shrinking: float
) -> None:
    """Let Hypothesis make examples until one has a fault that is not known yet, which it then makes small."""
    new: Found | None = None
    deadline = 0.0

    def try_example(example: Any) -> None:
        nonlocal new, deadline
        if new and time.monotonic() > deadline:
            raise _ShrunkEnough
        verdict = watch.try_example(example)
        fault = verdict.fault
        key = (fault.kind, fault.where) if fault else None
        if new is None:
            tally.count(example, verdict)
            if fault is None or key is None:
                return
            if key in tally.faults:
                tally.faults[key].count += 1
                return
            new = tally.faults[key] = Found(tally.target, fault, example)
            deadline = time.monotonic() + shrinking
            raise _HasFault
        if fault and key == (new.fault.kind, new.fault.where):
            new.fault, new.example = fault, example
            raise _HasFault

    configured = settings(
        max_examples=examples,
        database=None,  # what failed is written down as an input, which lasts longer than Hypothesis' choices
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
        derandomize=False,
    )
    with contextlib.suppress(_HasFault, _ShrunkEnough, hypothesis.errors.Flaky):
        hypothesis.seed(seed)(configured(hypothesis.given(inputs)(try_example)))()
