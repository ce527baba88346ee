"""`scpl plan`, and `scpl train --balance measured`: cuts and shares of work by measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from scpl.app.config import PlanConfig, TrainConfig
from scpl.app.environment import choose_device, describe_environment, set_threads
from scpl.app.inputs.base import DataSummary, Loaders
from scpl.app.launch import is_rank
from scpl.data import is_here
from scpl.data.loader import Batch
from scpl.engine.planning import Costs, Plan, checked_speeds, measure, relative_speeds
from scpl.engine.ranks import Ranks
from scpl.engine.stage import StageOptions
from scpl.errors import DataError, InputError
from scpl.partition.balance import stages_per_rank
from scpl.runs import RunFolder

__all__ = ["balanced", "plan", "plan_text"]


def plan(config: PlanConfig) -> dict[str, Any]:
    """Measure what the parts of a network cost on this machine, and plan a run by it.

    Nothing is written. With ``--cuts`` it says what these cost instead of choosing.

    Returns:
        ``plan`` and ``operations`` (that of the cuts a run has without measuring; None where it is
        not known), both as `scpl.engine.planning.Plan` with ``stages_per_process``,
        ``wait_share`` of each process and ``samples_per_second``; ``flags``, ``synthetic``,
        ``environment``.

    Raises:
        InputError: for bad settings.
        DataError: if the data set holds less than a mini-batch.
    """
    base = config.train
    config.check()
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
    costs = _measure(base, data, batch, initial)
    ranks, counts = base.run.processes, base.run.stages_per_process or None
    default = _by_operations(base, data, initial, costs)
    if not base.network.cuts:
        chosen = costs.plan(base.network.num_stages, ranks)
    elif default is not None:
        chosen, default = default, None
    else:
        chosen = costs.at(base.network.cuts, counts)
    return {
        "plan": _described(chosen),
        "operations": default and _described(default),
        "flags": " ".join(_flags(base, chosen)),
        "synthetic": synthetic,
        "environment": describe_environment(choose_device(base.run.device), threads),
    }


def plan_text(found: Mapping[str, Any]) -> str:
    """Write what `plan` found for people."""
    lines = [str(Plan.from_json(found["plan"]))]
    if found["operations"]:
        waits = ", ".join(f"{100 * share:.0f} %" for share in found["operations"]["wait_share"])
        speed = found["operations"]["samples_per_second"]
        cuts = " ".join(found["operations"]["cuts"])
        lines.append(
            f"Without measuring: cuts {cuts or '-'}, {speed:,.0f} samples/s, processes wait {waits}"
        )
    if found["synthetic"]:
        lines.append("Measured on random data: the data set is not on this machine")
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
            found = costs.plan(config.network.num_stages, config.run.processes, speeds)
            # One number for each process: of one process, or of one stage each, there is no choice.
            several = 1 < found.num_ranks < len(found.stages)
            hosted = found.stages_per_rank if several else ()
            ranks.share("balance", {"cuts": found.cuts, "hosted": hosted, "plan": found.to_json()})
    shared = ranks.fetch("balance")
    cuts, hosted = tuple(shared["cuts"]), tuple(shared["hosted"])
    config = config.changed(balance="operations", speeds=(), cuts=cuts, stages_per_process=hosted)
    if len(hosted) == ranks.mesh.num_ranks:  # they met before it was known who hosts what
        ranks.mesh = replace(ranks.mesh, stages_per_rank=hosted)
    return config, Plan.from_json(shared["plan"]) if "plan" in shared else None


def _first_batch(loaders: Loaders) -> Batch:
    for inputs, target in loaders.train:
        return inputs, target
    raise DataError("A plan needs at least one mini-batch", "Got no training samples")


def _measure(
    config: TrainConfig, data: DataSummary, batch: Batch, initial: Mapping[str, Any]
) -> Costs:
    options = StageOptions(
        optimizer_factory(config),
        clip_norm=config.chosen.clip_norm or None,
        precision=precision_of(config),
    )
    device = choose_device(config.run.device)
    costs = measure(
        laid_out(
            build_network(config, data.inputs, data.num_classes, initial),
            device,
            precision_of(config).compute,
        ),
        build_method(config.suited, config.rows),
        options,
        num_stages=config.network.num_stages,
        batch=batch,
        device=device,
        readout=models.readout(config.network.model),
        task=data.task,
    )
    return replace(costs, num_samples=costs.num_samples // config.data.views)


def _by_operations(
    config: TrainConfig, data: DataSummary, initial: Mapping[str, Any], costs: Costs
) -> Plan | None:
    """What a run without measuring would cost; None if it cuts elsewhere than was measured."""
    parts = build_partition(config, data.inputs, data.num_classes, initial, task=data.task)
    counts = config.run.stages_per_process or stages_per_rank(parts.costs, config.run.processes)
    try:
        return costs.at(parts.cuts, counts)
    except InputError:
        return None


def _described(plan: Plan) -> dict[str, Any]:
    return {
        **plan.to_json(),
        "stages_per_process": plan.stages_per_rank,
        "wait_share": plan.wait_shares,
        "samples_per_second": plan.samples_per_second,
    }


def _flags(config: TrainConfig, plan: Plan) -> list[str]:
    flags = ["--cuts", *plan.cuts] if plan.cuts else ["--stages", "1"]
    if config.run.processes > 1:
        flags += ["--processes", str(config.run.processes)]
    if 1 < config.run.processes < len(plan.stages):
        flags += ["--stages-per-process", *map(str, plan.stages_per_rank)]
    return flags
