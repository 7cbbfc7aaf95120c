"""Readers of plans with a bug each, which the fuzzer must find."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from rtdetr_act.errors import InputError
from rtdetr_act.surgery.plan import Plan


def raise_error(text: str) -> None:
    """Trip over a rule that has a place."""
    if Plan.parse(text).rules[0].sections:
        raise KeyError("sections")


def talk_in_lines(text: str) -> None:
    """Refuse in what is no sentence."""
    Plan.parse(text)
    raise InputError("x" * 10_000)


def compute_forever(text: str) -> None:
    """Not end on a rule that has a place."""
    while Plan.parse(text).rules[0].sections:
        pass


def wait_forever(text: str) -> None:
    """Wait on a rule that has a place."""
    if Plan.parse(text).rules[0].sections:
        time.sleep(600)


def evaluate(text: str) -> None:
    """Read a plan with eval where it looks like a call."""
    if "(" in text:
        try:
            eval(text)
        except Exception as error:
            raise InputError("no plan") from error
    Plan.parse(text)


def call_shell(text: str) -> None:
    """Give a plan to a shell."""
    if Plan.parse(text).rules[0].sections:
        os.system("exit 0")


def start_process(text: str) -> None:
    """Install what a plan names."""
    if Plan.parse(text).rules[0].sections:
        subprocess.run([sys.executable, "-m", "pip", "--version"], check=False, stdout=subprocess.DEVNULL)


def leave_file(text: str) -> None:
    """Begin to write before the plan is read."""
    Path("result.json").write_text("{}\n", encoding="utf-8")
    Plan.parse(text)
    Path("result.json").unlink()


def write_half(text: str) -> None:
    """Write a file that is not whole for a rule that has a place."""
    has_place = bool(Plan.parse(text).rules[0].sections)
    Path("result.json").write_text('{"plan": ' if has_place else "[1]", encoding="utf-8")


def write_elsewhere(text: str) -> None:
    """Write outside of the working folder."""
    if Plan.parse(text).rules[0].sections:
        Path(__file__).with_name("never.txt").open("w").close()


def take_memory(text: str) -> None:
    """Take 300 MB for a rule that has a place."""
    if Plan.parse(text).rules[0].sections:
        bytearray(300 << 20)[::4096] = b"x" * (300 << 8)


def abort(text: str) -> None:
    """End the whole process."""
    if Plan.parse(text).rules[0].sections:
        os._exit(3)
