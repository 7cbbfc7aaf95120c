"""Figures: one style for all, paths checked in advance, rendering without pyplot, atomic writes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cycler import cycler
from matplotlib import style

from rtdetr_act.errors import InputError, quote
from rtdetr_act.files import check_writable, convert_write_errors, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SUFFIXES = (".png", ".svg", ".pdf")
_STYLE = Path(__file__).with_name("paper.mplstyle")
# The time of writing is left out, so that a figure drawn twice is the same file.
_METADATA = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


# The Okabe-Ito palette, safe for colour-blind readers, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Each colour as a solid line, then as a dashed one, and so on: 28 lines that differ.
LINES = cycler(linestyle=("-", "--", ":", "-.")) * cycler(color=COLOURS)

# Widths of a figure in inches, and dots per inch: on a screen by default, and what journals ask of a bitmap.
ONE_COLUMN, TWO_COLUMNS = 3.5, 7.16
DPI, PRINT_DPI = 150, 300
_MOST_DPI = 1200  # of line art in print


@contextmanager
def figure_style() -> Iterator[None]:
    """Apply the style of all figures of this package, as a context or a decorator; nothing of it stays.

    The text size, the lines, the colours and the fonts are those of `paper.mplstyle` and `COLOURS`, whatever the caller
    or a `matplotlibrc` has set. A figure is both made and written inside: `render_figure` sees to the latter.

    >>> import matplotlib
    >>> before = dict(matplotlib.rcParams)
    >>> with figure_style():
    ...     matplotlib.rcParams["pdf.fonttype"]
    42
    >>> before == dict(matplotlib.rcParams)
    True
    """
    with style.context(["default", str(_STYLE), {"axes.prop_cycle": LINES}]):
        yield


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


def check_dpi(dpi: int) -> int:
    """Return the dots per inch of a figure, or raise InputError if they are not an integer from 1 to 1200.

    >>> check_dpi(300)
    300
    """
    if isinstance(dpi, bool) or not isinstance(dpi, int) or not 1 <= dpi <= _MOST_DPI:
        raise InputError(f"dpi is an integer from 1 to {_MOST_DPI}, such as {PRINT_DPI} for print, not {quote(dpi)}")
    return dpi


def check_limits(name: str, limits: str | Sequence[float]) -> tuple[float, float]:
    """Return the limits of an axis, or raise InputError if they are not two finite numbers, the lower one first.

    Args:
        name: What they are called in the message.
        limits: The limits, or a text such as "-6,6", with or without brackets.

    >>> check_limits("xlim", [-6, 6]), check_limits("ylim", "-1, 2.5")
    ((-6.0, 6.0), (-1.0, 2.5))
    """
    try:
        low, high = map(float, limits.strip("()[] ").split(",") if isinstance(limits, str) else limits)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{name} is two numbers, the lower one first, such as -6,6, not {quote(limits)}")
    return low, high


@figure_style()
def render_figure(figure: Figure, form: str = "png", *, dpi: int = DPI) -> bytes:
    """Return a figure encoded as an image, the same bytes in each run.

    Figures are made without pyplot and within `figure_style`, so that the caller's backend, settings and open figures
    are unaffected. Fonts are embedded in PDF as TrueType, and outlined in SVG.

    Args:
        figure: The figure.
        form: "png", "svg" or "pdf".
        dpi: Dots per inch of a PNG file, and of bitmaps inside the other formats. Default: 150.
    """
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=dpi, metadata=_METADATA.get(form))
    return content.getvalue()


def write_figure(figure: Figure, path: Path, *, dpi: int = DPI) -> Path:
    """Write a figure atomically, in the format of the file's suffix, and return its path.

    Args:
        figure: The figure.
        path: File to write, with a suffix that `check_figure_path` accepts.
        dpi: As in `render_figure`.

    Raises:
        InputError: The file cannot be written; the old one is then unchanged.
    """
    content = render_figure(figure, path.suffix[1:].lower(), dpi=dpi)
    with convert_write_errors(path):
        write_atomically(path, content)
    return path
