"""The project's own errors: one sentence each, saying what was wrong, where, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RtdetrActError(Exception):
    """Base of every error a user can cause; the CLI prints its sentence and exits with `exit_code`."""

    exit_code = 1


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


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known word closest to `word`, or an empty string.

    >>> suggest("arlu", ["arelu", "mish"])
    "; did you mean 'arelu'?"
    """
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
