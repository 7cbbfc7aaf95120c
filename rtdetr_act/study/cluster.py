"""The Ray engine: runs on many machines, with early stopping by Ray Tune.

Each run is a Ray task, or a trial of Ray Tune with early stopping, that starts the same worker process as the local
engine in a temporary folder of its node. A `RunStore`, an actor on this machine, sends the files of the run folders to
the tasks and receives changed files after each epoch, so that a run whose node is lost resumes on another node after
its last epoch. Nodes share nothing but the network. Each needs the same versions of rtdetr-act, Ultralytics and torch,
and the model and the data at the paths that the study names; the `shapes` data set is generated on each node.
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

from rtdetr_act.errors import InputError, TrainingError, quote
from rtdetr_act.files import write_atomically
from rtdetr_act.study.grid import RunConfig, count_epochs, format_activation, format_command, read_run_config
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
    WORKER_EXIT_SECONDS,
    RunResult,
    lock_folder,
    write_json,
)
from rtdetr_act.version import __version__

_POLL_SECONDS = 0.2
_CONNECT_TIMEOUT = 10.0  # seconds
_NODE_TIMEOUT = 120.0  # seconds; the first worker of a node imports Ray, maybe from a slow disk
_MAX_LOST_NODES = 5  # per run, since a run may crash its node each time
_LOST_REASON = "its node, or Ray's worker on it, was lost"
_GRACE_DIVISOR = 8  # no run is stopped in its first 1/8, while the learning rate warms up
_RAY_MISSING = "engine=ray needs Ray: pip install 'rtdetr-act[ray]'"


@dataclass(frozen=True)
class TaskSettings:
    """Settings that all tasks of a study share.

    Attributes:
        cpus: CPU cores per run.
        gpus: GPUs per run, assigned by Ray.
        device: Ultralytics' `device` of a run without GPUs; "" for that of its configuration.
        versions: Versions of the packages that must be the same on all nodes.
        cwd: Working directory, to which relative paths refer, on nodes where it exists.
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
    """Connect to a Ray cluster for the body of a `with` statement, and check its nodes; a context manager.

    Args:
        address: Address of a cluster that this machine belongs to, such as "10.0.0.1:6379" or "auto"; None starts Ray
            on this machine.
        device: Ultralytics' `device` for all runs; None for a GPU per run if the cluster has any.
        cpus: CPU cores per run; None for 1.
        halving: Whether Ray Tune is needed.

    Yields:
        The settings of the tasks.

    Raises:
        InputError: Ray is missing, the cluster does not answer or has no node with the resources of a run, or a node
            has other versions.
    """
    ray = _import_ray(halving)
    try:
        _connect_to_ray(address)
        settings = _choose_settings(device, cpus)
        _check_nodes(settings)
        yield settings
    finally:
        ray.shutdown()


def run_on_cluster(
    folders: Sequence[Path],
    *,
    settings: TaskSettings,
    retries: int,
    halving: str | None,
    watch: Callable[[Sequence[Path]], None],
) -> None:
    """Run all unfinished runs on the connected Ray cluster.

    A failure is recorded in the run folder and does not stop the other runs.

    Args:
        folders: Run folders with their `run.json`, all in one parent folder.
        settings: As `join_cluster` yields them.
        retries: Number of further attempts at a run whose process ends without a result, lost nodes not counted.
        halving: Activation of the baseline. Other runs in the worse half of their setting are stopped after an eighth,
            a quarter and a half of their epochs, with the result "stopped". None stops none.
        watch: Function called several times per second with the folders of the runs in progress.

    Raises:
        TrainingError: The actor that stores the files ended; the same command continues the study.
    """
    from ray.exceptions import RayActorError

    waiting = [folder for folder in folders if not is_finished(folder)]
    if not waiting:
        return
    try:
        store = _start_store(waiting, retries)
        if halving is None:
            _run_as_tasks(waiting, store, settings, watch)
        else:
            _run_as_trials(waiting, store, settings, halving, watch)
    except RayActorError as error:
        raise TrainingError(
            f"the process that stores the study's files ended: {_summarise_error(error)}; the same command continues"
        ) from None


def _import_ray(halving: bool = False) -> Any:
    """Return the module `ray` with its messages turned off; raises InputError if it is not installed."""
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default, without which Ray warns
        "RAY_AIR_NEW_OUTPUT": "0",  # otherwise Tune prints tables even at verbose=0
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's handler waits for the trials
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
    """Connect to a Ray cluster, or start Ray on this machine; raises InputError."""
    import ray

    _check_address(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError for other versions, and others
        raise InputError(f"cannot join the Ray cluster at '{address or 'local'}': {_summarise_error(error)}") from None
    finally:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaces it


def _check_address(address: str | None) -> None:
    """Check that a cluster answers, since Ray waits for minutes and then ends the process; raises InputError."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError(
            f"address={quote(address)} is not HOST:PORT, such as 10.0.0.1:6379: run the study on a machine of the "
            "cluster"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last for an invalid host name
        raise InputError(
            f"no Ray cluster answers at {quote(address)} ({error}): start one with 'ray start --head', and give "
            "the address that it prints"
        ) from None


def _summarise_error(error: BaseException) -> str:
    """Return the first line of an error's message, for an error of a Ray task that of its cause."""
    cause = getattr(error, "cause", None) or error
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)


def _choose_settings(device: Any, cpus: int | None) -> TaskSettings:
    """Return the settings of all tasks; raises InputError if no node has the resources of a run."""
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
    """Return the installed versions of the packages that must be the same on all nodes."""
    versions = {"rtdetr-act": __version__}
    for name in ("ultralytics", "torch"):
        versions[name] = importlib.metadata.version(name).partition("+")[0]  # "+cpu" or "+cu132" may differ
    return versions


def _compare_versions(expected: Mapping[str, str]) -> str:
    """Return a sentence on the first version that differs on this machine, or ""."""
    versions = _read_versions()
    return next(
        (
            f"{socket.gethostname()} has {name} {versions[name]}, the study {expected[name]}: install the same on "
            "every node"
            for name in expected
            if versions[name] != expected[name]
        ),
        "",
    )


def _check_nodes(settings: TaskSettings) -> None:
    """Check the versions on each node in a worker there; raises InputError."""
    import ray
    from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError, WorkerCrashedError

    compare = ray.remote(num_cpus=0, max_retries=0)(_compare_versions)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers = [
        compare.options(scheduling_strategy=_pin_to_node(node["NodeID"])).remote(settings.versions) for node in nodes
    ]
    for node, answer in zip(nodes, answers, strict=True):
        host = node["NodeManagerHostname"]
        try:
            difference = ray.get(answer, timeout=_NODE_TIMEOUT)
        except (NodeDiedError, TaskUnschedulableError, WorkerCrashedError):
            continue  # the node was lost; the others suffice
        except GetTimeoutError:
            difference = f"node '{host}' starts no worker within {_NODE_TIMEOUT:.0f} s: see Ray's logs there"
        except RayError as error:
            difference = f"node '{host}' cannot run rtdetr-act: {_summarise_error(error)}"
        if difference:
            raise InputError(difference)


def _pin_to_node(node: str) -> Any:
    """Return a scheduling strategy for one node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


class RunStore:
    """Actor that reads and writes the run folders for the tasks.

    An attempt at a run claims it and gets a token. If two attempts claim the same run, only the later one may write.

    Args:
        folders: Run folders on this machine.
        retries: Number of further attempts at a run whose process ends without a result.
    """

    def __init__(self, folders: Sequence[Path], retries: int) -> None:
        self.folders = {folder.name: folder for folder in folders}
        self.retries_left = dict.fromkeys(self.folders, retries)
        self.lost_nodes: Counter[str] = Counter()
        self.tokens_by_run: dict[str, int] = {}  # of the attempts that hold runs
        self.tokens = itertools.count(1)
        self.locks = {name: ExitStack() for name in self.folders}

    def claim(self, name: str) -> tuple[int, dict[str, bytes]] | None:
        """Assign a run to a new attempt, and return a token and the files of the run by relative path.

        Returns None if the run is finished or has lost too many nodes.

        Raises:
            InputError: A process of an earlier study is still working in the folder.
        """
        folder = self.folders[name]
        if self.tokens_by_run.pop(name, None) is not None:
            self.lost_nodes[name] += 1
            record_attempt(folder, _LOST_REASON)
        self.locks[name].close()
        self.locks[name].enter_context(lock_folder(folder, timeout=WORKER_EXIT_SECONDS))
        if is_finished(folder) or self.lost_nodes[name] > _MAX_LOST_NODES:
            return None
        self.tokens_by_run[name] = token = next(self.tokens)
        return token, _read_run_files(folder)

    def save(self, name: str, token: int, files: Mapping[str, bytes]) -> bool:
        """Write files of a run in the given order, and return whether the attempt with this token holds the run.

        If another attempt holds it, nothing is written.

        Args:
            name: Name of the run.
            token: Token of the attempt.
            files: Contents by relative path.

        Raises:
            OSError: The disk is full.
        """
        if self.tokens_by_run.get(name) != token:
            return False
        for path, content in files.items():
            target = self.folders[name] / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content)
        return True

    def finish(self, name: str, token: int, files: Mapping[str, bytes], reason: str) -> bool:
        """End an attempt, and return whether there should be another one.

        Args:
            name: Name of the run.
            token: Token of the attempt.
            files: Its last files, by relative path.
            reason: Why the attempt failed; recorded unless the files include a result.

        Raises:
            OSError: The disk is full.
        """
        if not self.save(name, token, files):
            return False
        del self.tokens_by_run[name]
        if result := read_result(self.folders[name]):
            if result.state == "done":
                (self.folders[name] / SNAPSHOT_FILE).unlink(missing_ok=True)
            return False
        record_attempt(self.folders[name], reason)
        self.retries_left[name] -= 1
        return self.retries_left[name] >= 0

    def stop(self, name: str, result: Mapping[str, Any]) -> None:
        """Write the result of a run that is stopped early, and release it, so that its attempt can no longer write.

        Args:
            name: Name of the run.
            result: Contents of its `result.json`.
        """
        if self.tokens_by_run.pop(name, None) is not None:
            write_json(self.folders[name] / RESULT_FILE, dict(result))

    def held_runs(self) -> list[str]:
        """Return the names of the runs that are held by an attempt."""
        return list(self.tokens_by_run)


def _start_store(folders: Sequence[Path], retries: int) -> Any:
    """Start a RunStore on this node, and return its handle."""
    import ray

    here = _pin_to_node(ray.get_runtime_context().get_node_id())
    paths = [folder.resolve() for folder in folders]
    return ray.remote(RunStore).options(num_cpus=0, scheduling_strategy=here).remote(paths, retries)


def _read_run_files(folder: Path) -> dict[str, bytes]:
    """Return the files from which a run resumes, by relative path: all but locks, attempts and temporary files."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_copied(path)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _is_copied(path: Path) -> bool:
    """Return whether a file of a run folder is sent to the node of the run."""
    return path.name != ATTEMPTS_FILE and not path.name.startswith(".")


def _run_as_tasks(
    folders: Sequence[Path], store: Any, settings: TaskSettings, watch: Callable[[Sequence[Path]], None]
) -> None:
    """Train the runs as Ray tasks, and wait for all of them."""
    import ray
    from ray.exceptions import RayError

    task = ray.remote(_run_task).options(num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=_MAX_LOST_NODES)
    working = {task.remote(store, folder.name, settings): folder for folder in folders}
    answer, held = store.held_runs.remote(), []
    try:
        while working:
            ended, _ = ray.wait(list(working), timeout=_POLL_SECONDS)
            for reference in ended:
                folder = working.pop(reference)
                try:
                    ray.get(reference)
                except RayError as error:
                    record_attempt(folder, _summarise_error(error))
            # Without waiting, since the store may be writing a snapshot of a gigabyte.
            if ray.wait([answer], timeout=0)[0]:
                held, answer = ray.get(answer), store.held_runs.remote()
            watch([folder for folder in working.values() if folder.name in held])
    finally:
        for reference in working:
            ray.cancel(reference)  # raises KeyboardInterrupt in the task, which then cleans up
        ray.wait(list(working), num_returns=len(working), timeout=_CONNECT_TIMEOUT) if working else None


def _run_task(store: Any, name: str, settings: TaskSettings) -> None:
    """Train a run to its end, as a Ray task."""
    for _ in _run_with_retries(store, name, settings):
        pass


def _run_with_retries(
    store: Any, name: str, settings: TaskSettings, rungs: Sequence[int] = ()
) -> Generator[Progress, None, None]:
    """Train a run on this node with retries, and yield its progress after each epoch.

    Closing the generator kills the process. After the epochs in `rungs`, the run pauses until the next progress is
    requested.
    """
    with suppress(OSError):
        os.chdir(settings.cwd)
    again = True
    while again:
        claimed = _get_answer(store.claim.remote(name))
        if claimed is None:
            return
        token, files = claimed
        difference = _compare_versions(settings.versions)  # for nodes that joined after the start
        if difference:
            again = _get_answer(store.finish.remote(name, token, {}, difference))
            continue
        with tempfile.TemporaryDirectory(prefix="rtdetr-act-", ignore_cleanup_errors=True) as parent:
            folder = Path(parent, name)
            for path, content in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            del claimed, files
            again = yield from _run_attempt(store, folder, token, settings, rungs)


def _run_attempt(
    store: Any, folder: Path, token: int, settings: TaskSettings, rungs: Sequence[int]
) -> Generator[Progress, None, bool]:
    """Train a run in a temporary folder, and yield its progress after each epoch.

    Args:
        store: Handle of the RunStore.
        folder: Folder on this node with the files of the run.
        token: Token of the attempt.
        settings: Settings of all tasks.
        rungs: Numbers of epochs to pause after.

    Returns:
        Whether there should be another attempt.
    """
    import ray

    device = ",".join(map(str, ray.get_gpu_ids())) if settings.gpus else settings.device
    sent = {path: _stat_signature(path) for path in folder.rglob("*")}
    reported = 0
    process = start_run(folder, device=device, threads=0 if settings.gpus else settings.cpus, pauses=rungs)
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if (files := _read_changed_files(folder, sent)) and not _get_answer(
                store.save.remote(folder.name, token, files)
            ):
                return False  # another attempt holds the run
            progress = read_progress(folder)
            if progress.epochs > reported:
                reported = progress.epochs
                yield progress
                release_run(process, reported)
    finally:
        kill_run(process)
    finished = is_finished(folder)
    reason = "" if finished else explain_exit(folder, process.returncode)
    last = {path: content for path, content in _read_run_files(folder).items() if path != RUN_FILE}
    # The snapshot and the result last, so that the folder can be resumed from whenever this machine stops.
    for name in (SNAPSHOT_FILE, RESULT_FILE):
        if name in last:
            last[name] = last.pop(name)
    return _get_answer(store.finish.remote(folder.name, token, last, reason))


def _get_answer(reference: Any) -> Any:
    """Return the result of a call of the store; `ray.get` would release the CPUs of the task while it waits."""
    return reference.future().result()


def _read_changed_files(folder: Path, sent: dict[Path, Any]) -> dict[str, bytes]:
    """Return the files changed since the last call: results.csv, and after each epoch all that a resume needs."""
    table, snapshot = folder / "results.csv", folder / SNAPSHOT_FILE
    paths = [table] if _has_changed(table, sent) else []
    if not _has_changed(snapshot, sent):
        return _read_existing(folder, paths)
    # Read before the weights and written after them: best.pt may belong to a later epoch than the snapshot, which is
    # repeated on resume, but never to an earlier one.
    state = _read_existing(folder, [snapshot])
    weights = sorted((folder / "weights").glob("*.pt"))
    return _read_existing(folder, [*weights, folder / LOG_FILE, table]) | state


def _has_changed(path: Path, sent: dict[Path, Any]) -> bool:
    """Return whether a file exists and has changed since the last call."""
    before, sent[path] = sent.get(path), _stat_signature(path)
    return sent[path] not in (None, before)


def _stat_signature(path: Path) -> tuple[int, int] | None:
    """Return modification time and size of a file, or None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def _read_existing(folder: Path, paths: Sequence[Path]) -> dict[str, bytes]:
    """Return the contents of those files that exist, by relative path."""
    files = {}
    for path in paths:
        with suppress(FileNotFoundError):
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def _run_as_trials(
    folders: Sequence[Path], store: Any, settings: TaskSettings, baseline: str, watch: Callable[[Sequence[Path]], None]
) -> None:
    """Train the runs as trials of Ray Tune, which stops some of them early."""
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it logs a traceback for each lost node
    by_name = {folder.name: folder for folder in folders}
    configs = {name: config for name, folder in by_name.items() if (config := read_run_config(folder))}

    class Watch(tune.Callback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            watch([by_name[trial.config["name"]] for trial in trials if trial.status == "RUNNING"])

    rungs = {name: find_rungs(count_epochs(config)) for name, config in configs.items()}
    trainable = tune.with_parameters(_make_trainable_class(), store=store, settings=settings, rungs=rungs)
    with tempfile.TemporaryDirectory(prefix="rtdetr-act-", ignore_cleanup_errors=True) as storage:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": settings.cpus, "gpu": settings.gpus}),
            param_space={"name": tune.grid_search(list(by_name))},
            tune_config=tune.TuneConfig(scheduler=_make_scheduler(configs, baseline, store, settings)),
            run_config=tune.RunConfig(
                storage_path=storage,
                verbose=0,
                callbacks=[Watch()],
                failure_config=tune.FailureConfig(max_failures=_MAX_LOST_NODES),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the store has the snapshots
            ),
        )
        results = tuner.fit()
        for result in (results[index] for index in range(len(results))):
            if result.error is not None and result.config:
                record_attempt(by_name[result.config["name"]], _summarise_error(result.error))


def _make_trainable_class() -> type:
    """Return the class of a trial of Ray Tune that trains one run."""
    from ray import tune

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any], store: Any = None, settings: Any = None, rungs: Any = None) -> None:
            self.epochs = _run_with_retries(store, config["name"], settings, rungs[config["name"]])

        def step(self) -> dict[str, Any]:
            progress = next(self.epochs, None)
            if progress is None:
                return {"done": True}
            return {"epoch": progress.epochs, "score": math.nan if progress.score is None else progress.score}

        def cleanup(self) -> None:
            self.epochs.close()

    return Trial


def _make_scheduler(configs: Mapping[str, RunConfig], baseline: str, store: Any, settings: TaskSettings) -> Any:
    """Return a scheduler with a separate ASHA per setting, since scores of different models or data do not compare."""
    import ray
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

    def start(epochs: int) -> Any:
        grace = min(find_rungs(epochs), default=1)
        # Factor 2, since activations differ little, and a larger one would select by noise.
        return AsyncHyperBandScheduler("epoch", "score", "max", max_t=epochs, grace_period=grace, reduction_factor=2)

    class PerSetting(FIFOScheduler):
        def __init__(self) -> None:
            super().__init__()
            self.parts = {config.setting: start(count_epochs(config)) for config in configs.values()}

        def part(self, trial: Any) -> Any:
            return self.parts[configs[trial.config["name"]].setting]

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            self.part(trial).on_trial_add(tune_controller, trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            name = trial.config["name"]
            config, epoch = configs[name], result.get("epoch", math.inf)
            if epoch > max(find_rungs(count_epochs(config)), default=0):
                return self.CONTINUE  # ASHA has a further rung if the epochs are not a power of two
            decision: str = self.part(trial).on_trial_result(tune_controller, trial, result)
            if decision != self.STOP or format_activation(config.activation) == baseline:
                return self.CONTINUE
            ray.get(store.stop.remote(name, _make_stopped_result(config, epoch, settings.versions)))
            return decision

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            self.part(trial).on_trial_complete(tune_controller, trial, result)

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            self.part(trial).on_trial_remove(tune_controller, trial)

    return PerSetting()


def find_rungs(epochs: int) -> tuple[int, ...]:
    """Return the numbers of epochs after which runs are compared: an eighth, a quarter and a half of all epochs.

    >>> find_rungs(100), find_rungs(8), find_rungs(2)
    ((12, 24, 48), (1, 2, 4), (1,))
    """
    grace = max(1, epochs // _GRACE_DIVISOR)
    return tuple(rung for rung in (grace, 2 * grace, 4 * grace) if rung < epochs)


def _make_stopped_result(config: RunConfig, epoch: int, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return the contents of the `result.json` of a run that is stopped early."""
    reason = f"stopped by halving after epoch {epoch} of {count_epochs(config)}"
    result = RunResult(
        "stopped", reason, epochs=epoch, versions=dict(versions), command=format_command(config, Path(config.name))
    )
    return asdict(result)
