"""Imports inside functions keep what is heavy out of light paths, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Imported where they are used: Ray and ONNX, which needs google.protobuf, are optional, SciPy takes 0.3 s, and the
# runtimes are those of an export.
WHERE_USED = {"ray", "onnx", "google", "scipy", "onnxruntime"}
# Looking an activation up brings no Ultralytics, which takes 3 s.
ALLOWED = {("rtdetr_act/activations/apa.py", "ultralytics")}


def inner_imports(path: Path) -> Iterator[str]:
    """Yield the modules that functions of a file import."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    yield node.module or ""
                elif isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)


@pytest.mark.integration
def test_light_paths_load_neither_torch_nor_ultralytics_and_only_they_import_late() -> None:
    code = (
        "import sys, rtdetr_act.cli.main\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('rtdetr_act') and m.__file__), sep='\\n')\n"
        "print(*{'torch', 'ultralytics', 'numpy', 'matplotlib', 'polars', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *light, heavy = done.stdout.splitlines()
    assert set(heavy.split()) <= {"rich"}  # typer's
    light_files = {Path(name).resolve() for name in light}
    late = [
        (path.relative_to(ROOT).as_posix(), module)
        for path in sorted((ROOT / "rtdetr_act").rglob("*.py"))
        if path.resolve() not in light_files
        for module in inner_imports(path)
        if module.partition(".")[0] not in WHERE_USED
    ]
    assert {(name, module.partition(".")[0]) for name, module in late} <= ALLOWED, late
