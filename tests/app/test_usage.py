from types import SimpleNamespace

import pytest
import torch

from scpl.app.train.progress import Meter, Usage
from scpl.engine.mesh import Mesh
from scpl.engine.ranks import OneRank
from scpl.engine.timeline import Timeline


@pytest.fixture
def clock(monkeypatch):
    """Time that only tests move."""
    now = [100.0]
    monkeypatch.setattr("scpl.app.train.progress.time.perf_counter", lambda: now[0])
    return now


@pytest.fixture
def memory(monkeypatch):
    """Memory that only tests fill."""
    peak = [1000]
    monkeypatch.setattr("scpl.app.train.progress.peak_memory", lambda device: peak[0])
    return peak


def rank(number, num_ranks, num_stages, ranks):
    """What a meter sees of a pipeline; all ranks of a test share one store."""
    return SimpleNamespace(
        mesh=Mesh(number, num_ranks),
        stages=[None] * num_stages,
        timeline=Timeline(number),
        device=torch.device("cpu"),
        ranks=ranks,
    )


def test_the_last_rank_knows_what_every_stage_waited_in_an_epoch(clock, memory):
    ranks = OneRank()
    first, last = rank(0, 2, 3, ranks), rank(1, 2, 1, ranks)
    meters = [Meter(first), Meter(last)]
    for epoch, waited in ((1, (1.0, 4.0)), (2, (3.0, 5.0))):
        for meter in meters:
            meter.begin_epoch()
        for pipeline, seconds in zip((first, last), waited, strict=True):
            pipeline.timeline.add("wait", 0, 1, 0.0, seconds)
            pipeline.timeline.add("learn", 0, 1, 0.0, 9.0)
        clock[0] += 10
        memory[0] = 2000 * epoch
        meters[0].end_epoch(epoch)
        memory[0] = 3000
        meters[1].end_epoch(epoch)
        memory[0] = 9999  # validation is not what is measured
        found = meters[1].collect(epoch)
        shares = [waited[0] / 10] * 3 + [waited[1] / 10]
        assert found == Usage((2000 * epoch, 3000), pytest.approx(shares))


def test_live_numbers_of_others_are_those_last_told(clock, memory):
    ranks = OneRank()
    first, last = rank(0, 2, 1, ranks), rank(1, 2, 1, ranks)
    meters = [Meter(first), Meter(last)]
    clock[0] += 1
    assert meters[1].live() == Usage((1000,)), "nobody has told anything"
    for meter in meters:
        meter.end_epoch(1)
    meters[1].collect(1)
    meters[1].begin_epoch()
    clock[0] += 4
    last.timeline.add("wait", 0, 1, 0.0, 1.0)
    memory[0] = 5000
    assert meters[1].live() == Usage((1000, 5000), pytest.approx((0.0, 0.25)))


def test_one_process_has_nobody_to_wait_for(clock, memory):
    meter = Meter(rank(0, 1, 4, OneRank()))
    clock[0] += 1
    meter.end_epoch(1)
    assert meter.collect(1) == meter.live() == Usage((1000,), ())
