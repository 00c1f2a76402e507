"""Processes that cost a tenth of a second: fresh ones, forked from a server that has done the heavy
imports.

`run_command`, `run_script` and `run_code` stand for what is typed at a shell: own directory,
environment, `sys.argv` and `sys.modules["__main__"]`, warnings as errors, captured output, exit
code. `on_ranks` runs a function in ranks that meet as under torchrun. What torchrun and the
interpreter themselves do is left to the few tests that start real ones.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
HEAVY = (
    "pydantic.json_schema",
    "pydantic.type_adapter",
    "star_elastic.cli",
    "star_elastic.cli.commands",
    "star_elastic.demo",
    "star_elastic.measure.latency",
    "star_elastic.report.page",
    "star_elastic.evaluate.run",
    "star_elastic.measure.size_latency",
    "star_elastic.export.engines",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "transformers.models.nemotron_h.modeling_nemotron_h",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "tests.tiny_run",
)
PATIENCE_SECONDS = 900.0


def _server() -> Any:
    """The context whose processes are forked from the server, which is started by the first."""
    context: Any = get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    from multiprocessing.forkserver import ensure_running

    # As `python -W error`, which the server hands on to its children.
    before, here = os.environ.get("PYTHONWARNINGS"), os.getcwd()
    os.environ["PYTHONWARNINGS"] = "error"
    os.chdir(ROOT)  # the server finds modules from where it starts
    try:
        ensure_running()
    finally:
        os.chdir(here)
        os.environ.pop("PYTHONWARNINGS")
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before
    return context


def stop_server() -> None:
    """Ends the server, once its processes have ended; its time counts as this process's then."""
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._stop()


@dataclass(frozen=True, slots=True)
class Completed:
    """How a process ended. `returncode` is negative for the signal that ended it."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A process that has been started; its output goes to files until it has ended."""

    def __init__(self, process: Any, out: Any, err: Any):
        self._process, self._out, self._err = process, out, err

    @property
    def pid(self) -> int:
        """Its number, for signals."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return self._process.exitcode is not None

    def kill(self) -> None:
        """Ends it at once, as kill -9 does."""
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float = PATIENCE_SECONDS) -> Completed:
        """Waits until it ends. Raises TimeoutError, and kills it, if that takes too long."""
        self._process.join(timeout)
        if not self.has_ended:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s: {self._text(self._err)}")
        return Completed(self._process.exitcode, self._text(self._out), self._text(self._err))

    @staticmethod
    def _text(file: Any) -> str:
        return Path(file.name).read_text(encoding="utf-8")


def start_command(*arguments: object, **options: Any) -> Running:
    """`star-elastic ARGUMENTS`, not waited for. `cwd` and `env` (added to this process's)."""
    return _start(("command", list(map(str, arguments))), **options)


def run_command(*arguments: object, **options: Any) -> Completed:
    """`star-elastic ARGUMENTS` to its end. `cwd`, `env`, `timeout` in seconds."""
    timeout = options.pop("timeout", PATIENCE_SECONDS)
    return start_command(*arguments, **options).wait(timeout)


def answer(*arguments: object, **options: Any) -> dict:
    """The JSON object that a command prints, and nothing else."""
    done = run_command(*arguments, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(*arguments: object, **options: Any) -> str:
    """The one line of a command that ends with exit code 2."""
    done = run_command(*arguments, **options)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stdout == "" and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    return require_well_formed(done.stderr)


STRAY = re.compile(r"[,;:][,;:]|[\w\])]\. [a-z]|\(\)|[,;:]$| [,;:.] ")
"""Punctuation that no sentence has, as where parts of a message were put together wrongly."""


def require_well_formed(line: str) -> str:
    """An error line as it must be: what is wrong, and behind the last semicolon what to do."""
    said = re.sub(r"(?<!\w)(['\"]).*?\1", "x", line.rstrip("\n"))  # but for what it quotes
    assert said.startswith("error: ") and not STRAY.search(said), line
    assert re.search("; .*[a-z]", said), line
    return line


def run_script(script: Path | str, *arguments: object, **options: Any) -> Completed:
    """`python SCRIPT ARGUMENTS` to its end."""
    timeout = options.pop("timeout", PATIENCE_SECONDS)
    what = ("script", [str(ROOT / script), *map(str, arguments)])
    return _start(what, **options).wait(timeout)


def run_code(code: str, *arguments: object, **options: Any) -> Completed:
    """`python -c CODE ARGUMENTS` to its end."""
    timeout = options.pop("timeout", PATIENCE_SECONDS)
    return _start(("code", [code, *map(str, arguments)]), **options).wait(timeout)


def _start(
    what: tuple[str, list[str]], *, cwd: Path | str = ROOT, env: Mapping[str, str] | None = None
) -> Running:
    # Gone when the `Running` is.
    out, err = (tempfile.NamedTemporaryFile(prefix="star-elastic-") for _ in range(2))  # noqa: SIM115
    environment = {**os.environ, **(env or {})}
    arguments = (*what, out.name, err.name, str(cwd), environment)
    process = _server().Process(target=_run, args=arguments, daemon=True)
    process.start()
    return Running(process, out, err)


def _run(
    kind: str, arguments: list[str], out: str, err: str, cwd: str, environment: dict[str, str]
) -> None:
    """What a child does: becomes the process that was asked for."""
    _settle(environment, cwd)
    for number, file in ((1, out), (2, err)):
        target = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    _open_streams()
    _end(lambda: _become(kind, arguments))


def _become(kind: str, arguments: list[str]) -> None:
    if kind == "command":
        from star_elastic.cli import main

        sys.argv = ["star-elastic", *arguments]
        main()
    elif kind == "script":
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        subprocess.Popen = _Forked
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.argv = ["-c", *arguments[1:]]
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(arguments[0], "<string>", "exec"), module.__dict__)


def _open_streams() -> None:
    """The standard streams, on what their numbers now stand for."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115


class _Forked(subprocess.Popen):
    """A script's own child, if it is `python SCRIPT ARGUMENTS`: forked too, with the pipes that
    were asked for. Anything else is started as it is."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if not isinstance(args, list) or args[0] != sys.executable or not args[1].endswith(".py"):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        # Nine arguments on how to start it, then both ends of every pipe (-1 where there is none).
        stdin, own_in, own_out, stdout, own_err, stderr = pipes = rest[9:15]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
            return
        for number, (theirs, ours) in enumerate(
            [(stdin, own_in), (stdout, own_out), (stderr, own_err)]
        ):
            if theirs != -1:
                os.dup2(theirs, number)
            if ours != -1:
                os.close(ours)
        _open_streams()
        _end(lambda: _become("script", args[1:]))


def _settle(environment: Mapping[str, str], cwd: str) -> None:
    """Environment and directory of a child; Ctrl-C reaches it as it reaches a fresh process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(work: Callable[[], object]) -> NoReturn:
    """Does the work and ends as the interpreter would."""
    code: Any = 0
    try:
        work()
    except SystemExit as ended:
        code = ended.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # pools end and threads are joined
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


# Ranks


def on_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = PATIENCE_SECONDS,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """`function(*arguments)` in `size` ranks at once; what each returns, in their order.

    The ranks find each other as torchrun's do, through a store of this process. The function must
    be importable by name, and it and its arguments and results picklable. Raises what the first
    rank to fail raised, and TimeoutError if they take too long; the others are killed then.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = _server()
    ranks: list[tuple[Any, Any]] = []
    for rank in range(size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **(env or {}),
        }
        theirs, ours = context.Pipe()
        given = (function, arguments, theirs, environment, str(ROOT))
        process = context.Process(target=_be_rank, args=given, daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        return _gather(ranks, time.monotonic() + timeout)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
        del store


def _gather(ranks: list[tuple[Any, Any]], deadline: float) -> list[Any]:
    """The results of all ranks, as they come."""
    results: dict[int, Any] = {}
    waiting = {ours: rank for rank, (_, ours) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} have not answered in time")
        for ours in ready:
            rank = waiting.pop(ours)  # type: ignore[index]
            try:
                worked, value = pickle.loads(ours.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                process = ranks[rank][0]
                process.join(10)
                raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}") from None
            if not worked:
                raise value
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _be_rank(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    answers: Any,
    environment: dict[str, str],
    cwd: str,
) -> None:
    _settle(environment, cwd)
    # Views go out of sharded modules here, and nobody changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Not `send`, which would hand over the memory of tensors that end with this process.
    try:
        answer = pickle.dumps((True, function(*arguments)))
    except BaseException as error:
        said = f"on rank {environment['RANK']}: {traceback.format_exc()}"
        error.add_note(said)
        try:
            answer = pickle.dumps((False, error))
        except Exception:  # an error that cannot be sent, is told
            answer = pickle.dumps((False, RuntimeError(said)))
    answers.send_bytes(answer)
    answers.close()
    # gloo's threads may abort a process that ends in the ordinary way, after all work is done.
    os._exit(0)
