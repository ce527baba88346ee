"""Every test leaves the process as it found it; one that does not fails.

Random state is the exception: tests may draw, so each begins from the same seed instead, and what
the global generator was is put back afterwards.
"""

import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from hypothesis import HealthCheck, settings

from blank_pictures import blank_pictures

GRACE = 3.0  # seconds that threads and processes get to end
CUDA = torch.cuda.is_available()
OURS_TO_STAY = ("resource_tracker", "forkserver")  # multiprocessing ends these with the session
LONG = {  # files that take half a minute or more though few of their tests are slow
    "test_bench.py", "test_cli.py", "test_compare.py", "test_equality.py", "test_own_networks.py",
    "test_pretrained.py", "test_report.py", "test_texts.py", "test_zoo.py",
}  # fmt: skip
VOLATILE = {  # set by pytest, torch and scikit-learn for themselves, once
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
}

# Whoever started the tests may ignore it (nohup), and what they start would, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # no thread that watches progress bars
settings.register_profile(
    "scpl",
    deadline=None,
    max_examples=50,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("scpl")


def pytest_collection_modifyitems(items):
    """Files that take longest come first, or one might be all that is left in the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], item.path.name not in LONG))


def pytest_collection_finish():
    """What is imported stays: no search for garbage need go through half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def pictures(request):
    """Blank ones, but in files that look at them."""
    with nullcontext() if request.node.get_closest_marker("pictures") else blank_pictures():
        yield


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before it."""
    before = torch.get_rng_state()
    # Where there is no GPU, torch.manual_seed keeps a stack trace for each kind of them, for ever.
    (torch.manual_seed if CUDA else torch.default_generator.manual_seed)(0)
    random.seed(0)
    np.random.seed(0)
    yield
    torch.set_rng_state(before)


@pytest.fixture(autouse=True)
def no_leaked_environment():
    before = environment()
    directory = Path.cwd()
    yield
    found, now = environment(), Path.cwd()
    os.environ.update(before)
    for name in found.keys() - before.keys():
        del os.environ[name]
    os.chdir(directory)
    assert found == before, "the test changed environment variables"
    assert now == directory, "the test changed the current directory"


@pytest.fixture(autouse=True)
def no_leaked_torch_settings():
    before = torch_settings()
    yield
    found = torch_settings()
    if found != before:
        restore(before)
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if in_group:
        torch.distributed.destroy_process_group()
    assert found == before, "the test changed settings of torch"
    assert not in_group, "the test left a process group behind"


@pytest.fixture(autouse=True)
def no_leaked_threads_and_processes():
    threads, processes = set(threading.enumerate()), child_processes()
    yield
    extra_threads, extra_processes = [], set()
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        extra_threads = [t for t in threading.enumerate() if t not in threads]
        extra_processes = child_processes() - processes
        if not extra_threads and not extra_processes:
            return
        time.sleep(0.02)
    for process in multiprocessing.active_children():  # or the session would wait for them
        process.terminate()  # a launcher ends its ranks
        process.join(GRACE)
        process.kill()
    assert not extra_threads, "the test left threads behind"
    assert not extra_processes, "the test left processes behind"


def environment():
    return {name: value for name, value in os.environ.items() if name not in VOLATILE}


def torch_settings():
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "grad": torch.is_grad_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "matmul": torch.get_float32_matmul_precision(),
    }


def restore(wanted):
    torch.set_num_threads(wanted["threads"])
    torch.set_default_dtype(wanted["dtype"])
    torch.use_deterministic_algorithms(
        wanted["deterministic"], warn_only=wanted["deterministic_warn_only"]
    )
    torch.set_grad_enabled(wanted["grad"])
    torch.backends.cudnn.benchmark = wanted["benchmark"]
    torch.set_float32_matmul_precision(wanted["matmul"])


def child_processes():
    """Living children of this process and of its fork server: ``(pid, command line)``."""
    # This also joins those that ended.
    found = {(str(child.pid), child.name) for child in multiprocessing.active_children()}
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            pids = path.read_text().split()
        except OSError:  # the thread ended
            continue
        for pid in pids:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:  # the process ended
                continue
            if command and not any(word in command for word in OURS_TO_STAY):
                found.add((pid, command))
    return found
