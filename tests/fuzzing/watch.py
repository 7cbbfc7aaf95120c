"""Run examples in a process of their own and say what went wrong: a traceback, a hang, code run, a partial file.

The process is forked from one that has everything imported (on Windows it is started anew), so that a hang can be ended
and costs a fraction of a second. An audit hook inside of it sees every process, connection and file that is opened.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Literal

import psutil
from leftovers import FOUND_BY_OTHERS, find_hidden, is_whole

FaultKind = Literal["traceback", "hang", "code run", "partial file", "memory", "crash"]
# In the name of every file, module and text that hostile inputs use: where one is run, opened or imported, code ran.
PLANTED = "planted_by_the_fuzzer"
_LONGEST_MESSAGE = 700  # characters
_WALL_PER_CPU = 10  # a process that waits ends later than one that computes, since other processes slow it down
_RUNNERS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.startfile/2", "pty.spawn")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_ASKS_SYSTEM = (
    "uname",
    "lscpu",
    "sysctl",
    "wmic",
    "git",
    "nvidia-smi",
    "ldconfig",
    "gcc",
    "g++",
)  # what libraries start
# Asked for here, since the hook may be called while the library looks for the folder, which it does under a lock.
_TEMPORARY = str(Path(tempfile.gettempdir(), tempfile.gettempprefix()))
_ROOM = 4 << 30  # bytes that a process may take beyond what it starts with; more would be the whole machine


@dataclass(frozen=True)
class Fault:
    """What is wrong with how an input was met.

    Attributes:
        kind: What it is.
        where: What tells it from other faults, such as the error and the function that raised it.
        words: All that is known of it.
    """

    kind: FaultKind
    where: str
    words: str


@dataclass(frozen=True)
class Verdict:
    """What became of one example.

    Attributes:
        accepted: Whether it was taken, rather than refused in a sentence.
        fault: What was wrong, None for nothing.
        seconds: CPU time that it took.
        memory: Bytes by which it raised the peak of the process.
        peak: That peak.
    """

    accepted: bool = False
    fault: Fault | None = None
    seconds: float = 0.0
    memory: int = 0
    peak: int = 0


class Refusal(Exception):
    """A target's way to say that an input was refused in a sentence, beside raising an RtdetrActError."""


@dataclass(frozen=True)
class Target:
    """What examples of one kind are given to.

    Attributes:
        name: The kind.
        check: Takes an example, in an empty working folder; raises Refusal or RtdetrActError where it is refused.
        file: Name of the file in the folder that the example, then bytes, is written to first; "" for none.
        template: A folder whose files are copied into the working folder.
        fresh: Whether each example gets a process of its own, as a command does.
        writes: Whether files are what it is for: they must be whole then, and none of a refused example.
        seconds: CPU time after which it hangs.
        memory: Bytes that it may take.
    """

    name: str
    check: Callable[[Any], None]
    file: str = ""
    template: Path | None = None
    fresh: bool = False
    writes: bool = False
    seconds: float = 2.0
    memory: int = 256 << 20


class Watch:
    """Gives examples to a target in a process that is ended where it hangs, and started again."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.home = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.work = self.home / "work"
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        shutil.rmtree(self.home, ignore_errors=True)

    def try_example(self, example: Any) -> Verdict:
        """Return what becomes of an example."""
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._connection.send(example)
            verdict = self._wait()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            log = (self.home / "log").read_text(errors="replace")
            verdict = Verdict(
                fault=Fault("crash", f"exit code {code}", f"the process ended with {code}: {log[-2000:]}")
            )
        if self.target.fresh or verdict.fault or verdict.memory > self.target.memory // 2:
            self._end()
        return verdict

    def _start(self) -> None:
        self._connection, other = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(other, self.target, self.home))
        with _path_of_children():
            self._process.start()
        other.close()
        self._connection.recv()  # ready

    def _wait(self) -> Verdict:
        process = psutil.Process(self._process.pid)
        started, before = time.monotonic(), _cpu_seconds(process)
        while not self._connection.poll(0.05):
            if not self._process.is_alive() and not self._connection.poll():
                raise EOFError
            used, waited = _cpu_seconds(process) - before, time.monotonic() - started
            if used > self.target.seconds or waited > self.target.seconds * _WALL_PER_CPU:
                trace = self._ask_where()
                self._end()
                words = f"no end after {used:.1f} s of computing and {waited:.1f} s in all\n{trace}"
                return Verdict(fault=Fault("hang", _innermost(trace), words), seconds=used)
        verdict: Verdict = self._connection.recv()
        return verdict

    def _ask_where(self) -> str:
        """Return what the process is doing, as faulthandler writes it; it says nothing on Windows."""
        if not hasattr(faulthandler, "register"):
            return ""
        os.kill(self._process.pid, signal.SIGUSR1)
        path, deadline = self.home / "trace", time.monotonic() + 2
        while not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        return path.read_text(errors="replace")

    def _end(self) -> None:
        """End the process and what it started."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = self._connection = None


def _make_context() -> Any:
    """Return a server that forks processes with all imported, or what starts them anew where nothing forks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzzing.targets"])
    return context


_CONTEXT = _make_context()


@contextlib.contextmanager
def _path_of_children() -> Iterator[None]:
    """Let the server find this package, since it looks at the environment only."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def _innermost(trace: str) -> str:
    """Return the innermost of our functions in what faulthandler wrote, whose first line is the innermost call."""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "rtdetr_act" in line]
    return (own or lines or ["an unknown place"])[0].replace("\\", "/").rpartition("/")[2]


# --- inside of the process -----------------------------------------------------------------------------------------


def _serve(connection: Any, target: Target, home: Path) -> None:
    """Take examples from the other end until the process is ended."""
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the one who gives the examples
    logging.disable(logging.WARNING)  # what Ultralytics says of each layer of each model
    sys.dont_write_bytecode = True  # of what an example imports first, which would be files that it left
    _limit_memory()
    audit = _Audit(home)
    sys.addaudithook(audit)
    with (home / "trace").open("w") as trace:
        if hasattr(faulthandler, "register"):
            # By the thread that hangs: faulthandler's watchdog reads its frames from another thread, which can crash.
            faulthandler.register(signal.SIGUSR1, file=trace, all_threads=False)
        connection.send("ready")
        while True:
            connection.send(_try(target, connection.recv(), home / "work", audit))


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # Windows
        import resource

        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + _ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _try(target: Target, example: Any, work: Path, audit: _Audit) -> Verdict:
    _prepare(target, example, work)
    before, peak, started = _look(work), _peak_memory(), time.process_time()
    accepted, fault = _run(target, example, audit)
    seconds, memory = time.process_time() - started, _peak_memory() - peak
    os.chdir(work.parent)
    if audit.code:
        fault = Fault("code run", audit.code[0][:80], "; ".join(audit.code))
    fault = fault or _judge_files(target, accepted, before, work, audit)
    if fault is None and memory > target.memory:
        fault = Fault("memory", "memory", f"it took {memory >> 20:,} MiB")
    return Verdict(accepted, fault, seconds, memory, _peak_memory())


def _prepare(target: Target, example: Any, work: Path) -> None:
    if work.exists() and (target.template or any(work.iterdir())):
        shutil.rmtree(work)
    if target.template:
        shutil.copytree(target.template, work)
    work.mkdir(exist_ok=True)
    if target.file:
        (work / target.file).write_bytes(example)
    os.chdir(work)


def _run(target: Target, example: Any, audit: _Audit) -> tuple[bool, Fault | None]:
    """Return whether an example was accepted, and what was wrong in how it was refused."""
    from rtdetr_act.errors import RtdetrActError

    with audit.watching():
        try:
            target.check(example)
        except (RtdetrActError, Refusal) as error:
            message = str(error)
            if message.isprintable() and 0 < len(message) <= _LONGEST_MESSAGE:
                return False, None
            return False, Fault("traceback", f"message of {_raised_in(error)}", f"no sentence: {message[:3000]!r}")
        except BaseException as error:
            where = f"{type(error).__name__} in {_raised_in(error)}"
            return False, Fault("traceback", where, "".join(traceback.format_exception(error))[-5000:])
    return True, None


def _raised_in(error: BaseException) -> str:
    """Return the innermost of our functions that an error came through, or the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "rtdetr_act" in Path(frame.filename).parts]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}, {frame.name}"


def _judge_files(target: Target, accepted: bool, before: dict[str, tuple], work: Path, audit: _Audit) -> Fault | None:
    if audit.elsewhere:
        return Fault("partial file", audit.elsewhere[0][:80], f"changed elsewhere: {'; '.join(audit.elsewhere)}")
    after = _look(work)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if changed and not (accepted and target.writes):
        return Fault("partial file", changed[0], f"{'left' if not accepted else 'wrote'} {', '.join(changed)[:2000]}")
    broken = [name for name in changed if name in after and (work / name).is_file() and not is_whole(work / name)]
    broken += [name for name in find_hidden(work) if name in changed]
    return Fault("partial file", broken[0], f"not whole: {', '.join(broken)[:2000]}") if broken else None


def _look(folder: Path) -> dict[str, tuple]:
    """Return what is in a folder, and what tells whether it was written since."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            status = path.lstat()
            found[str(path.relative_to(folder))] = (status.st_mtime_ns, status.st_size) if name in files else ()
    return found


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class _Audit:
    """Notes what an example did beyond computing.

    Attributes:
        home: The folder inside of which it may write.
        code: Code that it ran, processes and connections that it started.
        elsewhere: Files that it changed outside of the folder.
    """

    home: Path
    code: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    _on: bool = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.code, self.elsewhere, self._on = [], [], True
        try:
            yield
        finally:
            self._on = False

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._on:
            return
        self._on = False  # what is done here is no part of the example
        try:
            self._note(event, given)
        finally:
            self._on = True

    def _note(self, event: str, given: tuple[Any, ...]) -> None:
        if event in _RUNNERS or event in _NETWORK or (event == "subprocess.Popen" and not _is_harmless(given)):
            self.code.append(f"{event}{given!r}"[:500])
        elif event == "exec" and given and isinstance(given[0], CodeType) and _holds_planted(given[0]):
            self.code.append(f"exec of {given[0].co_consts!r}"[:500])
        elif event == "import" and PLANTED in str(given[0]):
            self.code.append(f"import of {given[0]}")
        elif event in _CHANGES or (event == "open" and _writes(given[2])):
            self._note_write(event, given[0])

    def _note_write(self, event: str, given: Any) -> None:
        if not isinstance(given, (str, bytes, os.PathLike)):
            return  # a file that was opened before
        path = Path(os.path.abspath(os.fsdecode(given)))  # noqa: PTH100 (links stay what they are)
        if PLANTED in path.name:
            self.code.append(f"{event} of {path.name}")
        elif self.home not in path.parents and not _is_others_own(path):
            self.elsewhere.append(f"{event} of {path}")


def _is_harmless(given: tuple[Any, ...]) -> bool:
    """Say whether a process is what asks the system for its kind, or a run of ours, without a text of an input."""
    program, words = str(given[0]), list(map(str, given[1] or ()))
    if any(PLANTED in word for word in words) or "pip" in words:
        return False
    named = Path(program).name
    return named in _ASKS_SYSTEM or Path(program) == Path(sys.executable) or named.startswith("python")


def _holds_planted(code: CodeType) -> bool:
    for part in (*code.co_consts, *code.co_names):
        if (isinstance(part, str) and PLANTED in part) or (isinstance(part, CodeType) and _holds_planted(part)):
            return True
    return False


def _writes(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


def _is_others_own(path: Path) -> bool:
    """Say whether a file is none of an example's: devices, settings and caches with homes of their own."""
    homes = [os.environ.get(name) for name in ("YOLO_CONFIG_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")]
    inside = any(home and Path(home).absolute() in path.parents for home in homes)
    temporary = str(path).startswith(_TEMPORARY)
    beside = path.name.endswith(
        (*FOUND_BY_OTHERS, ".cache.npy")
    )  # what Ultralytics keeps with the labels of a data set
    return inside or temporary or beside or path.parts[1:2] in (("dev",), ("proc",))


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Collect what is printed, on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err
