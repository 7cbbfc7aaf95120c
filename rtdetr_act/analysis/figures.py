"""Pictures: checked before the work, rendered without pyplot, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import check_writable, convert_write_errors, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_FORMATS = (".png", ".svg", ".pdf")


# Okabe-Ito without its yellow: told apart by colour-blind readers, and on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check_figure_path(output: Path | str) -> Path:
    """Return the path of a picture to write; InputError where its ending is wrong or it cannot be written."""
    path = Path(output)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"cannot draw {quote(str(path))}: the file's ending must be one of {', '.join(_FORMATS)}")
    check_writable(path)
    return path


def render_figure(figure: Figure, form: str = "png", *, dpi: int) -> bytes:
    """Return the bytes of a picture: png, svg or pdf.

    Figures are made without pyplot, so that the caller's backend and open figures stay as they are.
    """
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=dpi)
    return content.getvalue()


def write_figure(figure: Figure, path: Path, *, dpi: int) -> Path:
    """Write a picture, whole or not at all, in the format of the file's ending, and return its path.

    Raises:
        InputError: The file cannot be written; the old one is then as it was.
    """
    content = render_figure(figure, path.suffix[1:].lower(), dpi=dpi)
    with convert_write_errors(path):
        write_atomically(path, content)
    return path
