"""Errors of the package: each message is one sentence that names the mistake, its place and the remedy."""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable

_MAX_VALUE_CHARS = 80  # of a value quoted in a message
_MAX_REASON_CHARS = 300  # of a message quoted from another library


class RtdetrActError(Exception):
    """Base class of all errors a user can cause; the CLI prints the message and exits with `exit_code`.

    Control characters in the message are escaped, so that no file can send commands to the terminal through it.

    Args:
        message: One sentence without a final period.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(escape(message))


class SpecError(RtdetrActError):
    """An activation, a plan or a model YAML is malformed or names something that does not exist."""

    exit_code = 2


class SelectionError(RtdetrActError):
    """A plan selects no site, or a site that its activation does not support."""

    exit_code = 2


class ShapeError(RtdetrActError, ValueError):
    """An activation is called with a tensor of a shape that it is not built for."""

    exit_code = 2


class ModelError(RtdetrActError):
    """The model given cannot be patched, loaded or rebuilt."""

    exit_code = 2


class InputError(RtdetrActError):
    """A file, data set or argument given by the user is missing or wrong."""

    exit_code = 2


class TrainingError(RtdetrActError):
    """A training run ended without a usable result, such as a non-finite loss."""

    exit_code = 1


class FoldError(RtdetrActError):
    """Activations cannot be folded into the weights without changing what the model computes."""

    exit_code = 1


class Interrupted(RtdetrActError):
    """The user stopped a command with Ctrl-C; the message says how to resume it."""

    exit_code = 130


class RtdetrActWarning(UserWarning):
    """A swap has no effect on what is trained or loaded, or a name means another activation; the program goes on.

    Args:
        message: One sentence without a final period.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape(message))


def warn(message: str) -> None:
    """Warn at the line of the user's code that called torch or this package.

    Args:
        message: One sentence without a final period.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__", "")).startswith(("torch.", "rtdetr_act.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RtdetrActWarning, stacklevel=level)


def suggest(word: object, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known word closest to `word`, or an empty string if none is close.

    Args:
        word: What the user wrote, compared without regard to case. Values other than short strings have no suggestion.
        known: The valid words.

    >>> suggest("arlu", ["arelu", "mish"]), suggest("adum", ["SGD", "Adam"])
    ("; did you mean 'arelu'?", "; did you mean 'Adam'?")
    """
    if not isinstance(word, str) or len(word) > _MAX_VALUE_CHARS:
        return ""
    spelled = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.6)
    return f"; did you mean '{spelled[near[0]]}'?" if near else ""


def quote(value: object) -> str:
    r"""Return a short quotation of a value for a message: the first line of a string, the outer items of a collection.

    The result has about 80 characters at most. A value that would print as gigabytes, such as a YAML of nested
    aliases, takes no longer than others.

    >>> quote("arelu"), quote("one\ntwo"), quote([1, "two"])
    ("'arelu'", "'one…'", "[1, 'two']")
    """
    if not isinstance(value, str):
        shown = escape(_REPR.repr(value))
        return shown if len(shown) <= _MAX_VALUE_CHARS else f"{shown[:_MAX_VALUE_CHARS]}…"
    line = (value.splitlines() or [""])[0]
    shown = line[:_MAX_VALUE_CHARS]
    while len(escape(shown)) > _MAX_VALUE_CHARS:  # an escaped character takes up to ten
        shown = shown[:-1]
    return f"'{escape(shown)}{'…' if shown != value else ''}'"


def reason(error: BaseException) -> str:
    """Return the message of another library's error as one line without colours, or its class name if it is empty.

    >>> reason(KeyError()), reason(ValueError("\\x1b[1mfirst\\x1b[0m\\nsecond"))
    ('KeyError', 'first second')
    """
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = escape(" ".join(uncoloured.removeprefix("ERROR ❌️ ").split()))
    return (f"{text[:_MAX_REASON_CHARS]}…" if len(text) > _MAX_REASON_CHARS else text) or type(error).__name__


def raising_module(error: BaseException) -> str:
    """Return the name of the module whose code raised an error, or "" for an error that was not raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


class _ShortRepr(reprlib.Repr):
    """A `repr` of plain data with a bounded length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 2, 4, 40, _MAX_VALUE_CHARS

    def repr_int(self, x: int, level: int) -> str:
        """Return an integer, or a description if it is too long for Python to print."""
        if x.bit_length() > 1000:  # Python refuses to write integers of more than 4300 digits
            return f"<an integer of {x.bit_length()} bits>"
        return super().repr_int(x, level)


_REPR = _ShortRepr()


def escape(text: str) -> str:
    """Return a string with its unprintable characters escaped, terminal control sequences included."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
