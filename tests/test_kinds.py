"""What holds tests to their kinds."""

from __future__ import annotations

import subprocess
import sys

import kinds
import pytest


def test_a_unit_test_neither_starts_processes_nor_trains_nor_exports() -> None:
    from ultralytics.engine.exporter import Exporter
    from ultralytics.engine.trainer import BaseTrainer

    with pytest.raises(pytest.fail.Exception, match="a test marked unit starts a process; mark it integration"):
        subprocess.Popen([sys.executable, "-c", ""])
    with pytest.raises(pytest.fail.Exception, match="trains"):
        BaseTrainer.train(None)
    with pytest.raises(pytest.fail.Exception, match="exports"):
        Exporter()


@pytest.mark.integration
def test_an_integration_test_kills_nothing() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(pytest.fail.Exception, match="a test marked integration signals a process; mark it kill"):
            process.kill()
        process.communicate(b"\n")
    assert process.returncode == 0


@pytest.mark.parametrize("own", [None, *kinds.KINDS])
def test_every_test_has_one_kind(own: str | None, request: pytest.FixtureRequest) -> None:
    def settled(*fixtures: str) -> set[str]:
        test = pytest.Function.from_parent(request.node.parent, name="test", callobj=lambda: None)
        test.fixturenames = list(fixtures)
        if own is not None:
            test.add_marker(own)
        kinds.settle(test)
        return {mark.name for mark in test.iter_markers()} & set(kinds.KINDS)

    assert settled() == {own or "unit"}
    assert settled("data", "stock_run") == {own or "integration"}
    assert settled("stock_run", "resumed") == {own or "kill"}


def test_two_kinds_are_an_error(request: pytest.FixtureRequest) -> None:
    test = pytest.Function.from_parent(request.node.parent, name="test", callobj=lambda: None)
    for name in ("integration", "kill"):
        test.add_marker(name)
    with pytest.raises(pytest.UsageError, match="is marked integration and kill; a test has one kind"):
        kinds.settle(test)
