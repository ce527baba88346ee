"""Build what one rank works with: which stages it hosts, the stages, and their trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from scpl.engine.channel import Distributor, Outbox
from scpl.engine.mesh import Mesh
from scpl.engine.randomness import RandomState
from scpl.engine.ranks import ManyRanks, Ranks
from scpl.engine.stage import Stage, StageOptions
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.base import Trainer
from scpl.engine.trainers.replicas import ReplicaTrainer
from scpl.engine.trainers.shared import SharedStreamTrainer
from scpl.engine.trainers.stream import StreamTrainer
from scpl.errors import InputError
from scpl.methods import CutBackpropagation, DataParallel
from scpl.methods.base import Method, Nothing, Objective, Site
from scpl.partition import Partition
from scpl.partition.balance import stages_per_rank
from scpl.seeding import derive_seed
from scpl.tasks import Task

__all__ = ["assign", "build_objective", "build_stages", "build_trainer"]


def assign(method: Method, mesh: Mesh, parts: Partition) -> tuple[range, list[int]]:
    """Decide who holds what.

    If the mesh does not say, ranks get stages of about equal cost.

    Returns:
        The stages that this rank holds, and for each stage the rank that saves and exports it.

    Raises:
        InputError: if the method cannot train on these ranks.
    """
    if method.layout == "one" and mesh.num_ranks > 1:
        raise InputError(
            f"{method.name} trains on one process",
            f"Got {mesh.num_ranks}",
            "Start one process, or use bp-cut, gpipe, 1f1b or ddp",
        )
    if method.layout != "one" and not method.cuts_gradients and mesh.num_ranks == 1:
        raise InputError(
            f"{method.name} needs at least two processes",
            "Got one",
            "Start several, for instance with torchrun, or use bp",
        )
    num_stages = parts.num_stages
    if mesh.replicas is not None and not (method.cuts_gradients and method.layout == "stages"):
        raise InputError(
            "`replicas` need stages that learn from objectives of their own",
            f"Got {method.name}, where gradients cross the cuts",
            "Leave them out, or use such a method, for instance scpl",
        )
    if method.layout == "replicas":
        return range(num_stages), [0] * num_stages
    if mesh.stages_per_rank is None and mesh.num_groups <= num_stages:
        hosted = stages_per_rank(parts.costs, mesh.num_groups, mesh.group_speeds(()))
        mesh = replace(mesh, stages_per_rank=hosted)
    return mesh.hosted(num_stages), mesh.owners(num_stages)


def build_trainer(
    method: Method,
    stages: Sequence[Stage],
    outbox: Outbox,
    timeline: Timeline,
    *,
    ranks: Ranks,
    options: StageOptions,
    task: Task,
    seed: int,
) -> Trainer:
    """Build what turns batches into updates of a rank's stages.

    Args:
        method: Decides how gradients go.
        stages: Consecutive stages, in order.
        outbox: Where messages go on.
        timeline: Where the trainer records what it does when.
        ranks: The ranks.
        options: How stages learn.
        task: What the network's outputs mean.
        seed: Seed of what is drawn in training.

    Raises:
        InputError: if it cannot train in this precision, or not with CUDA graphs.
    """
    graphs = bool(options.cuda_graphs)
    if graphs and (reason := _no_graphs(method, ranks)):
        if options.cuda_graphs != "auto":
            raise reason
        graphs = False
    if isinstance(ranks, ManyRanks) and isinstance(method, CutBackpropagation):
        if ranks.staged:
            raise InputError(
                "A schedule needs NCCL to send tensors between CUDA devices",
                f"Got {method.name} over gloo",
                "Give every process a GPU of its own, or use another method",
            )
        if options.precision.compute == torch.float16:
            raise InputError(
                "To compute in float16, a method must scale losses, which schedules do not",
                f"Got {method.name} with `precision` float16",
                "Use bfloat16, or another method",
            )
        # Torch's pipelining takes more than a second to import, so only who needs it waits.
        from scpl.engine.trainers.schedule import ScheduleTrainer

        return ScheduleTrainer(
            stages,
            outbox,
            timeline,
            method=method,
            ranks=ranks,
            clip_norm=options.clip_norm,
            precision=options.precision,
            task=task,
        )
    if isinstance(ranks, ManyRanks) and isinstance(method, DataParallel):
        return ReplicaTrainer(
            stages,
            outbox,
            timeline,
            method=method,
            ranks=ranks,
            seed=seed,
            clip_norm=options.clip_norm,
        )
    if isinstance(ranks, ManyRanks) and isinstance(outbox, Distributor):
        return SharedStreamTrainer(stages, outbox, timeline, ranks=ranks, seed=seed)
    if not graphs:
        return StreamTrainer(stages, outbox, timeline)
    from scpl.engine.trainers.captured import CapturedTrainer, CudaLane

    return CapturedTrainer(
        stages,
        outbox,
        timeline,
        lane=lambda: CudaLane.current(ranks.device),
        new_lane=lambda: CudaLane.new(ranks.device),
        may_fail=options.cuda_graphs == "auto",
    )


def _no_graphs(method: Method, ranks: Ranks) -> InputError | None:
    """Say why steps cannot be recorded here; None if they can."""
    if ranks.device.type != "cuda":
        return InputError(
            "`cuda_graphs` need a CUDA device", f"Got {ranks.device}", "Leave `cuda_graphs` out"
        )
    mesh = ranks.mesh
    if (
        method.layout == "replicas"
        or mesh.replicas is not None
        or (mesh.num_ranks > 1 and not method.cuts_gradients)
    ):
        return InputError(
            "`cuda_graphs` need stages that learn by themselves, or bp on one process",
            f"Got {method.name}" + (" with `replicas`" if mesh.replicas is not None else ""),
            "Leave `cuda_graphs` out",
        )
    return None


def build_stages(
    parts: Partition,
    method: Method,
    options: StageOptions,
    hosted: Iterable[int],
    *,
    seed: int,
    device: torch.device,
) -> list[Stage]:
    """Build the stages that one rank hosts.

    What a stage draws depends on the seed and its index, not on which others are built here.

    Args:
        parts: The partitioned network.
        method: Which objective each stage gets.
        options: How stages learn.
        hosted: Which stages to build.
        seed: Seed of the objectives' parameters and of the stages' random state.
        device: Where they compute.

    Raises:
        InputError: if network, method and options do not fit together.
    """
    _check_factory("optimizer", options.optimizer)
    parts.task.check_outputs(parts.num_outputs)
    send_as = options.precision.send_as
    # Schedules send gradients back in the same type, and there are none in whole numbers.
    sends = method.cuts_gradients or (method.layout == "stages" and send_as != torch.int8)
    if send_as is not None and not sends:
        raise InputError(
            "`send_as` must go with a method whose stages learn from objectives of their own, or, "
            "in 16 bits, with a schedule",
            f"Got {send_as} for {method.name}",
            "Leave it out, or use such a method, for instance scpl",
        )
    keys = {id(parameter): name for name, parameter in parts.model.named_parameters()}
    if not any(parameter.requires_grad for parameter in parts.model.parameters()):
        raise InputError(
            "The network must have a parameter that learns",
            "All of them are frozen",
            "Call requires_grad_() on those that shall learn",
        )
    return [
        Stage(
            index,
            parts.bodies[index],
            parts.names[index],
            build_objective(parts, method, index, seed),
            options,
            keys=keys,
            seed=derive_seed(seed, "stage", index),
            device=device,
        )
        for index in hosted
    ]


def _check_factory(name: str, value: object) -> None:
    """Catch the commonest slip: an optimizer instead of a way to build one."""
    if not callable(value):
        raise InputError(
            f"`{name}` must be a function of a stage's parameters",
            f"Got a {type(value).__name__}",
            "Pass for instance lambda params: torch.optim.Adam(params, lr=1e-3)",
        )


def build_objective(parts: Partition, method: Method, index: int, seed: int) -> Objective:
    """Build the objective of one stage; its weights depend on the seed and its index.

    A stage without a parameter that learns gets none, unless it is the last one or later objectives
    build on it: a head would learn, and nobody would use it. Weights are made in the type of what
    the objective reads.

    Raises:
        InputError: if the method cannot learn what the outputs mean.
    """
    if parts.task.kind not in method.tasks:
        raise InputError(
            f"{method.name} learns {' or '.join(method.tasks)}",
            f"Got a network for {parts.task.kind}",
            "Choose another method, for instance scpl",
        )
    is_last = index == parts.num_stages - 1
    is_frozen = not any(p.requires_grad for p in parts.bodies[index].parameters())
    if is_frozen and not is_last and not method.links_objectives:
        return Nothing()
    readout = parts.readout if is_last else None
    site = Site(
        index,
        parts.num_stages,
        parts.num_outputs,
        parts.feature_shapes[index],
        readout,
        parts.readings[index],
        parts.following[index],
        parts.task,
    )
    random = RandomState(derive_seed(seed, "objective", index), torch.device("cpu"))
    with random.active(), _default_type(parts.feature_types[index]):
        return method.objective(site)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """Let new modules be of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
