"""`scpl plan`, and `scpl train --balance measured`: cuts and shares of work by measurement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from scpl import models
from scpl.app.bench.bench import synthetic_batches, synthetic_data
from scpl.app.build import (
    build_loaders,
    build_method,
    build_network,
    build_partition,
    laid_out,
    optimizer_factory,
    precision_of,
)
from scpl.app.commands import PlanConfig
from scpl.app.config import RunConfig, TrainConfig
from scpl.app.environment import choose_device, describe_environment, set_threads, share_of_cores
from scpl.app.inputs.base import DataSummary, Loaders
from scpl.app.launch import is_rank
from scpl.data import is_here
from scpl.data.loader import Batch
from scpl.engine.costs import Costs, Plan, checked_speeds, in_columns
from scpl.engine.forecast import Forecast, Limit, Measured, forecasts, most_helpful, sizes
from scpl.engine.mesh import Mesh, group_sizes
from scpl.engine.planning import REPEATS, Kind, measurable, measure_parts, relative_speeds
from scpl.engine.ranks import Ranks
from scpl.engine.sending import measure_messages
from scpl.engine.stage import StageOptions
from scpl.errors import DataError, InputError
from scpl.methods import CutBackpropagation
from scpl.partition import Partition
from scpl.partition.balance import stages_per_rank
from scpl.runs import RunFolder
from scpl.simulation.machines import Link, Machine, MessageCosts

__all__ = ["balanced", "measure_all", "plan", "plan_text", "read_link", "simulated"]

_SYNTHETIC = "Measured on random data: the data set is not on this machine"


def plan(config: PlanConfig) -> dict[str, Any]:
    """Measure what the parts of a network cost on this machine, and plan a run by it.

    Nothing is written. With ``--cuts`` it says what these cost instead of choosing.

    Returns:
        With ``--machines`` what `simulated` says, with ``synthetic`` and ``environment``. Else
        ``plan`` and ``operations`` (that of the cuts a run has without measuring; None where it is
        not known), both as `scpl.engine.costs.Plan` with ``stages_per_process``,
        ``wait_share`` of each process and ``samples_per_second``; ``flags``, ``synthetic``,
        ``environment``.

    Raises:
        InputError: for bad settings.
        DataError: if the data set holds less than a mini-batch.
    """
    base = config.train
    config.check()
    links = [read_link(link) for link in config.link]
    if is_rank():
        raise InputError(
            "scpl plan must be one process, which plans for --processes",
            "It was started by torchrun",
            "Start it without torchrun",
        )
    threads = set_threads(base.run.threads, base.run.processes)
    synthetic = not is_here(base.data.data, base.data.data_dir)
    if synthetic:
        data, initial = synthetic_data(base), {}
        batch = synthetic_batches(base, data)[0]
    else:
        loaders = build_loaders(base)
        data, initial = DataSummary.of(loaders), loaders.initial()
        batch = _first_batch(loaders)
    environment = describe_environment(choose_device(base.run.device), threads)
    if config.machines:
        found = simulated(config, links, measure_all(base, data, batch, initial))
        return {**found, "synthetic": synthetic, "environment": environment}
    ranks, speeds = _groups(base)
    costs, counts = _measure(base, data, batch, initial), base.run.stages_per_process or None
    default = _by_operations(base, data, initial, costs)
    if not base.network.cuts:
        chosen = costs.plan(base.network.num_stages, ranks, speeds)
    elif default is not None:
        chosen, default = default, None
    else:
        chosen = costs.at(base.network.cuts, counts, speeds)
    return {
        "plan": _described(chosen),
        "operations": default and _described(default),
        "flags": " ".join(_flags(chosen.cuts, chosen.stages_per_rank, base.run)),
        "synthetic": synthetic,
        "environment": environment,
    }


def simulated(config: PlanConfig, links: Sequence[Link], measured: Measured) -> dict[str, Any]:
    """Simulate training on each of the numbers of machines.

    Args:
        config: How many there are, and how fast.
        links: One for all of them, or one for each.
        measured: What the network costs.

    Returns:
        ``messages``: what these cost, as `scpl.simulation.machines.MessageCosts`; ``simulated``:
        for each number ``machines``, ``link``, ``speeds``, ``forecasts`` (each as
        `scpl.engine.forecast.Forecast` with ``ratio`` to one machine), ``flags`` of the local
        method, ``helpful_machines``, ``reason`` why not more, and the ``answer``.
    """
    most = max(config.machines)
    links = links if len(links) > 1 else [*links] * most
    speeds = config.train.run.speeds or (1.0,) * most
    machines = [
        Machine(speed, link, measured.messages) for speed, link in zip(speeds, links, strict=True)
    ]
    found = []
    for count in config.machines:
        given = machines[:count]
        each, limit = forecasts(measured, given), most_helpful(measured, given)
        alone = each[-1].samples_per_second
        ratios = {one.method: one.samples_per_second / alone for one in each}
        said = config.link if len(config.link) == 1 else config.link[:count]
        found.append(
            {
                "machines": count,
                "link": said,
                "speeds": speeds[:count],
                "forecasts": [{**one.to_json(), "ratio": ratios[one.method]} for one in each],
                "flags": " ".join(_flags_of(each)),
                "helpful_machines": limit.num_machines,
                "reason": limit.reason,
                "answer": _answer(given, said, each, limit),
            }
        )
    return {"simulated": found, "messages": asdict(measured.messages)}


def _flags_of(each: Sequence[Forecast]) -> list[str]:
    """Those of the local method, with replicas where these make it faster."""
    best = next((one for one in each if one.replicas), each[0])
    if not best.replicas:
        return _flags(best.cuts, best.stages_per_machine)
    replicas = RunConfig(processes=best.num_machines, replicas=best.replicas)
    return _flags(best.cuts, best.stages_per_machine, replicas)


def _answer(
    machines: Sequence[Machine], link: Sequence[str], each: Sequence[Forecast], limit: Limit
) -> str:
    """What to know of all the numbers, in one sentence."""
    alone = each[-1].samples_per_second
    speeds = [f"{one.method} {one.samples_per_second / alone:.2f} x" for one in each[:-1]]
    speeds[0] += " one machine with bp"
    name = "1 machine" if len(machines) == 1 else f"{len(machines)} machines"
    if len({machine.speed for machine in machines}) > 1:
        name += f" of speeds {' '.join(f'{machine.speed:g}' for machine in machines)}"
    text = f"{name} on {' '.join(link)}, simulated: {', '.join(speeds)}"
    plain = each[0].method
    if any(one.replicas for one in each):
        plain += " without replicas"
    if limit.reason:
        return f"{text}; more than {limit.num_machines} do not help {plain}, because {limit.reason}"
    return f"{text}; all of them help {plain}"


_LINK = re.compile(r"(\d+(?:\.\d+)?)([kmg])bit(?:,(\d+(?:\.\d+)?)(us|ms|s))?")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_LOOPBACK, _LATENCY = Link(1e9, 5e-5), 1e-4
_PAYLOAD = 1448 / 1514
"""What of a full Ethernet frame is not headers."""


def read_link(text: str) -> Link:
    """Read a value of ``--link``.

    Raises:
        InputError: if it is none.
    """
    if text == "loopback":
        return _LOOPBACK
    found = _LINK.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise InputError(
            "--link must be a rate above 0, with a latency or without, or loopback",
            f"Got {text!r}",
            "For instance 200mbit, 1gbit or 10gbit,0.05ms",
        )
    rate, unit, latency, scale = found.groups()
    return Link(
        float(rate) * _UNITS[unit] / 8 * _PAYLOAD,
        float(latency) * _UNITS[scale] if latency else _LATENCY,
    )


def _simulated_text(found: Mapping[str, Any]) -> list[str]:
    """A table for each number of machines."""
    lines = ["Simulated from times that were measured on this machine alone:"]
    head = (
        "method", "machines", "micro-batches", "samples/s", "x one", "wait", "sends/step", "memory",
        "parameters", "gradients", "optimizer", "activations",
    )  # fmt: skip
    for each in found["simulated"]:
        lines.append("")
        rows = [head]
        for one in each["forecasts"]:
            parts = ("parameters", "gradients", "optimizer", "activations")
            memory = max(one["memory"], key=lambda held: sum(held.values()))
            waits = one["wait_shares"]
            rows.append(
                (
                    one["method"],
                    "+".join(map(str, one["replicas"])) or str(one["num_machines"]),
                    str(one["micro_batches"]) if one["micro_batches"] > 1 else "-",
                    f"{one['samples_per_second']:,.1f}",
                    f"{one['ratio']:.2f}",
                    f"{100 * sum(waits) / len(waits):.0f} %",
                    *(
                        f"{num / 1e6:,.2f} MB"
                        for num in (
                            max(one["bytes_sent"]), sum(memory.values()), *map(memory.get, parts)
                        )
                    ),
                )
            )  # fmt: skip
        lines += in_columns(rows, left=(0,))
        cuts = {one["method"]: " ".join(one["cuts"]) for one in each["forecasts"] if one["cuts"]}
        for text in dict.fromkeys(cuts.values()):
            names = ", ".join(method for method, own in cuts.items() if own == text)
            lines.append(f"Cuts of {names}: {text}")
        lines += [f"Use it with: {each['flags']}", f"{each['answer']}."]
    lines.append("wait is the mean of all machines; sends/step and memory are those of the largest")
    return lines


def plan_text(found: Mapping[str, Any]) -> str:
    """Write what `plan` found for people."""
    if "simulated" in found:
        lines = _simulated_text(found)
        if found["synthetic"]:
            lines.append(_SYNTHETIC)
        return "\n".join(lines) + "\n"
    lines = [str(Plan.from_json(found["plan"]))]
    if found["operations"]:
        waits = ", ".join(f"{100 * share:.0f} %" for share in found["operations"]["wait_share"])
        speed = found["operations"]["samples_per_second"]
        cuts = " ".join(found["operations"]["cuts"])
        lines.append(
            f"Without measuring: cuts {cuts or '-'}, {speed:,.0f} samples/s, processes wait {waits}"
        )
    if found["synthetic"]:
        lines.append(_SYNTHETIC)
    lines.append(f"Use it with: {found['flags']}")
    return "\n".join(lines) + "\n"


def balanced(
    config: TrainConfig, ranks: Ranks, data: DataSummary, loaders: Loaders | None
) -> tuple[TrainConfig, Plan | None]:
    """Choose the cuts of a run by measurement if that is wished; every rank calls it.

    The first rank measures, with the run's own data, and all get its choice. It becomes part of the
    configuration, so that the run can be resumed and repeated with the same cuts.

    How fast each rank is beside the first is given by ``--speeds``, or timed.

    Returns:
        The configuration with cuts, and the plan; None if nothing was measured.

    Raises:
        DataError: if the data set holds less than a mini-batch.
        InputError: if there is not one speed for each rank.
    """
    if config.network.balance == "operations":
        return config, None
    checked_speeds(config.run.speeds, config.run.processes)
    resumed = config.run.resume is not None
    speeds = config.run.speeds or (() if resumed else relative_speeds(ranks))
    if ranks.mesh.is_first:
        assert loaders is not None, "the first rank reads the data"
        if resumed:
            assert config.run.resume is not None
            kept = TrainConfig.read(RunFolder.open(config.run.resume).config)
            hosted = kept.run.stages_per_process
            ranks.share("balance", {"cuts": kept.network.cuts, "hosted": hosted})
        else:
            costs = _measure(config, data, _first_batch(loaders), loaders.initial())
            mesh = ranks.mesh
            pace = speeds if mesh.replicas is None else mesh.group_speeds(speeds)
            found = costs.plan(config.network.num_stages, mesh.num_groups, pace)
            # One number for each process: of one process, or of one stage each, there is no choice.
            several = 1 < found.num_ranks < len(found.stages)
            hosted = found.stages_per_rank if several else ()
            ranks.share("balance", {"cuts": found.cuts, "hosted": hosted, "plan": found.to_json()})
    shared = ranks.fetch("balance")
    cuts, hosted = tuple(shared["cuts"]), tuple(shared["hosted"])
    config = config.changed(balance="operations", speeds=(), cuts=cuts, stages_per_process=hosted)
    if len(hosted) == ranks.mesh.num_groups:  # they met before it was known who hosts what
        ranks.mesh = replace(ranks.mesh, stages_per_rank=hosted)
    return config, Plan.from_json(shared["plan"]) if "plan" in shared else None


def _first_batch(loaders: Loaders) -> Batch:
    for inputs, target in loaders.train:
        return inputs, target
    raise DataError("A plan needs at least one mini-batch", "Got no training samples")


def _measure(
    config: TrainConfig, data: DataSummary, batch: Batch, initial: Mapping[str, Any]
) -> Costs:
    """What the parts of the network cost with the heads of the method."""
    parts = _parts(config, data, batch, initial, config.network.num_stages)
    kind = Kind(build_method(config.suited, config.rows))
    return _measure_kinds(config, parts, [kind], batch)[0]


def measure_all(
    config: TrainConfig,
    data: DataSummary,
    batch: Batch,
    initial: Mapping[str, Any],
    repeats: int = REPEATS,
) -> Measured:
    """Measure what the parts of the network cost, for `simulated`.

    Args:
        config: The settings of a run.
        data: What its data is like.
        batch: A mini-batch of full size.
        initial: What its network begins with.
        repeats: How often each part has its turn.

    Returns:
        Costs with the heads of the method, and without heads in mini-batches of several sizes.
    """
    fixed = config.network.cuts or config.network.stages
    stages = config.network.num_stages if fixed else None
    parts = _parts(config, data, batch, initial, stages or 1)
    rows = sizes(len(batch[1]))
    local, *others = _measure_kinds(
        config,
        parts,
        [
            Kind(build_method(config.suited, config.rows)),
            *(Kind(CutBackpropagation(), own, halves=True) for own in rows),
        ],
        batch,
        repeats,
    )
    whole = dict(zip(rows, others, strict=True))
    if config.network.cuts:
        local = local.joined(config.network.cuts)
        whole = {rows: costs.joined(config.network.cuts) for rows, costs in whole.items()}
    # Of several cores one has time for messages, and a host has while its accelerator computes.
    busy = share_of_cores(1) == 1 and choose_device(config.run.device).type == "cpu"
    messages = measure_messages() if busy else MessageCosts()
    return Measured(config.method.method, local, whole, config.run.depth, stages, messages)


def _parts(
    config: TrainConfig,
    data: DataSummary,
    batch: Batch,
    initial: Mapping[str, Any],
    num_stages: int,
) -> Partition:
    network = build_network(config, data.inputs, data.num_classes, initial)
    device = choose_device(config.run.device)
    return measurable(
        laid_out(network, device, precision_of(config).compute),
        num_stages=num_stages,
        batch=batch,
        readout=models.readout(config.network.model),
        task=data.task,
    )


def _measure_kinds(
    config: TrainConfig,
    parts: Partition,
    kinds: Sequence[Kind],
    batch: Batch,
    repeats: int = REPEATS,
) -> list[Costs]:
    options = StageOptions(
        optimizer_factory(config),
        clip_norm=config.chosen.clip_norm or None,
        precision=precision_of(config),
    )
    device = choose_device(config.run.device)
    found = measure_parts(parts, kinds, options, batch=batch, device=device, repeats=repeats)
    return [replace(each, num_samples=each.num_samples // config.data.views) for each in found]


def _by_operations(
    config: TrainConfig, data: DataSummary, initial: Mapping[str, Any], costs: Costs
) -> Plan | None:
    """What a run without measuring would cost; None if it cuts elsewhere than was measured."""
    parts = build_partition(config, data.inputs, data.num_classes, initial, task=data.task)
    counts = config.run.stages_per_process
    if not counts:
        mesh = _mesh(config.run)
        counts = stages_per_rank(parts.costs, mesh.num_groups, mesh.group_speeds(()))
    try:
        return costs.at(parts.cuts, counts, _groups(config)[1])
    except InputError:
        return None


def _groups(config: TrainConfig) -> tuple[int, tuple[float, ...]]:
    """How many processes, or groups of replicas, host stages of their own, and how fast they are.

    Raises:
        InputError: if there is not one speed for each process.
    """
    checked_speeds(config.run.speeds, config.run.processes)
    mesh = _mesh(config.run)
    return mesh.num_groups, mesh.group_speeds(config.run.speeds)


def _mesh(run: RunConfig) -> Mesh:
    groups = group_sizes(run.replicas, run.processes) if run.replicas else None
    return Mesh(0, run.processes, replicas=groups)


def _described(plan: Plan) -> dict[str, Any]:
    return {
        **plan.to_json(),
        "stages_per_process": plan.stages_per_rank,
        "wait_share": plan.wait_shares,
        "samples_per_second": plan.samples_per_second,
    }


def _flags(
    cuts: Sequence[str], stages_per_process: Sequence[int], run: RunConfig | None = None
) -> list[str]:
    """The flags of a run that is as planned, with the replicas that were given."""
    flags = ["--cuts", *cuts] if cuts else ["--stages", "1"]
    processes = len(stages_per_process)
    if run is not None and run.replicas:
        flags += ["--processes", str(run.processes), "--replicas", *map(str, run.replicas)]
    elif processes > 1:
        flags += ["--processes", str(processes)]
    if 1 < processes < sum(stages_per_process):
        flags += ["--stages-per-process", *map(str, stages_per_process)]
    return flags
