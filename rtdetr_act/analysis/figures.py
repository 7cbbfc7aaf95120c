"""Figures: paths checked in advance, rendering without pyplot, atomic writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import check_writable, convert_write_errors, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SUFFIXES = (".png", ".svg", ".pdf")


# The Okabe-Ito palette, safe for colour-blind readers, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def check_figure_path(output: Path | str) -> Path:
    """Return the path of a figure after checking that it can be written.

    Args:
        output: PNG, SVG or PDF file.

    Raises:
        InputError: The suffix is not supported, or the file cannot be written.
    """
    path = Path(output)
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"cannot draw {quote(str(path))}: the file's ending must be one of {', '.join(_SUFFIXES)}")
    check_writable(path)
    return path


def render_figure(figure: Figure, form: str = "png", *, dpi: int) -> bytes:
    """Return a figure encoded as an image.

    Figures are made without pyplot, so that the caller's backend and open figures are unaffected.

    Args:
        figure: The figure.
        form: "png", "svg" or "pdf".
        dpi: Dots per inch.
    """
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=dpi)
    return content.getvalue()


def write_figure(figure: Figure, path: Path, *, dpi: int) -> Path:
    """Write a figure atomically, in the format of the file's suffix, and return its path.

    Args:
        figure: The figure.
        path: File to write, with a suffix that `check_figure_path` accepts.
        dpi: Dots per inch.

    Raises:
        InputError: The file cannot be written; the old one is then unchanged.
    """
    content = render_figure(figure, path.suffix[1:].lower(), dpi=dpi)
    with convert_write_errors(path):
        write_atomically(path, content)
    return path
