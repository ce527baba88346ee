"""Faults for `benchmarks/gpu/check.py` to find: it loads this file with ``--load``.

Most of them make every second pipeline of a method another one, where a check compares two.
"""

import os
import signal
import subprocess
import sys
import time
from itertools import count

import rank_job
import torch
from checks.base import check

from scpl.app import evaluate
from scpl.engine.stage import Stage
from scpl.methods import METHODS
from scpl.pipeline import Pipeline

MADE = count()
WRONG_ON_THE_DEVICE, WRONG_BY_ONE_BIT, CHANGED_WEIGHT = "early-exit", "bp", "dgl"

make, export = Pipeline.__init__, Pipeline.export
load, learn = Stage.load_state_dict, rank_job.Job.learn
test = evaluate.evaluate


def make_with_a_fault(pipeline, parts, method, optimizer, **options):
    first = next(MADE) % 2 == 0
    if first and method.name == WRONG_ON_THE_DEVICE:
        options["clip_norm"] = 1e-2  # as gradients that come out wrong
    make(pipeline, parts, method, optimizer, **options)
    if first and method.name == WRONG_BY_ONE_BIT:
        value = next(pipeline.parts.model.parameters()).data.flatten()
        value[0] = value[0].nextafter(torch.tensor(9.0))


def export_with_a_fault(pipeline):
    network = export(pipeline)
    if pipeline.method.name == CHANGED_WEIGHT:
        list(network.parameters())[-1].data[0] += 0.01
    return network


def load_with_a_fault(stage, state):
    if stage.optimizer is not None:
        for kept in state["optimizer"]["state"].values():
            kept["exp_avg"].zero_()
    load(stage, state)


def learn_with_a_fault(job, ranks=None):
    found = learn(job, ranks)
    found["losses"][0][-1] *= 1 + 1e-6
    return found


def evaluate_with_a_fault(config):
    found = test(config)
    return {**found, "test_accuracy": found["test_accuracy"] - 0.1}


assert set(METHODS) > {WRONG_ON_THE_DEVICE, WRONG_BY_ONE_BIT, CHANGED_WEIGHT}
Pipeline.__init__, Pipeline.export = make_with_a_fault, export_with_a_fault
Stage.load_state_dict, rank_job.Job.learn = load_with_a_fault, learn_with_a_fault
evaluate.evaluate = evaluate_with_a_fault
torch.amp.GradScaler.step = lambda scaler, optimizer: optimizer.step()  # overflow or not


@check("fault", {"raise": {"how": "raise"}, "crash": {"how": "crash"}})
def fault(setup, how):
    """A check that fails by itself."""
    if how == "crash":
        sys.stderr.write("the last words\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGSEGV)
    try:
        raise ValueError("the first cause")
    except ValueError as error:
        raise RuntimeError("what follows from it") from error


@check("fault-hang", limit=2.0)
def hang(setup):
    """A check that does not end, and has started a process."""
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    sys.stderr.write(f"started {left.pid}\n")
    sys.stderr.flush()
    time.sleep(300)
