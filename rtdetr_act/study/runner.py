"""Run a study or a search from its definition to its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtdetr_act.errors import InputError, Interrupted
from rtdetr_act.formatting import format_count
from rtdetr_act.results import Table, TableResult
from rtdetr_act.study.display import Display
from rtdetr_act.study.engines import Engine, EngineName, open_engine, parse_engine
from rtdetr_act.study.grid import Study, define_study
from rtdetr_act.study.preparation import is_study_finished, prepare_runs
from rtdetr_act.study.report import StudyReport, report_study
from rtdetr_act.study.search import FINAL, SEARCH_REPORT_FILES, Search, Trial, define_search, run_rungs
from rtdetr_act.study.search_report import Answer, choose_answer, make_trial_frame, write_search_report
from rtdetr_act.study.storage import REPORT_FILES, SEARCH_FILE, check_writable_files, lock_folder


@dataclass(frozen=True, repr=False)
class SearchReport(TableResult):
    """Result of a search.

    Attributes:
        answer: The chosen plan, and the evidence for it.
        search: The search, with its stages and rungs.
        trials: All its runs.
        final: Report of the final, which compares two plans.
        files: The files written.
    """

    answer: Answer
    search: Search
    trials: Sequence[Trial]
    final: StudyReport
    files: Sequence[Path]

    def _summarise(self) -> str:
        """Return the chosen plan and the number of runs."""
        return f"{self.answer.plan}, {format_count(len(self.trials), 'run')}"

    def _make_table(self) -> Table:
        """Return a row per run, with the columns of search.csv."""
        frame = make_trial_frame(self.search, self.trials)
        return frame.columns, frame.iter_rows()


def run_study(
    study: Study | Mapping[str, Any] | str | Path,
    output: Path | str = "runs/study",
    *,
    cpus: int | None = None,
    retries: int = 1,
    engine: EngineName = "local",
    address: str | None = None,
    halving: bool = False,
) -> StudyReport:
    """Run a study: train each variant with each seed, a process per run, and compare them.

    A study that was interrupted goes on where it stopped, and one that is finished is reported again. A study in the
    folder may be extended by further activations and seeds. Progress is printed to the standard output.

    Args:
        study: A study file, or what one contains: `activations` (plans, "stock" for the model as it is), `model` (one
            or a list, "rtdetr-n.yaml" by default), `data` (one or a list, "shapes" by default), `seeds` (a number or a
            list, 3 by default), `baseline` ("stock" by default if it is one of the activations), `where`, `scope` and
            `act_lr`, and any argument of Ultralytics, of which a list multiplies the runs.
        output: Folder of the study. Default: "runs/study".
        cpus: CPU cores of each run. Default: None, one.
        retries: Further tries of a run whose process ends without a result. Default: 1.
        engine: "local" (default) for this machine, "ray" for a cluster.
        address: With "ray": address of the cluster. Default: None, Ray on this machine.
        halving: With "ray": stop hopeless variants early. Default: False.

    Returns:
        The report. Runs that failed are counted in its rows, and the page says why.

    Raises:
        RtdetrActError: The study is malformed, a run is not possible, or the folder holds another study or cannot be
            written to.
        Interrupted: The user pressed Ctrl-C; the same call continues.
    """
    definition = study if isinstance(study, Study) else define_study(study)
    folder = Path(output)
    parse_engine(engine, address, halving)
    check_writable_files(folder, REPORT_FILES)
    opening = open_engine(
        engine,
        device=definition.arguments.get("device"),
        cpus=cpus,
        retries=retries,
        address=address,
        halving=definition.baseline if halving else None,
    )
    with ExitStack() as stack:
        # The report of a finished study needs no engine, such as the cluster that it ran on.
        run = None if is_study_finished(definition, folder) else stack.enter_context(opening)
        stack.enter_context(lock_folder(folder))
        folders = prepare_runs(definition, folder)
        if run:
            _run_with_display(folders, run)
        return report_study(folder, measure=True)


def run_search(
    search: Search | Mapping[str, Any],
    output: Path | str = "runs/search",
    *,
    cpus: int | None = None,
    retries: int = 1,
) -> SearchReport:
    """Search for the activation of each stage of a model: many short trainings, fewer longer ones, and a final.

    A search that was interrupted goes on where it stopped. Progress is printed to the standard output.

    Args:
        search: Its settings: `activations` (a list), `model` ("rtdetr-n.yaml" by default), `data` ("shapes" by
            default), `budget` (epochs of all trainings together; by default fourteen complete trainings and the
            final), `seeds` (of each of the two plans in the final, 3 by default), `scope` and `act_lr`, and any
            argument of Ultralytics; `epochs` is the length of a complete training.
        output: Folder of the search. Default: "runs/search".
        cpus: CPU cores of each run. Default: None, one.
        retries: Further tries of a run whose process ends without a result. Default: 1.

    Returns:
        The report with the chosen plan, which is mixed only if that is significantly better than the best uniform one.

    Raises:
        RtdetrActError: A setting is wrong, a run is not possible, the folder holds another search or cannot be written
            to, or a rung has too few scores.
        Interrupted: The user pressed Ctrl-C; the same call continues.
    """
    definition = search if isinstance(search, Search) else define_search(search)
    folder = Path(output)
    check_writable_files(folder, [*SEARCH_REPORT_FILES, SEARCH_FILE])
    device = definition.arguments.get("device")
    with open_engine("local", device=device, cpus=cpus, retries=retries) as engine, lock_folder(folder):

        def run(study: Study, folders: Sequence[Path]) -> None:
            epochs = study.arguments["epochs"]
            print(f"{folders[0].parents[1]}: {len(folders)} runs of {epochs} epochs", flush=True)
            _run_with_display(folders, engine)

        trials = run_rungs(definition, folder, run)
        final = report_study(folder / FINAL, measure=True)
        answer = choose_answer(definition, trials, final.rows)
        files = write_search_report(definition, trials, final.rows, answer, folder)
    return SearchReport(answer, definition, trials, final, [*files, *final.files])


def _run_with_display(folders: Sequence[Path], run: Engine) -> None:
    """Run all unfinished runs of a study, and show the progress.

    Args:
        folders: Run folders of the study.
        run: Engine, as `open_engine` yields it.

    Raises:
        Interrupted: The user pressed Ctrl-C.
        InputError: The disk is full.
    """
    try:
        with Display(folders) as display:
            run(folders, watch=display)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing is lost: the same command continues") from None
    except OSError as error:
        raise InputError(f"the study stopped: {error.strerror or error}; the same command continues") from error
