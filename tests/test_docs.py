"""The pages say what is there: every proof that the table of what was verified names can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "verified.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|")
][2:]


@pytest.mark.parametrize(("claim", "proof", "place", "date"), ROWS)
def test_a_claim_has_a_proof_that_is_there_or_says_that_it_has_none(
    claim: str, proof: str, place: str, date: str
) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", proof):
        assert name.removeprefix("make ") in targets if name.startswith("make ") else (ROOT / name).is_file()
    for page in re.findall(r"\]\(([^)]+)\)", proof):
        assert (ROOT / "docs" / page).is_file()
    unseen = re.fullmatch(r"([^;]*: )?not verified", place)
    assert bool(re.fullmatch(r"\d{4}-\d\d-\d\d", date)) != bool(unseen)
    assert proof or unseen
