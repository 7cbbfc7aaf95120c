"""Give hostile inputs of every kind to what reads them, and find tracebacks, hangs, code that runs and partial files.

    python scripts/fuzz.py [--examples 20000] [--command-lines 300] [--seed 0] [--jobs 2] [--output runs/fuzz]

Hypothesis makes activations, plans, study files, model YAMLs, checkpoints and command lines, right ones and damaged
ones; all that failed once is tried first. Each must be taken, or refused in one sentence, within two seconds of
computing (a command within thirty), running no code, leaving no file, and within a bound of memory. Prints a table in
Markdown and writes it to the output folder, with the smallest input found of each fault; exits with 1 where there is
one. Ctrl-C ends it with what is done so far. About five minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1] / "tests"))
if TYPE_CHECKING:
    from fuzzing.campaign import Found, Tally

FAULTS = ("traceback", "hang", "code run", "partial file", "memory", "crash")


def main() -> None:
    """Share the examples out to processes, join what they counted, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000, help="of all kinds but command lines")
    parser.add_argument("--command-lines", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="another one each time if not given")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-home-") as folder:
        # Settings and caches of its own; and nothing that an input names is installed.
        os.environ.update(YOLO_OFFLINE="True", YOLO_AUTOINSTALL="False", OMP_NUM_THREADS="1", TF_BUILD="1")
        os.environ.update(YOLO_CONFIG_DIR=folder, XDG_CACHE_HOME=folder, MPLCONFIGDIR=folder)
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            shares = [
                pool.submit(run_share, number, given.jobs, given.examples, given.command_lines, given.seed)
                for number in range(given.jobs)
            ]
            tallies = join(map(wait_for, shares))
    report = "\n".join(draw_report(tallies, time.monotonic() - started, given.seed))
    print(report)
    write(given.output, report, tallies)
    if any(tally.stopped for tally in tallies):
        sys.exit(130)
    sys.exit(any(tally.faults for tally in tallies))


def run_share(number: int, jobs: int, examples: int, command_lines: int, seed: int) -> list[Tally]:
    """Try one process's share of what failed once and of new examples of each kind."""
    from fuzzing.campaign import fuzz, replay
    from fuzzing.kinds import KINDS, make_command_lines

    tallies: list[Tally] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-template-") as folder:
        commands = make_command_lines(Path(folder))
        for kind in (*KINDS, commands):
            count = command_lines if kind is commands else round(examples * kind.share)
            known = replay(kind.target, list(kind.corpus.values())[number::jobs])
            found = fuzz(kind.target, kind.inputs, len(range(count)[number::jobs]), (seed * jobs + number) * 1000)
            known.join(found)
            tallies.append(known)
            print(f"{kind.target.name}: {known.examples:,} examples in {known.seconds:.0f} s", flush=True)
            if found.stopped:
                break
    return tallies


def wait_for(share: Future[list[Tally]]) -> list[Tally]:
    """Return what a process counted; Ctrl-C reaches it as well, and ends it soon."""
    try:
        return share.result()
    except KeyboardInterrupt:
        return share.result()


def join(shares: Iterator[list[Tally]]) -> list[Tally]:
    """Return the tallies of all processes by kind."""
    joined: dict[str, Tally] = {}
    for tally in (each for share in shares for each in share):
        if tally.target in joined:
            joined[tally.target].join(tally)
        else:
            joined[tally.target] = tally
    return list(joined.values())


def draw_report(tallies: list[Tally], seconds: float, seed: int) -> Iterator[str]:
    """Yield the lines of the table, and a paragraph for each fault."""
    yield f"| kind | examples | accepted | {' | '.join(FAULTS)} | slowest, CPU s | most MiB | peak MiB | seconds |"
    yield "|---" * (len(FAULTS) + 7) + "|"
    for tally in tallies:
        counts = tally.faults_by_kind()
        cells = [tally.target, f"{tally.examples:,}", f"{100 * tally.accepted / max(1, tally.examples):.0f} %"]
        cells += [f"{counts[name]:,}" for name in FAULTS]
        cells += [f"{tally.slowest[0]:.2f}", f"{tally.memory >> 20:,}", f"{tally.peak >> 20:,}", f"{tally.seconds:.0f}"]
        yield f"| {' | '.join(cells)} |"
    done = sum(tally.examples for tally in tallies)
    yield f"\n{done:,} examples in {seconds / 60:.1f} min, seed {seed}"
    if any(tally.stopped for tally in tallies):
        yield f"stopped: {sum(tally.wanted for tally in tallies) - done:,} more were to come of these kinds"
    for found in (each for tally in tallies for each in tally.faults.values()):
        last = found.fault.words.strip().splitlines()[-1]
        yield f"\n{found.target}: {found.fault.kind}, {found.fault.where} ({found.count} examples): {last[:500]}"
        yield f"    {found.example!r:.500}"


def write(output: Path, report: str, tallies: list[Tally]) -> None:
    """Write the report, and each fault with its input in a file of its own."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "fuzz.md").write_text(f"{report}\n", encoding="utf-8", errors="backslashreplace")
    for number, found in enumerate(each for tally in tallies for each in tally.faults.values()):
        write_fault(output / f"{number}-{found.target}-{found.fault.kind}".replace(" ", "-"), found)


def write_fault(path: Path, found: Found) -> None:
    """Write an input as it is, and beside it what is known of the fault."""
    example = found.example
    content = example if isinstance(example, bytes) else json.dumps(example).encode()
    path.with_suffix(".bin" if isinstance(example, bytes) else ".json").write_bytes(content)
    words = f"{found.fault.where}\n\n{found.fault.words}\n\n{example!r}\n"
    path.with_suffix(".txt").write_text(words, encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    main()
