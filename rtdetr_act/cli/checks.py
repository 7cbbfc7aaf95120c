"""The command that lists what is installed: checks."""

from __future__ import annotations

from rtdetr_act.cli.grammar import command


@command("", "> checks.txt")
def checks() -> None:
    """Print versions, devices, hooks and tools.

    For the report of an issue: what is installed, which hooks are in place, what can be exported. Nothing is written.
    """
    from rtdetr_act.tables import align_columns
    from rtdetr_act.workflows.checks import collect_checks

    for line in align_columns([(f"{title}:", text) for title, text in collect_checks().items()]):
        print(line)
