"""Run `check_release.py` with Ultralytics releases from the oldest supported to the newest, and write the table.

    python3 scripts/check_compat.py [--releases 8.3.0 8.4.190] [--jobs 2] [--fresh] [--keep]

Each release gets an environment in `.venv-compat/`, made by uv with the newest releases of all else and removed
afterwards. Where a check fails, the pins in `PINS` are tried, until one makes all pass: that is what the release needs.
What came out goes to `runs/compat/`, from where a second call takes what is finished with the same code, unless it is
called with `--fresh`; `docs/compatibility.md` is written at the end. About twenty minutes on two quiet cores; exits
with 1 where a check fails. Needs Python with uv, and the package index.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-compat"
RESULTS = ROOT / "runs" / "compat"
RELEASES = "8.3.0 8.3.20 8.3.50 8.3.80 8.3.110 8.3.140 8.3.170 8.3.200 8.3.230 8.3.253".split()
RELEASES += "8.4.0 8.4.30 8.4.60 8.4.100 8.4.130 8.4.160 8.4.190".split()
# What is tried, in this order, where a release fails with the newest packages.
PINS = (("numpy<2.4",), ("numpy<2",), ("torch<2.9", "torchvision<0.24"), ("torch<2.6", "torchvision<0.21", "numpy<2"))
Result = dict[str, Any]

PREFACE = """# Ultralytics releases

Written by `make compat`, which runs `scripts/check_release.py` in an environment of each release.
{python}, {system}, {cores} cores, {dates}.

With each release come the newest packages that it lets be installed, but for the pins named below. Everything was run
on the CPU; nothing here says anything of GPUs, Windows or macOS. *auto, long* is what `optimizer=auto` chose for a
short training and for one above 10,000 iterations.
"""
CHECKS = """\
## The checks

Each is a real one, with small models, in processes of its own.

- **imported before, imported behind**: the hooks are there, whether the plugin is imported before Ultralytics or behind
  it.
- **patch counts**: the report of a swap names as many sites as are found, without the plugin's own search, in the
  network and in a forward pass; and those that `Conv.default_act` reaches are counted.
- **mixed YAMLs**: in two shipped YAMLs and a tiny one, each row's layer has the activation that the row names.
- **default_act**: a model built inside of `default_act(...)` keeps the activation when it is built anew behind it.
- **match**: a swap with `init="match"` changes what the head gets less than a plain one.
- **fold and ONNX**: the exported file of a network with AReLU has LeakyReLU in its place, and gives what torch gives.
- **average precision**: Ultralytics' own function, which a training reaches once something is detected.
- **training** under `optimizer=auto`, `SGD`, `AdamW` and `MuSGD`, and under `auto` above 10,000 iterations: two steps
  with `arelu, dynamic_conv@backbone` move every parameter, the groups hold each with the decay it should have, and the
  checkpoint holds what was trained. **after match**: a training that starts from a match refits first. **mish**: a
  checkpoint with an activation of torch's own names no class of the plugin.
- **reopened without the plugin**: checkpoints validate and predict in a process that does not import it; rebuilding
  their networks there stops.
- **kill and resume**: a training that is killed after its first epoch goes on from there.
- **command line**: `sites`, `train`, `val`, `fold` and `export` one after another, and a mistake, which is one
  sentence.
- **study of two**: a study of two variants fills its leaderboard.

"""
SITES = """\
Sites that `Conv.default_act = nn.Mish()` reaches / that `patch_model(model, "mish")` swaps / with `scope="all"`.
"""
COSTS = """\
The checks took {all:.0f} core-seconds, {each:.0f} a release, with neither the making of environments nor the runs that
failed for want of a pin; the seconds in the table depend on what else the machine did.
"""
# The lines were counted in the package, the tests and the scripts: what only a release below the bound needs.
OLDEST = """## Why 8.3.0 is the oldest

A newer bound would delete little: 6 lines at 8.3.20, 11 at 8.3.110 and about 70 at 8.4.0, two thirds of them in tests,
since most of what the hooks have to tell apart changed after 8.4.0. Against that stand all projects that pin one of the
250 releases of 8.3.
"""


def main() -> None:
    """Check the releases, two at a time, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--releases", nargs="+", help="instead of all; the document then has these and what is finished"
    )
    parser.add_argument("--jobs", type=int, default=2, help="releases at a time")
    parser.add_argument("--fresh", action="store_true", help="do finished releases again")
    parser.add_argument("--keep", action="store_true", help="leave the environments, 6 GB each where links are copies")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compatibility.md")
    given = parser.parse_args()
    newest = find_newest()
    releases = given.releases or [*RELEASES, *([] if newest in RELEASES else [newest])]
    code = hash_code()
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda release: finish(release, code, given.fresh, given.keep), releases))
    found = [read(release) for release in sorted({*RELEASES, *releases}, key=order) if is_finished(release, code)]
    given.output.write_text(write_document(found), encoding="utf-8")
    failed = [f"{result['release']}: {each}" for result in found for each in failures(result)]
    print(*failed, f"{len(found)} releases, {len(failed)} failures; {given.output}", sep="\n")
    sys.exit(bool(failed) or len(found) < len(releases))


def order(release: str) -> tuple[int, ...]:
    """Return a release as numbers that sort."""
    return tuple(map(int, release.split(".")))


def find_newest() -> str:
    """Return the newest Ultralytics of the package index."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-deps",
        "--no-header",
        "--no-annotate",
        "-",
    ]
    done = subprocess.run(command, input="ultralytics\n", capture_output=True, text=True, check=True)
    return done.stdout.strip().rpartition("==")[2]


def hash_code() -> str:
    """Return a hash of what decides the outcomes."""
    files = [*sorted((ROOT / "rtdetr_act").rglob("*.py")), *sorted((ROOT / "configs").glob("*.yaml"))]
    files += [ROOT / "pyproject.toml", ROOT / "tests" / "tiny.py", ROOT / "scripts" / "check_release.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read(release: str) -> Result:
    """Return what is written of a release."""
    found: Result = json.loads((RESULTS / f"{release}.json").read_text(encoding="utf-8"))
    return found


def is_finished(release: str, code: str) -> bool:
    """Say whether a release was checked with this code."""
    return (RESULTS / f"{release}.json").exists() and read(release)["code"] == code


def finish(release: str, code: str, fresh: bool, keep: bool) -> None:
    """Check a release, with pins where it needs some, and write what came out; or take what is written."""
    if is_finished(release, code) and not fresh:
        print(f"{release}: finished before", flush=True)
        return
    first = result = check(release, ())
    for pins in PINS if failures(first) else ():
        with_pins = check(release, pins)
        if not failures(with_pins):
            result = with_pins
            break
    result.update(release=release, code=code, date=str(datetime.date.today()), without_pins=failures(first))
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = RESULTS / f"{release}.partial"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(RESULTS / f"{release}.json")
    if not keep:
        shutil.rmtree(ENVIRONMENTS / release, ignore_errors=True)
    words = f"{len(failures(result))} failures" + (f", needs {', '.join(result['pins'])}" if result["pins"] else "")
    print(f"{release}: {words}, {result['seconds']:.0f} s, {result['core_seconds']:.0f} core-seconds", flush=True)


def check(release: str, pins: tuple[str, ...]) -> Result:
    """Make an environment with a release and pins, and return the outcomes of `check_release.py` there."""
    place, output = ENVIRONMENTS / release, RESULTS / f"{release}.outcomes"
    packages = ["-e", f"{ROOT}[export]", f"ultralytics=={release}", *pins]
    uv = [sys.executable, "-m", "uv", "--quiet"]
    output.unlink(missing_ok=True)
    for command in (
        [*uv, "venv", "--clear", str(place)],
        [*uv, "pip", "install", "--python", str(place), *packages],
        [str(find_python(place)), str(ROOT / "scripts" / "check_release.py"), "--output", str(output)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode and not output.exists():
            return failed_result(pins, " ".join((done.stderr or done.stdout).split())[-300:])
    result: Result = {**json.loads(output.read_text(encoding="utf-8")), "pins": list(pins)}
    output.unlink()
    return result


def find_python(place: Path) -> Path:
    """Return the interpreter of an environment."""
    return place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def failed_result(pins: tuple[str, ...], why: str) -> Result:
    """Return the result of a release that could not be checked."""
    outcome = {"check": "environment", "state": "failed", "note": why, "seconds": 0.0, "numbers": {}}
    return {"versions": {}, "seconds": 0.0, "core_seconds": 0.0, "outcomes": [outcome], "pins": list(pins)}


def failures(result: Result) -> list[str]:
    """Return the checks that failed, each with its reason."""
    return [f"{each['check']}: {each['note']}" for each in result["outcomes"] if each["state"] == "failed"]


# --- the document -----------------------------------------------------------------------------------------------------


def write_document(results: list[Result]) -> str:
    """Return the document in Markdown."""
    pythons = sorted({f"Python {result['versions'].get('python')}" for result in results})
    dates = sorted({result["date"] for result in results})
    preface = PREFACE.format(
        python=", ".join(pythons), system=f"{platform.system()} on {platform.machine()}", cores=os.cpu_count(),
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
    )  # fmt: skip
    cores = sum(result["core_seconds"] for result in results)
    parts = [preface, draw_releases(results), COSTS.format(all=cores, each=cores / len(results))]
    if missing := [release for release in RELEASES if release not in {result["release"] for result in results}]:
        parts.append(f"**Not checked in this run:** {', '.join(missing)}.\n")
    parts += ["## What a release needs\n", *list_needs(results)]
    parts += ["\n## What a release does not have\n", *list_absent(results)]
    if any(failures(result) for result in results):
        parts += ["\n## What fails\n", *(f"- {r['release']}, {each}" for r in results for each in failures(r))]
    parts += ["\n## Sites\n", SITES, draw_sites(results), CHECKS + OLDEST]
    return "\n".join(parts)


def draw_releases(results: list[Result]) -> str:
    """Return the table of releases: what they were checked with, what they need, and how many checks passed."""
    rows = [["Ultralytics", "torch", "numpy", "needs", "auto, long", "checks passed", "seconds"]]
    for result in results:
        notes = {each["check"]: each["note"] for each in result["outcomes"]}
        states = Counter(each["state"] for each in result["outcomes"])
        chosen = [notes.get(name, "") for name in ("training, auto", "training, auto, long")]
        passed = f"{states['ok']} of {states['ok'] + states['failed']}"
        row = [result["release"], *(result["versions"].get(package, "") for package in ("torch", "numpy"))]
        row += [" ".join(f"`{pin}`" for pin in result["pins"]), ", ".join(chosen)]
        rows.append([*row, f"**{passed}**" if states["failed"] else passed, f"{result['seconds']:.0f}"])
    return draw_table(rows)


def draw_table(rows: list[list[str]]) -> str:
    """Return rows as a Markdown table, the first as its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""])


def list_needs(results: list[Result]) -> Iterator[str]:
    """Yield a line for what releases need beside the newest packages, and what they say without it."""
    for releases, (pins, symptoms) in span(results, lambda r: (tuple(r["pins"]), tuple(r["without_pins"]))):
        if pins:
            yield f"- {releases}: `{'` `'.join(pins)}`. Without: {'; '.join(symptoms)}"
    exports = {r["release"]: each for r in results for each in r["outcomes"] if each["check"] == "fold and ONNX"}
    numbers = {release: each["numbers"] for release, each in exports.items()}
    for releases, packages in span(results, lambda r: tuple(numbers.get(r["release"], {}).get("asked", ()))):
        if packages:
            names = f"`{'`, `'.join(packages)}`"
            yield f"- {releases}: an export to ONNX asks for {names}, which Ultralytics installs unless told not to"
    for releases, needed in span(results, lambda r: numbers.get(r["release"], {}).get("onnxscript")):
        if needed:
            yield f"- {releases}: `onnxscript`, of the extra `export`, since torch 2.9 and newer export to ONNX by it"
    yield "- All others: nothing; the newest torch and numpy that Ultralytics allows, as in the table"


def list_absent(results: list[Result]) -> Iterator[str]:
    """Yield a line for each thing that releases lack."""
    notes = dict.fromkeys(
        (each["check"], each["note"]) for result in results for each in result["outcomes"] if is_lack(each)
    )
    for check, note in notes:
        lacking = [any((e["check"], e["note"]) == (check, note) for e in r["outcomes"]) for r in results]
        for releases, lacks in span_of([r["release"] for r in results], lacking):
            if lacks:
                yield f"- {releases}, {check}: {note}"


def is_lack(outcome: dict[str, Any]) -> bool:
    """Say whether an outcome tells of something that the release does not have."""
    return outcome["state"] == "absent" or (outcome["check"] == "patch counts" and outcome["note"].startswith("no "))


def span(results: list[Result], key: Any) -> Iterator[tuple[str, Any]]:
    """Yield the releases beside each other for which a key is the same, in words, and the key."""
    return span_of([result["release"] for result in results], [key(result) for result in results])


def span_of(releases: list[str], keys: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the releases beside each other that have the same key, in words, and the key."""
    for key, pairs in groupby(zip(releases, keys, strict=True), key=lambda pair: pair[1]):
        inside = [release for release, _ in pairs]
        yield (inside[0] if len(inside) == 1 else f"{inside[0]} to {inside[-1]}"), key


def draw_sites(results: list[Result]) -> str:
    """Return the table of models and their sites, with a column for the releases that have the same."""
    counts = {
        r["release"]: each["numbers"] for r in results for each in r["outcomes"] if each["check"] == "patch counts"
    }
    columns = list(span_of(list(counts), list(counts.values())))
    models = list(dict.fromkeys(name for found in counts.values() for name in found))
    rows = [["model", *(releases for releases, _ in columns)]]
    for name in models:
        rows.append([name, *(" / ".join(map(str, found[name])) if name in found else "–" for _, found in columns)])
    return draw_table(rows)


if __name__ == "__main__":
    main()
