"""Processes for tests that need some: forked off one that has imported torch, or started anew.

To start Python and import torch takes ten times as long as most jobs that tests run. So each
process of pytest has a server, started when it is first needed, that imports torch and scpl once
and computes nothing, for which it has a single thread. What is forked off it is a process like any
other, with signals, memory, threads and process groups of its own. It differs from one that was
started anew in three things: modules are there before they are imported, all processes of a server
hash texts alike, and variables that it was given are not in ``/proc/PID/environ``.

What such a process starts with this Python, as the ranks of a launcher, is forked off it likewise,
unless it shall find another ``scpl`` than ours.
"""

import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import scpl
from blank_pictures import blank_pictures
from scpl.engine.local import local_ranks

SOURCE = str(Path(scpl.__file__).parents[1])
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = [
    "torch._dynamo",  # the first optimizer needs it
    "torch.distributed.pipelining",
    "torch.export._trace",  # a network that is cut along its graph needs it
    "scpl.pipeline",
    "scpl.app.cli",
    "scpl.app.train.run",  # commands import these when they begin
    "scpl.app.compare",
    "scpl.app.bench.bench",
    "scpl.app.evaluate",
    "scpl.app.predict",
    "scpl.app.export",
    "scpl.app.planning",
    "scpl.app.launch",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "transformers.models.bert.modeling_bert",  # passed over where there is none, as the next
    "transformers.models.auto.tokenization_auto",
]
TO_END = 30  # seconds that processes get to end by themselves


class Forked:
    """``python ARGUMENTS`` in a forked process; it has the part of `subprocess.Popen` we use.

    Args:
        arguments: ``-m MODULE`` or a script, and what follows.
        environment: All its environment variables.
    """

    def __init__(self, arguments, environment):
        self.args = [str(argument) for argument in arguments]
        self.returncode = None
        SERVER.set_forkserver_preload(PRELOADED)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is imported
            forkserver.ensure_running()
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder)
        self._written = [folder / "out", folder / "err"]
        for path in self._written:
            path.touch()
        self._process = SERVER.Process(
            target=_run, args=(self.args, environment, os.getcwd(), self._written)
        )
        self._process.start()
        self.pid, self.sentinel = self._process.pid, self._process.sentinel

    def poll(self):
        self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Wait for its end; returns all that it wrote to stdout and to stderr."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.written()

    def written(self):
        out, err = (path.read_text() for path in self._written)
        return out, err

    def end(self):
        """Kill it if it still lives, and what it started in its session."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it is about to begin a session
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()


def _run(arguments, environment, folder, written):
    """What a forked process does where a new one would start Python."""
    os.setsid()
    for number, path in enumerate(written, 1):
        target = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    os.chdir(folder)
    subprocess.Popen = _Popen
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context(
        "fork" if method == "spawn" else method
    )
    _python(arguments, environment)


class _Popen(subprocess.Popen):
    """Of a forked process: ``python -m MODULE ...`` is forked off it, and all else is started."""

    def __init__(self, command, *, env=None, **options):
        variables = dict(env or os.environ)
        ours = variables.get("PYTHONPATH", SOURCE).split(os.pathsep)[0] == SOURCE
        program, *arguments = command
        if arguments[:1] == ["-u"]:  # torchrun's; what is forked flushes when it ends
            del arguments[0]
        if (program, *arguments[:1]) == (sys.executable, "-m") and ours:
            sys.stdout.flush()
            sys.stderr.flush()
            # It does not return, and so nothing is executed.
            options["preexec_fn"] = partial(_begin, arguments, variables)
        super().__init__(command, env=env, **options)


def _begin(arguments, environment):
    """Do what a new Python would do in a process that was just forked, and end it."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, own)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    # What it inherits believes to be what the parent's are, files perhaps where these are pipes.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    status = 1
    try:
        _python(arguments, environment)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _python(arguments, environment):
    """Be ``python ARGUMENTS``, with nothing of the server's to look through for garbage."""
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    with blank_pictures():
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")


def environment(**more):
    """The environment of this process, for one with a single thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run_forked(num_ranks, *arguments, timeout, to_end=TO_END):
    """Run ``python ARGUMENTS`` in forked processes, alone or as ranks.

    Ranks find what the launcher would give them: variables and a store to meet at. Unlike there,
    those that are left when one has failed get ``to_end`` seconds to end by themselves.

    Returns:
        As `subprocess.run`: the status of the first process that failed, or 0, and what all of
        them wrote, one after the other.

    Raises:
        subprocess.TimeoutExpired: if one takes longer than ``timeout`` seconds. No process is
            left in any case.
    """
    processes = []
    with local_ranks(num_ranks) as places:
        try:
            for place in places:
                variables = environment(**place) if num_ranks > 1 else environment()
                processes.append(Forked(arguments, variables))
            status = _first_failure(processes, timeout, to_end)
        finally:
            for process in processes:
                process.end()
    outs, errs = zip(*(process.written() for process in processes), strict=True)
    return subprocess.CompletedProcess(arguments, status, "".join(outs), "".join(errs))


def _first_failure(processes, timeout, to_end):
    """Wait for all to end; returns the first status that is not 0."""
    status, deadline = 0, time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    while running:
        ended = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended and not status:
            raise subprocess.TimeoutExpired(processes[0].args, timeout)
        if not ended:
            break
        for sentinel in ended:
            found = running.pop(sentinel).poll()
            if found and not status:
                status, deadline = found, min(deadline, time.monotonic() + to_end)
    return status


def run_started(num_ranks, *arguments, timeout):
    """As `run_forked`, but as users do it: ``python ARGUMENTS``, or ``torchrun ARGUMENTS``."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), *arguments]
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher ends its ranks
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=TO_END)
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
