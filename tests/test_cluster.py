"""benchmarks/cluster: emulated machines have what they are given, and nothing of them is left."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from scpl.app.bench.measure import Contender
from scpl.app.bench.workers import Timing, Workers
from scpl.engine.costs import Costs, Held, Unit
from scpl.engine.forecast import Measured
from scpl.errors import InputError
from scpl.simulation.machines import MessageCosts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
for folder in ("throughput", "", "cluster"):
    sys.path.insert(0, str(BENCHMARKS / folder))
try:
    import machines
    import ranks
    import tables

    import links
finally:
    del sys.path[:3]


@pytest.fixture(scope="module")
def main():
    """The script; under a name of its own, for others are called main, too."""
    spec = importlib.util.spec_from_file_location("cluster", BENCHMARKS / "cluster" / "main.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cluster", module)  # where dataclasses look their types up
        spec.loader.exec_module(module)
        sys.path[:] = before
        yield module


def test_a_quota_is_a_share_of_a_period_that_is_long_enough_for_the_kernel():
    assert machines.period_and_quota(0.25) == (10_000, 2_500)
    assert machines.period_and_quota(1) == (10_000, 10_000)
    assert machines.period_and_quota(0.04) == (25_000, 1_000)


def test_machines_get_what_there_is_by_their_speeds_and_never_more(main):
    assert main.shares_of(4, None, [], 2) == pytest.approx([0.45] * 4)
    assert main.shares_of(3, None, [1, 0.5], 2) == pytest.approx([0.6, 0.3, 0.6])
    assert main.shares_of(2, 0.2, [1, 0.5], 2) == [0.2, 0.1]
    assert main.shares_of(1, None, [], 8) == [0.9]  # one thread has no use for more
    with pytest.raises(ValueError, match=r"at most 0\.95 of it.*Got 1 for 4 on 2 cores"):
        main.shares_of(4, 0.5, [], 2)
    with pytest.raises(ValueError, match=r"from 0\.01 to 1 core"):
        main.shares_of(2, 1.5, [], 8)
    with pytest.raises(ValueError, match="at most 2 machines"):
        main.shares_of(2, 0.1, [1, 1, 1], 2)


def test_each_machine_keeps_to_a_core_that_has_room_for_it():
    """Where they moved, the first ones were slower by up to a half."""
    assert sorted(machines.cores_of([0.2] * 8, 2)) == [0] * 4 + [1] * 4
    assert machines.cores_of([0.3, 0.6, 0.3], 2) == [1, 0, 1]
    assert machines.fullest([0.3, 0.6, 0.3], 2) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"Got 1\.2 for 3 on 2 cores"):
        machines.check_shares([0.6] * 3, 2)


@pytest.mark.parametrize("version", [1, 2])
def test_quotas_are_written_as_each_version_of_cgroups_wants_them(version, tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io\n")
    options = "rw,cpu,cpuacct" if version == 1 else "rw"
    mounts = f"proc /proc proc rw 0 0\nx {tmp_path} cgroup{'' if version == 1 else 2} {options} 0 0"
    controller = machines.Controller.find(mounts)
    assert controller == machines.Controller(version, tmp_path)
    machine = tmp_path / "0"
    machine.mkdir()
    controller.prepare(machine)
    controller.limit(machine, 0.25)
    written = {path.name: path.read_text() for path in machine.iterdir()}
    quota = {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "2500"}
    below = {"cgroup.subtree_control": "+cpu"}
    assert written == (quota if version == 1 else {"cpu.max": "2500 10000", **below})


def test_only_root_makes_machines(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert machines.refusal() == "Cgroups with quotas are made by root"
    assert links.refusal() == "Network namespaces are made by root"


def test_every_method_has_a_stage_for_each_machine_and_its_variants(main):
    config = main.config_of([], quick=True)
    entries = list(main.entries_of(config, [2, 4], []))
    names = [main.name_of(entry, "1gbit") for entry in entries if entry.num_machines != 2]
    assert names == [
        "bp x4", "scpl x4 1gbit", "limit x4",
        *(f"{method}/{n} x4 1gbit" for method in main.SLICED for n in (4, 8, 16)),
        "ddp x4 1gbit", "ddp/bf16 x4 1gbit",
    ]  # fmt: skip
    for entry in entries:
        assert entry.config.run.threads == 1
        if entry.label == "bp":
            assert entry.alone
            continue
        assert entry.config.network.num_stages == entry.num_machines
        entry.config.check([entry.config.method.method])
    turns = main.turns_of(entries, ["loopback", "1gbit"])
    assert [link for entry, link in turns if entry.label == "limit"] == ["loopback"] * 2
    with pytest.raises(InputError, match="Got bp-wide"):
        list(main.entries_of(replace(config, methods="bp-wide"), [2], []))


def test_a_case_has_flags_of_its_own_and_a_limit_of_its_own(main):
    cases = [main.Case.of("late: --cuts layer4"), main.Case.of("rival: --methods gpipe")]
    late, limit, rival = main.cases_of(cases, ["--methods", "bp,scpl"], [2], quick=True)
    assert (late.label, late.config.network.cuts) == ("late", ("layer4",))
    assert (limit.label, limit.alone) == ("limit of late", True)
    assert (limit.config, main.limit_of(late)) == (late.config, limit)
    assert (rival.label, rival.config.method.method) == ("rival", "gpipe")
    with pytest.raises(ValueError, match="a name and flags"):
        main.Case.of("--cuts layer4")


def test_the_best_number_of_micro_batches_counts_and_the_figure_is_drawn(main, tmp_path):
    config = main.config_of(["--methods", "bp,scpl,gpipe"], quick=True)
    entries = list(main.entries_of(config, [2], [2, 4]))
    turns = {main.name_of(*turn): turn for turn in main.turns_of(entries, ["loopback"])}
    rates = {
        "bp x2": [1.0, 2.0], "scpl x2 loopback": [1.9, 4.0], "limit x2": [2.0, 4.0],
        "gpipe/2 x2 loopback": [1.0, 2.0], "gpipe/4 x2 loopback": [1.5, 2.5],
    }  # fmt: skip
    timing = Timing(1.0, 1, 1)
    measured = {
        name: Contender(Workers(name, ranks.serve, None), 1, rates=own, timings=[[timing]] * 2)
        for name, own in rates.items()
    }
    bench = main.Bench(SimpleNamespace(shares=(0.2, 0.1, 0.2)), None)
    assert bench._of_one([3.0, 9.0, 5.0]) == 4.0, "the slow one is not what others are measured by"
    results = [
        main.describe(*turns[name], measured, [], bench.machines.shares) for name in measured
    ]
    scpl = next(row for row in results if row["label"] == "scpl")
    assert scpl["to_one"]["median"] == pytest.approx(1.95)
    assert scpl["of_limit"]["median"] == pytest.approx(0.975)
    against = {row["against"]: row for row in main.comparisons(measured, turns)}
    assert [row["which"] for row in against.values()] == ["gpipe/4"] * 2
    assert against["gpipe"]["median"] == pytest.approx((1.9 / 1.5 + 4.0 / 2.5) / 2)
    check = [main.checked("machine 0", "of a core", 0.25, 0.24, 0.02)]
    found = {"check": check, "results": results, "failures": {}}
    text = "\n".join(tables.tables({**found, "comparisons": list(against.values())}))
    assert "| machine 0 | 0.25 of a core | 0.24 | -4.0 % | more than 2 % |" in text
    assert "| 2 | loopback | gpipe/4 | **2.00** (1.50 .. 2.50) | **1.38** (1.25 .. 1.50) |" in text
    assert not list(tables.plan_table(results)), "nothing was simulated"
    scpl["simulated"] = {"median": 1.9, "min": 1.8, "max": 2.1}
    compared = "\n".join(tables.plan_table(results))
    simulated = "**1.95** (1.90 .. 2.00) | **1.90** (1.80 .. 2.10) | -3 %"
    assert f"| 2 | loopback | scpl | {simulated} |" in compared
    assert "gpipe" not in compared
    tables.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def planned(slower):
    """What a machine measured on which all takes so many times as long."""
    unit = Unit(
        layers=("layer",), parameters=1, forward=slower, backward=2 * slower,
        forward_first=slower, backward_first=2 * slower, update=0.0, objective=0.0,
        objective_parameters=0, bytes_out=100, bytes_in=100, inputs=slower,
        held=Held(gradients=1000),
    )  # fmt: skip
    costs = Costs(("layer1",), (unit, unit), 16)
    costs_of_messages = MessageCosts(byte=0.01 * slower, added=0.0001 * slower)
    times = {"forward": slower / 2, "backward": slower}
    times |= {f"{name}_first": seconds for name, seconds in times.items()}
    half = replace(costs, units=(replace(unit, **times),) * 2)
    found = Measured("scpl", costs, {16: costs, 8: half}, messages=costs_of_messages)
    return ranks.Planned(1.0, 1, 1, measured=found)


def test_what_machines_plan_is_compared_with_what_they_do(main):
    """Messages were planned for the limit, which sends none, and by another clock than layers."""
    config = main.config_of(["--methods", "scpl,gpipe,ddp"], quick=True)
    plan, *entries = main.entries_of(config, [2], [2], plan=True)
    assert (plan.how, plan.num_machines) == ("planned", 2)
    by_name = {entry.name: entry for entry in entries}
    blocks = Contender(Workers("plan", ranks.serve, None), 1)
    ratios = {}
    for shares in ((0.4, 0.4), (0.2, 0.2)):
        blocks.timings = [[planned(1 / share) for share in shares]] * 3
        ratios[shares] = {
            name: list(main.simulated_ratios(entry, main.UNSHAPED, blocks, shares))
            for name, entry in by_name.items()
        }
    assert ratios[0.4, 0.4]["limit"] == [2.0] * 6, "each machine in each round"
    assert ratios[0.4, 0.4]["scpl"] == pytest.approx([6 / 4] * 6), "each sends or receives a second"
    assert 0 < ratios[0.4, 0.4]["gpipe/2"][0] < 6 / 4.5, "two micro-batches, and a bubble of one"
    assert 1 < ratios[0.4, 0.4]["ddp"][0] < 2
    assert ratios[0.2, 0.2] == {name: pytest.approx(own) for name, own in ratios[0.4, 0.4].items()}
    unequal = list(main.simulated_ratios(by_name["limit"], main.UNSHAPED, blocks, (0.2, 0.1)))
    assert unequal == [1.0] * 6, "the slow one is no faster with half than the fast one with all"
    with pytest.raises(ValueError, match="micro-batches"):
        main.measured_by(
            *main.read_arguments(["--plan", "--micro-batches", "7", "--", "--methods", "gpipe"])
        )


@pytest.mark.skipif(bool(machines.refusal()), reason="no machines can be emulated here")
def test_machines_are_held_to_their_shares_and_gone_afterwards():
    shares = [0.02, 0.01]  # so little that whatever else runs leaves it
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    with machines.Machines(shares) as made:
        root, parent = made.controller.root, made.folders[0].parent
        left = root / parent.name.replace(parent.name.rpartition("-")[2], str(killed.pid))
        (left / "0").mkdir(parents=True)  # as kill -9 leaves it
        got = made.measured_shares(1.0, range(2))
        assert all(folder.is_dir() for folder in (made.idle, *made.folders))
    assert all(share < 1.2 * wanted for share, wanted in zip(got, shares, strict=True)), got
    assert min(got) > 0
    assert not parent.exists()
    with machines.Machines(shares):
        assert not left.exists()


@pytest.mark.skipif(bool(links.refusal()), reason="no network namespaces can be made here")
def test_three_machines_reach_each_other_through_a_switch_at_the_speed_of_their_cables():
    with links.Cable(3) as cable:
        cable.shape("50mbit")
        speed = cable.speed(2, 1)
        limited = [*cable.ends, *cable._ports]
        assert len(limited) == 6
    assert 0 < speed < 1.2 * 50e6
