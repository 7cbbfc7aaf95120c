"""The kinds of input: what they are given to, what makes them, what failed once, and how many of all examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzzing import commands, corpus, inputs, targets
from fuzzing.watch import Target


@dataclass(frozen=True)
class Kind:
    """A kind of input; the shares of all are 1 together, command lines left out."""

    target: Target
    inputs: st.SearchStrategy[Any]
    corpus: Mapping[str, Any]
    share: float = 0.0


# A plan takes 3 ms, a model YAML 30, a checkpoint 150.
KINDS = (
    Kind(targets.SPECS, inputs.spec_inputs, corpus.SPECS, 0.15),
    Kind(targets.PLANS, inputs.plan_inputs, corpus.PLANS, 0.25),
    Kind(targets.ACTIVATIONS, inputs.activation_inputs, corpus.ACTIVATIONS, 0.15),
    Kind(targets.STUDIES, inputs.study_inputs, corpus.STUDIES, 0.2),
    Kind(targets.MODELS, inputs.model_inputs, corpus.MODELS, 0.15),
    Kind(targets.CHECKPOINTS, inputs.checkpoint_inputs(), corpus.CHECKPOINTS, 0.05),
    Kind(targets.PICKLES, inputs.pickle_inputs(), corpus.PICKLES, 0.05),
)


def make_command_lines(folder: Path) -> Kind:
    """Return the kind of command lines, after writing what they name into a folder."""
    template = targets.make_template(folder)
    return Kind(targets.command_lines(template), commands.command_lines(), corpus.COMMAND_LINES)
