"""The checks and benchmarks for a GPU, on a CPU: they find what is wrong, go on where they were, say what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gpu_checks
import op_checks
import pytest
import torch
from torch import Tensor

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))
import check_gpu  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPTS / "check_gpu.py"), "--output", str(folder), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    op, formula, more = op_checks.OPS["prelu"]
    nearly = 1 + 5 * op_checks.ROUNDING[dtype]
    wrong = (lambda x, weight: op(x, weight) + (x - x.detach()) * (nearly - 1), formula, more)
    monkeypatch.setitem(op_checks.OPS, "prelu", wrong)
    pair = op_checks.draw_pair((2, 4, 9, 9), dtype, "contiguous")
    with pytest.raises(AssertionError, match="gradient 1 of prelu"):
        op_checks.assert_right("prelu", *pair)
    with pytest.raises(AssertionError, match="prelu"):
        op_checks.check_second_derivatives("prelu", *pair)


def test_nan_and_another_shape_are_errors_without_bound() -> None:
    one = torch.ones(3)
    assert op_checks.excess(torch.full((3,), torch.nan), one.double(), 1, 1) == float("inf")
    assert op_checks.excess(one[:2], one.double(), 1, 1) == float("inf")


def test_large_maps_are_checked_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu_checks.LARGE_OPS:
        for channels_last in (False, True):
            assert gpu_checks.check_large(name, (2, 3, 13, 11), torch.bfloat16, channels_last) <= 1
    op, formula, more = op_checks.OPS["prelu"]

    def forget_the_end(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([op(x[:, :, :-1], weight), 0 * x[:, :, -1:]], 2)

    monkeypatch.setitem(op_checks.OPS, "prelu", (forget_the_end, formula, more))
    with pytest.raises(AssertionError, match="prelu on"):
        gpu_checks.check_large("prelu", (2, 3, 13, 11), torch.bfloat16, False)


def test_activations_are_timed_in_all_forms_and_reported(tmp_path: Path) -> None:
    machine = {**check_gpu.read_machine(), "parts": {name: part.title for name, part in gpu_parts.PARTS.items()}}
    machine |= {"gpu": "a card", "memory": 80.0, "driver": "1", "cuda": "13"}  # so that there is something to draw
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    items = {}
    for name in gpu_parts.BENCHED:
        item = check_gpu.try_item(partial(gpu_parts.bench_op, name, (2, 16, 6, 6), torch.float32, "cpu", 2, False))
        assert item["ok"], item["said"]
        items[f"{name}, 2x16x6x6"] = item
    check_gpu.save(tmp_path / "bench-float32.json", {**check_gpu.load(tmp_path / "none"), "items": items})
    said = gpu_report.write_report(tmp_path, tmp_path / "docs")
    assert [line.rpartition("/")[2] for line in said] == ["gpu.csv", "gpu.png", "gpu.md"]
    page = (tmp_path / "docs" / "gpu.md").read_text()
    assert "a card, 80 GiB" in page and "| dyrelu_c |" in page and "gpu.png" in page
    # What an interpreter did does not take its place.
    (tmp_path / "machine.json").write_text(json.dumps({**machine, "gpu": None}))
    assert "stays as it is" in gpu_report.write_report(tmp_path, tmp_path / "docs")[0]


@pytest.mark.integration
def test_a_part_goes_on_where_it_was_and_failures_are_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    first = call(tmp_path, "--part", "kernels")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "There is no GPU here" in first.stdout and "kernels: 9 done, 0 failed" in first.stdout
    file = tmp_path / "kernels.json"
    found = json.loads(file.read_text())
    assert found["items"]["arelu-inplace"]["said"] == "arelu_, arelu_backward"
    # Killed in its fourth item: that one and what comes behind it is run again, nothing else.
    names = list(found["items"])
    kept = {name: found["items"][name] for name in names[:3]} | {names[3]: check_gpu.failure(check_gpu.STOPPED)}
    kept[names[0]]["said"] = "from before"
    check_gpu.save(file, {**found, "complete": False, "items": kept})
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert check_gpu.run_parts(["kernels"], machine, tmp_path, time.monotonic() + 200) == []
    assert "kernels: 9 done, 0 failed" in capfd.readouterr().out
    again = json.loads(file.read_text())["items"]
    assert again[names[0]]["said"] == "from before" and all(item["ok"] for item in again.values())


def test_a_part_that_needs_a_gpu_says_so(tmp_path: Path) -> None:
    graphs = gpu_parts.PARTS["graphs"]
    assert gpu_parts.missing_for(graphs, gpu_parts.Place("cpu", tmp_path)) == ["GPU"]
    assert gpu_parts.missing_for(graphs, gpu_parts.Place("cuda", tmp_path)) == []


def test_what_is_left_and_what_is_unknown_has_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {**check_gpu.read_machine(), "parts": {"ops": "all ops"}}
    monkeypatch.setattr(check_gpu, "ask_machine", lambda output: machine)  # which a process of its own reads

    def call_here(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--output", str(tmp_path), *words])
        return check_gpu.main()

    assert call_here("--part", "ops", "--minutes", "0") == check_gpu.LEFT
    assert "left for the next call: ops" in capsys.readouterr().out
    assert call_here("--part", "opps") == 2
    assert "'opps' is not a part" in capsys.readouterr().err
