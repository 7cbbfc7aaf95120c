"""Run rows on many machines with Ray, and stop hopeless ones early with Ray Tune.

Each run is a Ray task (a trial of Tune where hopeless runs are stopped) that starts the same process as the engine of
one machine does, in a temporary folder of its node. A keeper, an actor on this machine, hands out the files of the run
folders and takes back what changed, after each epoch; so a run whose node is lost goes on elsewhere after its last
epoch. Nodes share nothing but the network. Each needs the same versions of rtdetr-act, Ultralytics and torch, and the
model and the data at the paths that the study names; the set `shapes` is drawn on each node by itself.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import math
import os
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultralytics.cfg import DEFAULT_CFG_DICT

from rtdetr_act.errors import InputError, TrainingError, quote
from rtdetr_act.files import write_atomically
from rtdetr_act.study.grid import RunConfig, format_activation, format_command, read_run_config
from rtdetr_act.study.local import split_device
from rtdetr_act.study.process import (
    LOG_FILE,
    Progress,
    explain_exit,
    is_finished,
    kill_run,
    read_progress,
    read_result,
    record_attempt,
    release_run,
    start_run,
)
from rtdetr_act.study.storage import (
    ATTEMPTS_FILE,
    RESULT_FILE,
    RUN_FILE,
    SNAPSHOT_FILE,
    RunResult,
    lock_folder,
    write_json,
)
from rtdetr_act.version import __version__

_POLL_SECONDS = 0.2  # seconds
_CONNECT_TIMEOUT = 10.0  # seconds for an address to answer
_NODE_TIMEOUT = 120.0  # seconds for a node to start its first worker, which imports Ray from a disk that may be slow
_PREDECESSOR = 30.0  # seconds for the processes of a killed study to notice that
_MAX_LOST_NODES = 5  # nodes that one run may lose; one that takes its node down each time must end some day
_LOST_REASON = "its node, or Ray's worker on it, was lost"
_GRACE_DIVISOR = 8  # no run is stopped before this part of its epochs: by then the learning rate has warmed up
_RAY_MISSING = "--engine ray needs Ray: pip install 'rtdetr-act[ray]'"


@dataclass(frozen=True)
class TaskSettings:
    """What each task is told.

    Attributes:
        cpus: Cores of a run.
        gpus: GPUs of a run; Ray chooses which.
        device: Ultralytics' `device` where no GPU is needed; "" for the row's own.
        versions: Of the packages that must be the same everywhere.
        cwd: Where relative paths of a study start, on nodes that have this folder.
    """

    cpus: int
    gpus: int
    device: str
    versions: Mapping[str, str]
    cwd: str


@contextmanager
def join_cluster(
    address: str | None, *, device: Any, cpus: int | None, halving: bool = False
) -> Iterator[TaskSettings]:
    """Join a Ray cluster for the body, and say what each run needs there, once all that is known to be there.

    Args:
        address: Of the cluster, such as "10.0.0.1:6379" or "auto", of which this machine is a node; None starts Ray on
            this machine alone.
        device: The `device` of all runs as Ultralytics takes it; None for a GPU each where the cluster has any.
        cpus: Cores of each run, and threads on a CPU; None for one.
        halving: Whether Ray Tune is needed too.

    Raises:
        InputError: Ray is missing, the cluster cannot be reached or has no node that can hold a run, or a node has
            other versions.
    """
    ray = _import_ray(halving)
    try:
        _connect_to_ray(address)
        order = _choose_settings(device, cpus)
        _check_nodes(order)
        yield order
    finally:
        ray.shutdown()


def run_on_cluster(
    folders: Sequence[Path],
    *,
    order: TaskSettings,
    retries: int,
    halving: str | None,
    watch: Callable[[Sequence[Path]], None],
) -> None:
    """Run what is not finished on the Ray cluster joined; a failure is noted in its folder, and the others go on.

    Args:
        folders: Run folders with their `run.json`, all in one folder.
        order: As `join_cluster` gives it.
        retries: Further tries of a run whose process ended without a result; lost nodes do not count.
        halving: The baseline's activation: of the others, runs in the worse half of their setting are stopped after an
            eighth, a quarter and a half of their epochs, and get a result that says so. None stops none.
        watch: Called several times a second with the folders of the runs at work.

    Raises:
        TrainingError: The keeper ended; the same command goes on.
    """
    from ray.exceptions import RayActorError

    waiting = [folder for folder in folders if not is_finished(folder)]
    if not waiting:
        return
    try:
        keeper = _start_store(waiting, retries)
        if halving is None:
            _run_as_tasks(waiting, keeper, order, watch)
        else:
            _run_as_trials(waiting, keeper, order, halving, watch)
    except RayActorError as error:
        raise TrainingError(
            f"the process that keeps the study's files ended: {_summarise_error(error)}; the same command goes on"
        ) from None


def _import_ray(halving: bool = False) -> Any:
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray will do by default; else it warns of that
        "RAY_AIR_NEW_OUTPUT": "0",  # or Tune prints tables at verbose=0 too
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's own would wait for the trials
    }
    os.environ.update(quiet)
    try:
        import ray

        if halving:
            from ray import tune  # noqa: F401
    except ImportError:
        raise InputError(_RAY_MISSING) from None
    return ray


def _connect_to_ray(address: str | None) -> None:
    import ray

    _check_address(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError for other versions: whatever is in the way
        raise InputError(f"cannot join the Ray cluster at '{address or 'local'}': {_summarise_error(error)}") from None
    finally:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in place


def _check_address(address: str | None) -> None:
    """Try the address before Ray does, which waits for minutes and then ends the process."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError(
            f"--address {quote(address)} is not HOST:PORT, such as 10.0.0.1:6379: run the study on a machine of the "
            "cluster"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last of a name that no host can have
        raise InputError(
            f"no Ray cluster answers at {quote(address)} ({error}): start one with 'ray start --head', and give "
            "what it says"
        ) from None


def _summarise_error(error: BaseException) -> str:
    """Return the first line of an error's text; that of a task is a traceback, so its cause is asked."""
    cause = getattr(error, "cause", None) or error
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)


def _choose_settings(device: Any, cpus: int | None) -> TaskSettings:
    """Say what each run needs; raises InputError where no node has that."""
    import ray

    names = split_device(device)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if names:
        gpus = len([name for name in names if name.lstrip("-").isdecimal()])
    else:
        gpus = int(any(node.get("GPU") for node in nodes))
    cores = cpus or 1
    if not any(node.get("CPU", 0) >= cores and node.get("GPU", 0) >= gpus for node in nodes):
        raise InputError(f"no node of the Ray cluster has what a run needs: CPUs: {cores}, GPUs: {gpus}")
    named = names[0] if names and not gpus else "" if gpus else "cpu"
    return TaskSettings(cores, gpus, named, _read_versions(), str(Path.cwd()))


def _read_versions() -> dict[str, str]:
    """Return what must be the same on every node, or a difference between two runs says nothing."""
    found = {"rtdetr-act": __version__}
    for name in ("ultralytics", "torch"):
        found[name] = importlib.metadata.version(name).partition("+")[0]  # "+cpu", "+cu132": of the node's own kind
    return found


def _compare_versions(wanted: Mapping[str, str]) -> str:
    """Say how this machine differs from the study's, or ""."""
    found = _read_versions()
    return next(
        (
            f"{socket.gethostname()} has {name} {found[name]}, the study {wanted[name]}: install the same on every node"
            for name in wanted
            if found[name] != wanted[name]
        ),
        "",
    )


def _check_nodes(order: TaskSettings) -> None:
    """Start a worker on each node, and let it tell its versions."""
    import ray
    from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError, WorkerCrashedError

    compare = ray.remote(num_cpus=0, max_retries=0)(_compare_versions)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers = [
        compare.options(scheduling_strategy=_pin_to_node(node["NodeID"])).remote(order.versions) for node in nodes
    ]
    for node, answer in zip(nodes, answers, strict=True):
        host = node["NodeManagerHostname"]
        try:
            difference = ray.get(answer, timeout=_NODE_TIMEOUT)
        except (NodeDiedError, TaskUnschedulableError, WorkerCrashedError):
            continue  # lost just now; the others do
        except GetTimeoutError:
            difference = f"node '{host}' starts no worker within {_NODE_TIMEOUT:.0f} s: see Ray's logs there"
        except RayError as error:
            difference = f"node '{host}' cannot run rtdetr-act: {_summarise_error(error)}"
        if difference:
            raise InputError(difference)


def _pin_to_node(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


class RunStore:
    """Reads and writes the run folders for the tasks; of two that hold one run, only the later may write.

    Args:
        folders: Run folders on this machine.
        retries: Further tries of a run whose process ended without a result.
    """

    def __init__(self, folders: Sequence[Path], retries: int) -> None:
        self.folders = {folder.name: folder for folder in folders}
        self.left = dict.fromkeys(self.folders, retries)
        self.losses: Counter[str] = Counter()
        self.holders: dict[str, int] = {}  # the token of the attempt that holds a run
        self.tokens = itertools.count(1)
        self.locks = {name: ExitStack() for name in self.folders}

    def claim(self, name: str) -> tuple[int, dict[str, bytes]] | None:
        """Give a run to an attempt: its token and the files so far; None where there is nothing to do.

        Raises:
            InputError: A process of an earlier study still works in the folder.
        """
        folder = self.folders[name]
        if self.holders.pop(name, None) is not None:
            self.losses[name] += 1
            record_attempt(folder, _LOST_REASON)
        self.locks[name].close()
        self.locks[name].enter_context(lock_folder(folder, wait=_PREDECESSOR))
        if is_finished(folder) or self.losses[name] > _MAX_LOST_NODES:
            return None
        self.holders[name] = token = next(self.tokens)
        return token, _read_run_files(folder)

    def save(self, name: str, token: int, files: Mapping[str, bytes]) -> bool:
        """Write files in the order given; False, and nothing written, where another attempt holds the run.

        Raises:
            OSError: The disk is full.
        """
        if self.holders.get(name) != token:
            return False
        for path, content in files.items():
            target = self.folders[name] / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content)
        return True

    def finish(self, name: str, token: int, files: Mapping[str, bytes], reason: str) -> bool:
        """Take an attempt's last files, and note why it gave no result unless they hold one; say whether to try again.

        Raises:
            OSError: The disk is full.
        """
        if not self.save(name, token, files):
            return False
        del self.holders[name]
        if result := read_result(self.folders[name]):
            if result.state == "done":
                (self.folders[name] / SNAPSHOT_FILE).unlink(missing_ok=True)
            return False
        record_attempt(self.folders[name], reason)
        self.left[name] -= 1
        return self.left[name] >= 0

    def stop(self, name: str, result: Mapping[str, Any]) -> None:
        """Write the result of a run that is not worth its time; its attempt may write no more."""
        if self.holders.pop(name, None) is not None:
            write_json(self.folders[name] / RESULT_FILE, dict(result))

    def held_runs(self) -> list[str]:
        """Return the names of the runs that an attempt holds."""
        return list(self.holders)


def _start_store(folders: Sequence[Path], retries: int) -> Any:
    import ray

    here = _pin_to_node(ray.get_runtime_context().get_node_id())
    paths = [folder.resolve() for folder in folders]
    return ray.remote(RunStore).options(num_cpus=0, scheduling_strategy=here).remote(paths, retries)


def _read_run_files(folder: Path) -> dict[str, bytes]:
    """Return what a process needs to go on: all but the lock, the attempts, and what was never whole."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_copied(path)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _is_copied(path: Path) -> bool:
    return path.name != ATTEMPTS_FILE and not path.name.startswith(".")


def _run_as_tasks(
    folders: Sequence[Path], keeper: Any, order: TaskSettings, watch: Callable[[Sequence[Path]], None]
) -> None:
    import ray
    from ray.exceptions import RayError

    task = ray.remote(_run_task).options(num_cpus=order.cpus, num_gpus=order.gpus, max_retries=_MAX_LOST_NODES)
    working = {task.remote(keeper, folder.name, order): folder for folder in folders}
    asked, held = keeper.held_runs.remote(), []
    try:
        while working:
            ended, _ = ray.wait(list(working), timeout=_POLL_SECONDS)
            for reference in ended:
                folder = working.pop(reference)
                try:
                    ray.get(reference)
                except RayError as error:
                    record_attempt(folder, _summarise_error(error))
            # The keeper may be writing a snapshot of a gigabyte: nobody waits for its answer.
            if ray.wait([asked], timeout=0)[0]:
                held, asked = ray.get(asked), keeper.held_runs.remote()
            watch([folder for folder in working.values() if folder.name in held])
    finally:
        for reference in working:
            ray.cancel(reference)  # raises KeyboardInterrupt in it, so that it cleans up
        ray.wait(list(working), num_returns=len(working), timeout=_CONNECT_TIMEOUT) if working else None


def _run_task(keeper: Any, name: str, order: TaskSettings) -> None:
    """Do a run as a Ray task."""
    for _ in _run_with_retries(keeper, name, order):
        pass


def _run_with_retries(
    keeper: Any, name: str, order: TaskSettings, rungs: Sequence[int] = ()
) -> Generator[Progress, None, None]:
    """Do a run on this node, tries included, and tell each epoch; closing it ends the process.

    After the epochs named as rungs the run trains on only once the next is asked for.
    """
    with suppress(OSError):
        os.chdir(order.cwd)
    again = True
    while again:
        claimed = _get_answer(keeper.claim.remote(name))
        if claimed is None:
            return
        token, files = claimed
        difference = _compare_versions(order.versions)  # of a node that joined after the study had started
        if difference:
            again = _get_answer(keeper.finish.remote(name, token, {}, difference))
            continue
        with tempfile.TemporaryDirectory(prefix="rtdetr-act-", ignore_cleanup_errors=True) as place:
            folder = Path(place, name)
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            del claimed, files
            again = yield from _run_attempt(keeper, folder, token, order, rungs)


def _run_attempt(
    keeper: Any, folder: Path, token: int, order: TaskSettings, rungs: Sequence[int]
) -> Generator[Progress, None, bool]:
    import ray

    device = ",".join(map(str, ray.get_gpu_ids())) if order.gpus else order.device
    sent = {path: _stat_signature(path) for path in folder.rglob("*")}
    told = 0
    process = start_run(folder, device=device, threads=0 if order.gpus else order.cpus, pauses=rungs)
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if (files := _read_changed_files(folder, sent)) and not _get_answer(
                keeper.save.remote(folder.name, token, files)
            ):
                return False  # another node does it now
            progress = read_progress(folder)
            if progress.epochs > told:
                told = progress.epochs
                yield progress
                release_run(process, told)
    finally:
        kill_run(process)
    finished = is_finished(folder)
    reason = "" if finished else explain_exit(folder, process.returncode)
    last = {path: content for path, content in _read_run_files(folder).items() if path != RUN_FILE}
    # The snapshot and the result last: whatever the disk holds when this machine stops, it is enough to go on.
    for name in (SNAPSHOT_FILE, RESULT_FILE):
        if name in last:
            last[name] = last.pop(name)
    return _get_answer(keeper.finish.remote(folder.name, token, last, reason))


def _get_answer(reference: Any) -> Any:
    """Return the keeper's answer; while `ray.get` waits, Ray would give the CPUs of the task to another."""
    return reference.future().result()


def _read_changed_files(folder: Path, sent: dict[Path, Any]) -> dict[str, bytes]:
    """Return what is new since the last call: the table of results, and all that a successor needs after each epoch."""
    table, snapshot = folder / "results.csv", folder / SNAPSHOT_FILE
    paths = [table] if _has_changed(table, sent) else []
    if not _has_changed(snapshot, sent):
        return _read_existing(folder, paths)
    # Read before the weights and written after them: a best.pt may be of a later epoch than the snapshot, which the
    # successor does again, but never of an earlier one.
    state = _read_existing(folder, [snapshot])
    weights = sorted((folder / "weights").glob("*.pt"))
    return _read_existing(folder, [*weights, folder / LOG_FILE, table]) | state


def _has_changed(path: Path, sent: dict[Path, Any]) -> bool:
    before, sent[path] = sent.get(path), _stat_signature(path)
    return sent[path] not in (None, before)


def _stat_signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def _read_existing(folder: Path, paths: Sequence[Path]) -> dict[str, bytes]:
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def _run_as_trials(
    folders: Sequence[Path], keeper: Any, order: TaskSettings, baseline: str, watch: Callable[[Sequence[Path]], None]
) -> None:
    """Run the rows as trials of Ray Tune, which stops some of them."""
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a traceback for each lost node
    by_name = {folder.name: folder for folder in folders}
    rows = {name: row for name, folder in by_name.items() if (row := read_run_config(folder))}

    class Watch(tune.Callback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            watch([by_name[trial.config["name"]] for trial in trials if trial.status == "RUNNING"])

    rungs = {name: find_rungs(_epochs_of(row)) for name, row in rows.items()}
    trainable = tune.with_parameters(_make_trainable_class(), keeper=keeper, order=order, rungs=rungs)
    with tempfile.TemporaryDirectory(prefix="rtdetr-act-", ignore_cleanup_errors=True) as place:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": order.cpus, "gpu": order.gpus}),
            param_space={"name": tune.grid_search(list(by_name))},
            tune_config=tune.TuneConfig(scheduler=_make_scheduler(rows, baseline, keeper, order)),
            run_config=tune.RunConfig(
                storage_path=place,
                verbose=0,
                callbacks=[Watch()],
                failure_config=tune.FailureConfig(max_failures=_MAX_LOST_NODES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the keeper has what is needed
            ),
        )
        results = tuner.fit()
        for result in (results[index] for index in range(len(results))):
            if result.error is not None and result.config:
                record_attempt(by_name[result.config["name"]], _summarise_error(result.error))


def _make_trainable_class() -> type:
    from ray import tune

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any], keeper: Any = None, order: Any = None, rungs: Any = None) -> None:
            self.epochs = _run_with_retries(keeper, config["name"], order, rungs[config["name"]])

        def step(self) -> dict[str, Any]:
            progress = next(self.epochs, None)
            if progress is None:
                return {"done": True}
            return {"epoch": progress.epochs, "score": math.nan if progress.score is None else progress.score}

        def cleanup(self) -> None:
            self.epochs.close()

    return Trial


def _make_scheduler(rows: Mapping[str, RunConfig], baseline: str, keeper: Any, order: TaskSettings) -> Any:
    """Return ASHA for each setting by itself, since scores of unlike models or data do not compare."""
    import ray
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    def start(epochs: int) -> Any:
        grace = min(find_rungs(epochs), default=1)
        # Factor 2, the halving of the name: activations differ little, and a sharper cut at once would go by noise.
        return AsyncHyperBandScheduler("epoch", "score", "max", max_t=epochs, grace_period=grace, reduction_factor=2)

    class PerSetting(FIFOScheduler):
        def __init__(self) -> None:
            super().__init__()
            self.parts = {row.setting: start(_epochs_of(row)) for row in rows.values()}

        def part(self, trial: Any) -> Any:
            return self.parts[rows[trial.config["name"]].setting]

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            self.part(trial).on_trial_add(tune_controller, trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            name = trial.config["name"]
            row, epoch = rows[name], result.get("epoch", math.inf)
            if epoch > max(find_rungs(_epochs_of(row)), default=0):
                return self.CONTINUE  # ASHA has one more rung where the epochs are no power of two
            decision: str = self.part(trial).on_trial_result(tune_controller, trial, result)
            if decision != self.STOP or format_activation(row.activation) == baseline:
                return self.CONTINUE
            ray.get(keeper.stop.remote(name, _make_stopped_result(row, epoch, order.versions)))
            return decision

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            self.part(trial).on_trial_complete(tune_controller, trial, result)

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            self.part(trial).on_trial_remove(tune_controller, trial)

    return PerSetting()


def find_rungs(epochs: int) -> tuple[int, ...]:
    """Return the epochs after which the runs of a setting are compared: an eighth, a quarter and half of all.

    >>> find_rungs(100), find_rungs(8), find_rungs(2)
    ((12, 24, 48), (1, 2, 4), (1,))
    """
    grace = max(1, epochs // _GRACE_DIVISOR)
    return tuple(rung for rung in (grace, 2 * grace, 4 * grace) if rung < epochs)


def _epochs_of(row: RunConfig) -> int:
    return int(row.arguments.get("epochs", DEFAULT_CFG_DICT["epochs"]))


def _make_stopped_result(row: RunConfig, epoch: int, versions: Mapping[str, str]) -> dict[str, Any]:
    reason = f"stopped by halving after epoch {epoch} of {_epochs_of(row)}"
    result = RunResult("stopped", reason, epochs=epoch, versions=dict(versions), command=format_command(row))
    return asdict(result)
