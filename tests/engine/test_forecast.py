"""Forecasts from made-up times: what each method makes of them, and how many machines help."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import scpl
from scpl.app.commands import PlanConfig
from scpl.app.planning import plan_text, simulated
from scpl.engine.costs import Costs, Held, Unit
from scpl.engine.forecast import Measured, forecasts, local, most_helpful, sizes, with_replicas
from scpl.engine.planning import Kind, measurable, measure_parts
from scpl.engine.precision import Precision
from scpl.engine.stage import StageOptions
from scpl.methods import CutBackpropagation
from scpl.simulation.machines import Link, Machine, MessageCosts

CPU = torch.device("cpu")
UNIT = Unit(
    layers=("layer",), parameters=250, forward=1.0, backward=2.0, forward_first=1.0,
    backward_first=2.0, update=0.0, objective=0.0, objective_parameters=0, bytes_out=800,
    bytes_in=800, inputs=1.0, held=Held(1000, 1000, 2000, 8000),
)  # fmt: skip


def costs(*seconds, rows=16, head=0.0):
    """Units that take so many times as long as UNIT, of which 16 rows were measured."""
    size = UNIT.bytes_in * rows // 16
    units = tuple(
        replace(
            UNIT, layers=(f"layer{i}",), objective=head,
            **{
                name: getattr(UNIT, name) * factor
                for name in ("forward", "backward", "forward_first", "backward_first", "inputs")
            },
            bytes_in=size, bytes_out=size,
            held=replace(UNIT.held, activations=UNIT.held.activations * rows // 16),
        )
        for i, factor in enumerate(seconds)
    )  # fmt: skip
    return Costs(tuple(f"layer{i}" for i in range(1, len(units))), units, rows)


def measured(*seconds, fixed=0.0, head=0.0, **options):
    """Halves of a mini-batch take half as long, and something fixed besides."""
    return Measured(
        "scpl",
        costs(*seconds, head=head),
        {
            rows: costs(*(each * rows / 16 + fixed for each in seconds), rows=rows)
            for rows in sizes(16)
        },
        **options,
    )


def line(count, rate=float("inf")):
    return [Machine(1.0, Link(rate))] * count


def by_name(found):
    return {each.method: each for each in found}


def test_every_method_on_equal_machines():
    """Four units of three seconds: a line of four gains four without a bubble, less with one."""
    found = by_name(forecasts(measured(1, 1, 1, 1), line(4)))
    assert list(found) == ["scpl", "gpipe", "1f1b", "zero-bubble", "ddp", "bp"]
    alone = found["bp"].samples_per_second
    assert alone == pytest.approx(16 / 12)
    ratio = {name: each.samples_per_second / alone for name, each in found.items()}
    assert ratio["scpl"] == pytest.approx(4.0)
    assert ratio["gpipe"] == ratio["1f1b"] == pytest.approx(4 * 16 / (16 + 3))
    assert ratio["gpipe"] < ratio["zero-bubble"] < 4.0
    assert ratio["ddp"] == pytest.approx(4.0)
    assert found["gpipe"].micro_batches == found["1f1b"].micro_batches == 16
    assert found["scpl"].cuts == ("layer1", "layer2", "layer3")
    assert found["scpl"].wait_shares == pytest.approx([0.0] * 4)
    assert found["scpl"].bytes_sent == pytest.approx([800.0] * 3 + [0.0])
    assert found["1f1b"].bytes_sent == pytest.approx([800.0, 1600.0, 1600.0, 800.0])
    assert found["bp"].num_machines == 1


def test_messages_that_cost_a_processor_cost_those_most_who_send_most():
    costs = MessageCosts(message=1e-3, byte=1e-3, added=2e-3)
    plain, busy = (
        by_name(forecasts(measured(1, 1, 1, 1), [Machine(1.0, Link(), own)] * 4))
        for own in (MessageCosts(), costs)
    )
    slower = {name: plain[name].outcome.seconds / busy[name].outcome.seconds for name in plain}
    assert slower["bp"] == 1.0
    assert max(slower["gpipe"], slower["ddp"]) < slower["scpl"] < 1.0
    heavy = measured(1, 1, 6)
    for own in (replace(costs, added=0.0), MessageCosts(added=2e-3)):
        shared, cheap = (
            with_replicas(heavy, [Machine(1.0, Link(), each)] * 4) for each in (own, MessageCosts())
        )
        assert shared.samples_per_second < cheap.samples_per_second


def test_what_machines_hold():
    found = by_name(forecasts(measured(1, 1, 1, 1), line(4)))
    bp, ddp, scpl_ = found["bp"].memory[0], found["ddp"].memory[0], found["scpl"].memory[1]
    assert (bp.parameters, bp.gradients, bp.optimizer) == (4000, 4000, 8000)
    assert bp.activations == 4 * 8000 + 800
    assert (ddp.parameters, ddp.activations) == (4000, bp.activations / 4)
    assert scpl_.total == 1000 + 1000 + 2000 + (8000 + 2 * 800 + 800)  # two wait, one leaves
    gpipe, few = found["gpipe"].memory, found["1f1b"].memory
    assert gpipe[0].activations == pytest.approx(8000 + 800)
    assert few[0].activations == pytest.approx((8000 + 800) * 4 / 16)


def test_small_micro_batches_are_as_inefficient_as_they_were_measured():
    """With half a second for each, however small, fewer of them are best."""
    many, few = (by_name(forecasts(measured(1, 1, fixed=each), line(2))) for each in (0.0, 0.25))
    assert many["gpipe"].micro_batches == 16
    assert few["gpipe"].micro_batches == 2
    known = measured(1, 1, fixed=0.25)
    assert known.at(4).units[0].forward == pytest.approx(0.25 + 0.25)
    assert known.at(6).units[0].forward == pytest.approx(0.375 + 0.25)  # between two
    assert known.at(1).units[0].forward == pytest.approx(0.0625 + 0.25)  # below all
    assert known.at(4).units[0].held == replace(UNIT.held, activations=2000)


def test_more_machines_than_a_method_can_use():
    found = by_name(forecasts(measured(1, 1, 1, 1), line(64)))
    assert {name: each.num_machines for name, each in found.items()} == {
        "scpl": 4, "scpl+replicas": 64, "gpipe": 4, "1f1b": 4, "zero-bubble": 4, "ddp": 16, "bp": 1,
    }  # fmt: skip


class TestReplicas:
    """Machines that cutting cannot use share a stage."""

    @pytest.mark.parametrize(
        ("seconds", "count", "replicas", "speed_up"),
        [
            ((1, 2, 1), 4, (1, 2, 1), 4.0),
            ((1, 6, 1), 4, (3, 1), 8 / (7 / 3)),  # three stages would wait for 6 / 2
            ((2, 6), 4, (1, 3), 4.0),
        ],
    )
    def test_they_share_what_cannot_be_cut(self, seconds, count, replicas, speed_up):
        known = measured(*seconds)
        found = by_name(forecasts(known, line(count)))
        shared = with_replicas(known, line(count))
        assert shared.samples_per_second / found["bp"].samples_per_second == pytest.approx(speed_up)
        assert sum(shared.replicas) == shared.num_machines == len(shared.memory) == count
        assert shared.replicas in (replicas, replicas[::-1])
        assert found["scpl+replicas"] == shared
        assert len(shared.replicas) == len(shared.cuts) + 1 == len(shared.stages_per_machine)

    def test_they_are_left_out_where_they_do_not_help(self):
        assert "scpl+replicas" not in by_name(forecasts(measured(1, 1, 1, 1), line(4)))
        slow = measured(1, 2, 1)  # 2000 bytes of gradients in a ring
        assert "scpl+replicas" in by_name(forecasts(slow, line(4, rate=1e4)))
        assert "scpl+replicas" not in by_name(forecasts(slow, line(4, rate=1e2)))

    def test_stages_that_are_given_stay(self):
        shared = with_replicas(measured(2, 1, 1, num_stages=2), line(6))
        assert len(shared.replicas) == 2
        assert shared.samples_per_second == pytest.approx(16 / 2)
        assert with_replicas(measured(1, 1, 1, num_stages=3), line(2)) is None
        assert with_replicas(measured(4), line(3)) is None  # that is ddp

    def test_a_group_is_as_fast_as_its_slowest_machine_times_their_number(self):
        machines = [Machine(1.0), Machine(1.0), Machine(0.9)]
        shared = with_replicas(measured(1, 4), machines)
        assert shared.samples_per_second == pytest.approx(16 / 12 * 1.8)
        assert shared.replicas == (1, 2)

    def test_rows_for_replicas_of_the_first_stage_come_from_one_machine(self):
        """Half of 800 bytes; the plan had them for nothing."""
        shared = with_replicas(measured(6, 2), line(3, rate=1e3))
        assert shared.replicas == (2, 1)
        ring = 1000.0
        assert shared.bytes_sent == pytest.approx([400 + ring + 400, 400 + ring, 0])
        # 9 seconds of computing, 1 for gradients and 0.4 for the rows.
        assert shared.samples_per_second == pytest.approx(16 / 10.4)

    def test_a_slow_machine_that_is_left_out_makes_no_replicas(self):
        """It was called one of a plan with replicas, which was a line without it."""
        machines = [Machine(1.0), Machine(1.0), Machine(0.05)]
        assert max(with_replicas(measured(1, 1, 1), machines).replicas) == 1
        assert "scpl+replicas" not in by_name(forecasts(measured(1, 1, 1), machines))

    def test_what_each_holds_and_sends(self):
        shared = with_replicas(measured(1, 2, 1), line(4))
        assert shared.bytes_sent == pytest.approx([800, 400 + 1000, 400 + 1000, 0])
        alone, half = shared.memory[0], shared.memory[1]
        assert (half.parameters, half.gradients) == (1000, 1000)
        assert half.activations == pytest.approx(
            alone.activations / 2 + 400
        )  # two wait for it, not one
        assert shared.wait_shares == pytest.approx([0.0] * 4)

    def test_a_plan_says_how_to_start_them(self):
        found = simulated(PlanConfig(machines=(4,), link=("1gbit",)), [Link()], measured(1, 2, 1))
        (case,) = found["simulated"]
        assert case["flags"] == "--cuts layer1 layer2 --processes 4 --replicas 1 2 1"
        assert "scpl 2.00 x one machine with bp, scpl+replicas 4.00 x, gpipe" in case["answer"]
        assert "; more than 3 do not help scpl without replicas, because" in case["answer"]
        text = plan_text({**found, "synthetic": False})
        (row,) = [line for line in text.splitlines() if line.startswith("scpl+replicas ")]
        assert row.split()[:2] == ["scpl+replicas", "1+2+1"]

    @given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(2, 5), st.booleans())
    def test_no_other_groups_are_faster(self, seconds, count, alike):
        """Against all ways to cut, and all groups."""
        machines = [Machine(1.0 if alike else 1.0 / (1 + i % 2)) for i in range(count)]
        known = measured(*seconds)
        found = with_replicas(known, machines)
        ways = []
        for groups in range(2, min(count, len(seconds)) + 1):
            for cuts in combinations(range(1, len(seconds)), groups - 1):
                for places in combinations(range(1, count + 1), groups):
                    parts = [sum(seconds[a:b]) for a, b in pairwise([0, *cuts, len(seconds)])]
                    own = [machines[a:b] for a, b in pairwise([0, *places])]
                    ways.append(
                        max(
                            3 * part / len(group) / min(machine.speed for machine in group)
                            for part, group in zip(parts, own, strict=True)
                        )
                    )
        assert 16 / found.samples_per_second == pytest.approx(min(ways), rel=1e-3)


class TestHowManyMachinesHelp:
    def test_until_a_unit_is_the_slowest_stage(self):
        """6 of 12 seconds are one unit's: beside it two more machines would only wait."""
        limit = most_helpful(measured(1, 2, 1), line(8))
        assert limit.num_machines == 3
        assert limit.samples_per_second == pytest.approx((16 / 12, 16 / 9, 16 / 6))
        assert limit.reason == "what machine 1 has (layer1) cannot be cut further"
        assert most_helpful(measured(1, 3, 1, 1), line(8)).num_machines == 3

    def test_until_a_link_takes_longer_than_computing(self):
        limit = most_helpful(measured(1, 1, 1, 1), line(4, rate=100.0))
        assert limit.num_machines == 2
        assert limit.reason.startswith("machine 0 sends 0.00 MB per mini-batch, which takes longer")

    def test_until_heads_cost_more_than_they_take_off(self):
        limit = most_helpful(measured(*[0.001] * 8, head=9.0), line(2))
        assert limit.num_machines == 1
        assert limit.reason == "machine 0 spends almost all its time on a head"

    def test_as_many_as_there_are_stages(self):
        limit = most_helpful(measured(1, 1, 1, 1, num_stages=2), line(4))
        assert (limit.num_machines, limit.reason) == (2, "the network is cut into 2 stages")
        assert local(measured(1, 1, 1, 1, num_stages=4), line(2)).stages_per_machine == (2, 2)

    def test_of_unequal_ones_only_those_that_are_there_are_tried(self):
        machines = [Machine(1.0), Machine(0.5)]
        limit = most_helpful(measured(1, 1, 1), machines)
        assert (limit.num_machines, limit.reason) == (2, "")
        assert local(measured(1, 1, 1), machines).cuts == ("layer2",)


def test_a_network_is_measured_as_it_is():
    """A hidden layer of 1,000 numbers, of 64 rows and of 16; bytes are known exactly."""
    model = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 20), nn.Linear(20, 3))
    batch = torch.randn(64, 10), torch.arange(64) % 3
    options = StageOptions(
        lambda own: torch.optim.Adam(own, lr=1e-3), precision=Precision(send_as=torch.bfloat16)
    )
    parts = measurable(model, num_stages=1, batch=batch)
    plain = CutBackpropagation()
    kinds = [Kind(plain, 64, halves=True), Kind(plain, 16, halves=True), Kind(scpl.SCPL())]
    large, small, heads = measure_parts(parts, kinds, options, batch=batch, device=CPU, repeats=1)
    first, last = large.units
    assert (first.bytes_in, first.bytes_out) == (64 * 10 * 4, 64 * 1000 * 2)
    assert small.units[0].bytes_out == 16 * 1000 * 2
    assert small.num_samples == 16
    own = 4 * (10 * 1000 + 1000)
    # Adam keeps two tensors like each parameter, and counts its steps.
    assert first.held == Held(own, own, 2 * own + 2 * 4, 64 * 1000 * 4)
    assert last.held.activations == 64 * 20 * 4
    assert first.inputs == 0.0  # nobody waits for them
    assert last.inputs > 0.0
    heads = heads.units[0].objective_held
    assert min(heads.parameters, heads.gradients, heads.optimizer, heads.activations) > 0
