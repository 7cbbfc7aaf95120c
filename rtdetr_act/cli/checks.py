"""The command that lists what is installed: checks."""

from __future__ import annotations

from rtdetr_act.cli.app import app


@app.command()
def checks() -> None:
    """List versions, devices, hooks, plugins and tools, for the report of an issue; nothing is written."""
    from rtdetr_act.tables import align_columns
    from rtdetr_act.workflows.checks import collect_checks

    for line in align_columns([(f"{title}:", text) for title, text in collect_checks().items()]):
        print(line)
