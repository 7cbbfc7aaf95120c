"""The project's own errors: one sentence each, saying what was wrong, where, and what would be right."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

_MAX_VALUE_CHARS = 80  # characters of a value that a message quotes
_MAX_REASON_CHARS = 300  # and of what another library says


class RtdetrActError(Exception):
    """Base of every error a user can cause; the CLI prints its sentence and exits with `exit_code`.

    Control characters in the message are escaped, so that no file can write to the terminal through it.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(escape(message))


class SpecError(RtdetrActError):
    """An activation, a plan or a model YAML cannot be understood, or names something that does not exist."""

    exit_code = 2


class SelectionError(RtdetrActError):
    """A plan selects no site, or a site where its activation cannot stand."""

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
    """The user stopped a training with Ctrl-C; the sentence says how to go on."""

    exit_code = 130


def suggest(word: object, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known word closest to `word` in any case, or an empty string.

    What is not a word, or longer than any, has none.

    >>> suggest("arlu", ["arelu", "mish"]), suggest("adum", ["SGD", "Adam"])
    ("; did you mean 'arelu'?", "; did you mean 'Adam'?")
    """
    if not isinstance(word, str) or len(word) > _MAX_VALUE_CHARS:
        return ""
    spelled = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.6)
    return f"; did you mean '{spelled[near[0]]}'?" if near else ""


def quote(value: object) -> str:
    r"""Return a value as a message quotes it: the first line of a text, the outermost items of a collection.

    The result has about 80 characters at most and takes no longer for a value that would print as gigabytes, such as a
    YAML of nested aliases.

    >>> quote("arelu"), quote("one\ntwo"), quote([1, "two"])
    ("'arelu'", "'one…'", "[1, 'two']")
    """
    if not isinstance(value, str):
        shown = escape(_REPR.repr(value))
        return shown if len(shown) <= _MAX_VALUE_CHARS else f"{shown[:_MAX_VALUE_CHARS]}…"
    line = (value.splitlines() or [""])[0]
    shown = line[:_MAX_VALUE_CHARS]
    while len(escape(shown)) > _MAX_VALUE_CHARS:  # ten characters stand for one that does not print
        shown = shown[:-1]
    return f"'{escape(shown)}{'…' if shown != value else ''}'"


def reason(error: BaseException) -> str:
    """Return what an error of other code says, as a message quotes it: one line without colours, or the error's class.

    >>> reason(KeyError()), reason(ValueError("\\x1b[1mfirst\\x1b[0m\\nsecond"))
    ('KeyError', 'first second')
    """
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = escape(" ".join(uncoloured.removeprefix("ERROR ❌️ ").split()))
    return (f"{text[:_MAX_REASON_CHARS]}…" if len(text) > _MAX_REASON_CHARS else text) or type(error).__name__


def raising_module(error: BaseException) -> str:
    """Return the name of the module whose code raised an error, "" for one that was not raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""


class _ShortRepr(reprlib.Repr):
    """The `repr` of plain data, shortened wherever it could be long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 2, 4, 40, _MAX_VALUE_CHARS

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 1000:  # Python refuses to write integers of more than 4300 digits
            return f"<an integer of {x.bit_length()} bits>"
        return super().repr_int(x, level)


_REPR = _ShortRepr()


def escape(text: str) -> str:
    """Return a text with what does not print escaped, such as what a terminal would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
