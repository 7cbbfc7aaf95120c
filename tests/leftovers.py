"""What commands leave behind: files that are whole or not, and those under hidden names."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from xml.etree import ElementTree

FOUND_BY_OTHERS = (".cache", ".lock")  # endings of what Ultralytics and locks leave


def is_whole(path: Path) -> bool:
    """Say whether a file that something wrote is complete, as far as its format tells."""
    content = path.read_bytes()
    if path.name.endswith(FOUND_BY_OTHERS):
        return True
    if path.suffix in (".pt", ".torchscript"):
        return zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is None
    if path.suffix == ".png":
        return content.endswith(b"IEND\xaeB`\x82")
    if path.suffix == ".parquet":
        return content.endswith(b"PAR1")
    if path.suffix == ".json":
        try:
            return bool(json.loads(content or "0"))
        except ValueError:
            return False
    if path.suffix == ".html":
        return content.rstrip().endswith(b"</html>")
    if path.suffix == ".xml":
        return ElementTree.fromstring(content).tag == "net" and path.with_suffix(".bin").stat().st_size > 100_000
    if path.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(content)
    return path.suffix == ".txt" or content.endswith(b"\n") or path.suffix in (".onnx", ".bin", ".gz")


def find_hidden(folder: Path) -> list[str]:
    """Return the files and folders under hidden names, those inside of hidden folders left out."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [
            str(Path(place, name).relative_to(folder))
            for name in (*folders, *files)
            if name.startswith(".") and not name.endswith(FOUND_BY_OTHERS)
        ]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return found
