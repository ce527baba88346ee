"""Prove that what runs on CUDA is right: every check is a row, and one failure stops no other.

Checks run in processes of their own, several at a time. A process that crashes, hangs or loses its
device takes one check with it; the others go on in a new one. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import queue
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
START = 180.0
"""Seconds that a process gets to import everything and to find its device."""
LAST_LINES = 14
"""Lines of a failure that are shown; the JSON has all of them."""


@dataclass(frozen=True)
class Row:
    """What came of one check.

    Attributes:
        name: The check.
        status: "ok", "FAILED" or "skipped".
        found: What was compared, with numbers; why it failed or was skipped.
        seconds: How long it took.
        trace: Of a failure where it came from.
    """

    name: str
    status: str
    found: str
    seconds: float
    trace: str = ""

    def __str__(self) -> str:
        first = self.found.splitlines()[0] if self.found else ""
        return f"{self.status:8}{self.name:38}{self.seconds:6.1f} s  {first}"


@dataclass(frozen=True)
class Entry:
    """What must be known of a check to have it made: see `checks.base.Check`.

    Importing the checks takes seconds, so only those processes do it that make them.
    """

    name: str
    states: str
    alone: bool
    limit: float

    @classmethod
    def of(cls, check: Any) -> Entry:
        """Take what is needed of a check."""
        return cls(**{field.name: getattr(check, field.name) for field in fields(cls)})


# ---- The process that makes checks, one after the other. -----------------------------------------


def serve(arguments: argparse.Namespace) -> None:
    """Say what can be checked here; then make the checks whose names come by stdin, one a line.

    Every answer is a line of JSON.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever else is printed is no answer

        def answer(**parts: Any) -> None:
            answers.write(json.dumps(parts) + "\n")
            answers.flush()

        import torch

        from scpl.app.environment import describe_environment

        if arguments.device == "cuda":
            if not torch.cuda.is_available():
                answer(
                    refused="--device cuda needs a CUDA device. "
                    f"torch {torch.__version__} finds none. Use --device cpu"
                )
                return
            torch.backends.cudnn.allow_tf32 = False  # a CPU does not round that far
            torch.zeros(1, device="cuda")
        checks = load_checks(arguments.load)
        entries = [asdict(Entry.of(check)) for check in checks.values()]
        device = torch.device(arguments.device)
        answer(entries=entries, environment=describe_environment(device, torch.get_num_threads()))
        faulthandler.enable()
        for line in sys.stdin:
            check = checks[line.strip()]
            faulthandler.dump_traceback_later(0.9 * check.limit)  # where does it hang?
            with tempfile.TemporaryDirectory() as folder:
                row = make(check, arguments, Path(folder))
            faulthandler.cancel_dump_traceback_later()
            failed = row.status == "FAILED" and arguments.device == "cuda"
            answer(row=asdict(row), lost=failed and is_lost(torch))


def make(check: Any, arguments: argparse.Namespace, folder: Path) -> Row:
    """Make one check."""
    from checks import Skipped

    begin = time.perf_counter()
    status, trace = "ok", ""
    try:
        found = check.make(arguments.device, folder, tiny=arguments.quick)
    except Skipped as reason:
        status, found = "skipped", str(reason)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        status, found = "FAILED", f"{type(error).__name__}: {error}"
        trace = "\n".join(where(error))
    return Row(check.name, status, found, time.perf_counter() - begin, trace)


def where(error: BaseException) -> Iterator[str]:
    """Lines that say where an error comes from: the first cause last, for there is the line."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for each in chain:
        yield from "".join(traceback.format_exception(each, chain=False)).splitlines()


def is_lost(torch: Any) -> bool:
    """Whether the device of this process answers no more."""
    try:
        torch.cuda.synchronize()
        return bool(torch.zeros(1, device="cuda").item())
    except RuntimeError:
        return True


def load_checks(files: Iterable[str]) -> dict[str, Any]:
    """Import the checks, and those of further files."""
    from checks import CHECKS

    for number, file in enumerate(files):
        spec = spec_from_file_location(f"further_checks_{number}", file)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(module_from_spec(spec))
    return CHECKS


# ---- The process that hands them out. ------------------------------------------------------------


class Worker:
    """A process that makes checks; a new one is started whenever it has ended.

    Args:
        command: How to start it.
        environment: Its variables.
        printed: Where it writes what it prints.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], printed: Path
    ) -> None:
        self._command, self._environment, self._printed = command, environment, printed
        self._hello: dict[str, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def hello(self) -> dict[str, Any]:
        """What it says when it is ready.

        Raises:
            TimeoutError: if it does not become so.
            ChildProcessError: if it ended, or refused.
        """
        if self._process is None:
            self._start()
        if self._hello is None:
            hello = self._answer(START)
            if "refused" in hello:
                raise ChildProcessError(hello["refused"])
            self._hello = hello
        return self._hello

    def make(self, check: Entry) -> Row:
        """Have one check made."""
        begin = time.perf_counter()
        try:
            self.hello()
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(f"{check.name}\n".encode())
            self._process.stdin.flush()
            answer = self._answer(check.limit)
            row = Row(**answer["row"])
            if answer["lost"]:
                self.end()
        except (OSError, ValueError) as error:
            self.end()
            row = Row(check.name, "FAILED", str(error), time.perf_counter() - begin, self.printed())
        return row

    def printed(self) -> str:
        """What it printed; if that ends with where it hung, the line comes last."""
        try:
            text = self._printed.read_text(errors="replace")
        except FileNotFoundError:  # the folder goes when all is interrupted
            return ""
        before, mark, calls = text.rpartition("(most recent call first):\n")
        return before + mark + "\n".join(reversed(calls.splitlines())) if mark else text

    def end(self) -> None:
        """Kill it, and what it started."""
        process, self._process, self._hello = self._process, None, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def _start(self) -> None:
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed,
                env=self._environment, start_new_session=True,
            )  # fmt: skip

    def _answer(self, limit: float) -> dict[str, Any]:
        """Read a line.

        Raises:
            TimeoutError: if none comes in time.
            ChildProcessError: if none can come any more.
        """
        process = self._process  # `end` in another thread takes it away
        assert process is not None
        assert process.stdout is not None
        line, deadline = b"", time.monotonic() + limit
        while not line.endswith(b"\n"):
            patience = max(deadline - time.monotonic(), 0.0)
            if not select.select([process.stdout], [], [], patience)[0]:
                raise TimeoutError(f"no end after {limit:.0f} s: killed")
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                raise ChildProcessError(f"its process ended with status {process.wait()}")
            line += part
        found: dict[str, Any] = json.loads(line)
        return found


class Table:
    """The rows so far: printed as they come, and kept in a file.

    Args:
        names: All checks that will be made, in order.
        about: What else the file holds.
        file: The JSON file, if one is wanted.
    """

    def __init__(self, names: Sequence[str], about: dict[str, Any], file: Path | None) -> None:
        self._names, self._about, self._file = names, about, file
        self._lock, self._begin = threading.Lock(), time.perf_counter()
        self.rows: dict[str, Row] = {}

    def add(self, row: Row) -> None:
        """Enter a row."""
        with self._lock:
            self.rows[row.name] = row
            print(row, flush=True)
            if self._file is not None:
                self._file.write_text(json.dumps(self.all(), indent=1))

    def all(self) -> dict[str, Any]:
        """Everything, for the file."""
        rows = [asdict(self.rows[name]) for name in self._names if name in self.rows]
        missing = [name for name in self._names if name not in self.rows]
        seconds = time.perf_counter() - self._begin
        return {**self._about, "seconds": seconds, "not_made": missing, "rows": rows}

    def failures(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows.values() if row.status == "FAILED"]

    def report(self) -> str:
        """The whole table, and where the failures come from."""
        lines = ["", *(str(self.rows[name]) for name in self._names if name in self.rows)]
        for row in self.failures():
            lines += ["", f"FAILED {row.name}: {row.found}", *row.trace.splitlines()[-LAST_LINES:]]
        counts = {
            status: sum(row.status == status for row in self.rows.values())
            for status in ("ok", "FAILED", "skipped")
        }
        counts["not made"] = len(self._names) - len(self.rows)
        told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return "\n".join([*lines, "", f"{told}, in {time.perf_counter() - self._begin:.0f} s"])


def make_all(checks: Sequence[Entry], workers: Sequence[Worker], table: Table) -> None:
    """Have checks made, several at a time; those that measure at the end, by themselves."""
    waiting: queue.SimpleQueue[Entry] = queue.SimpleQueue()
    # What may take long begins early, or it would be all that is left in the end.
    for check in sorted(checks, key=lambda check: -check.limit):
        if not check.alone:
            waiting.put(check)
    stopped = threading.Event()

    def work(worker: Worker) -> None:
        while not stopped.is_set():
            try:
                check = waiting.get_nowait()
            except queue.Empty:
                return
            row = worker.make(check)
            if not stopped.is_set():
                table.add(row)

    lanes = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        for worker in workers[1:]:
            worker.end()
        for check in checks:
            if check.alone:
                table.add(workers[0].make(check))
    finally:
        stopped.set()


def environment(jobs: int) -> dict[str, str]:
    """The variables of a process that makes checks."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    paths = [str(SOURCE)] if find_spec("scpl") is None else []
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS is not deterministic
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def chosen(checks: Sequence[Entry], only: Sequence[str]) -> list[Entry]:
    """The checks that are wanted, by name or by theme; all if none is named.

    Raises:
        ValueError: for a name that is neither.
    """

    def is_meant(check: Entry, name: str) -> bool:
        return name in (check.name, check.name.partition("/")[0])

    unknown = [name for name in only if not any(is_meant(check, name) for check in checks)]
    if unknown:
        raise ValueError(
            f"--only must name checks or themes. Got: {', '.join(unknown)}. See --list"
        )
    return [check for check in checks if not only or any(is_meant(check, name) for name in only)]


def main() -> int:
    """Run the command line; returns the exit status."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks; always on a CPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks or themes")
    parser.add_argument(
        "--jobs", type=int, default=max(1, min(4, cores // 2)), help="processes side by side"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--list", action="store_true", help="name the checks and what they prove")
    parser.add_argument(
        "--load", nargs="+", default=[], metavar="FILE", help="Python files with further checks"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.quick |= arguments.device == "cpu"
    if arguments.serve:
        serve(arguments)
        return 0
    jobs = max(1, arguments.jobs)
    command = [sys.executable, str(HERE / "check.py"), "--serve", "--device", arguments.device]
    command += ["--quick"] if arguments.quick else []
    command += ["--load", *arguments.load] if arguments.load else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = []
        for number in range(1 if arguments.list else jobs):
            printed = Path(folder) / f"printed-{number}"
            workers.append(Worker(command, environment(jobs), printed))
            stack.callback(workers[-1].end)
        try:
            hello = workers[0].hello()
            checks = chosen([Entry(**entry) for entry in hello["entries"]], arguments.only)
        except (OSError, ValueError) as error:
            print(f"{workers[0].printed()}check.py: {error}", file=sys.stderr)
            return 2
        if arguments.list:
            print("\n".join(f"{check.name:38}{check.states}" for check in checks))
            return 0
        here = {**hello["environment"], "command": shlex.join(sys.argv)}
        about = {"environment": here, "jobs": jobs, "tiny": arguments.quick}
        table = Table([check.name for check in checks], about, arguments.json)
        try:
            make_all(checks, workers, table)
        finally:
            print(table.report(), flush=True)
    return 1 if table.failures() or len(table.rows) < len(checks) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
