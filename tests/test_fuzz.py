"""A small sample of `make fuzz`, all that failed once, and bugs planted for the fuzzer to find."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from fuzzing import corpus, planted
from fuzzing.campaign import Tally, fuzz, replay
from fuzzing.inputs import plan_inputs
from fuzzing.kinds import KINDS, Kind, make_command_lines
from fuzzing.watch import FaultKind, Target, Watch
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.name == "nt", reason="nothing forks there, and each command takes ten seconds"),
]
SAMPLE = 200  # examples of all kinds
NAMES = [kind.target.name for kind in KINDS]


def require_no_fault(tally: Tally) -> None:
    found = [f"{each.fault.kind} at {each.example!r:.300}: {each.fault.words}" for each in tally.faults.values()]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_what_failed_once_is_a_sentence_now(kind: Kind) -> None:
    require_no_fault(replay(kind.target, kind.corpus.values()))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_sample_of_each_kind_has_no_fault(kind: Kind) -> None:
    tally = fuzz(kind.target, kind.inputs, int(SAMPLE * kind.share), seed=0)
    assert tally.examples == int(SAMPLE * kind.share)
    require_no_fault(tally)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return make_command_lines(tmp_path_factory.mktemp("fuzz"))


def test_command_lines_have_no_fault(lines: Kind) -> None:
    # The others are in test_cli, too, where a mistake costs no process.
    names = ("code under download", "a data set that is gone", "control characters")
    require_no_fault(replay(lines.target, [lines.corpus[name] for name in names]))
    require_no_fault(fuzz(lines.target, lines.inputs, 3, seed=1))


@pytest.mark.parametrize(
    ("check", "kind", "smallest"),
    [
        (planted.raise_error, "traceback", 20),
        (planted.talk_in_lines, "traceback", 20),
        (planted.compute_forever, "hang", None),
        (planted.wait_forever, "hang", None),
        (planted.evaluate, "code run", None),
        (planted.call_shell, "code run", 20),
        (planted.start_process, "code run", None),
        (planted.leave_file, "partial file", 20),
        (planted.write_half, "partial file", 20),
        (planted.write_elsewhere, "partial file", 20),
        (planted.take_memory, "memory", None),
        (planted.abort, "crash", None),
    ],
)
def test_a_planted_bug_is_found_and_made_small(
    check: Callable[[Any], None], kind: FaultKind, smallest: int | None
) -> None:
    seconds = 0.1 if kind == "hang" else 2.0
    target = Target("planted", check, seconds=seconds, memory=100 << 20, writes=check is planted.write_half)
    texts = st.one_of(plan_inputs, st.sampled_from([corpus.PLANS["a call"], corpus.SPECS["a call"]]))
    examples = 5 if kind == "hang" else 40  # a hang is waited for
    tally = fuzz(target, texts, examples, seed=0, shrinking=0.5 if kind == "hang" else 2.0)
    assert list(tally.faults_by_kind()) == [kind], tally.faults
    assert tally.examples == examples, "the others are tried all the same"
    [found] = [each for each in tally.faults.values() if each.fault.kind == kind][:1]
    assert smallest is None or len(found.example) <= smallest, found.example
    with Watch(target) as watch:
        again = watch.try_example(found.example)
        assert again.fault is not None and again.fault.kind == kind
        good = watch.try_example("mish").fault
        assert good is None or check is planted.talk_in_lines, good
    if kind == "hang":
        assert check.__name__ in found.fault.words, "it says where"
