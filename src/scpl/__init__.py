"""Train one network across several devices or machines without a backward pass between them.

The public names are loaded when they are first used, so that ``scpl --help`` need not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scpl.engine.checkpoint import Checkpoints
    from scpl.engine.costs import Plan
    from scpl.engine.parameters import StageParameters
    from scpl.engine.planning import plan
    from scpl.engine.precision import Precision
    from scpl.engine.ranks import connect
    from scpl.engine.scores import Evaluation, Scores
    from scpl.engine.worker import Report
    from scpl.methods import (
        DASCPL,
        DGL,
        SCPL,
        AssociatedLearning,
        Backpropagation,
        DeInfoReg,
        EarlyExit,
        Method,
        PredSim,
    )
    from scpl.methods.base import Objective
    from scpl.partition import Partition, split
    from scpl.pipeline import Pipeline
    from scpl.tasks import Classes, MultiLabel, Regression, Task

__version__ = "0.1.0"

_HOME = {
    "Checkpoints": "scpl.engine.checkpoint",
    "Precision": "scpl.engine.precision",
    "StageParameters": "scpl.engine.parameters",
    "connect": "scpl.engine.ranks",
    "Plan": "scpl.engine.costs",
    "plan": "scpl.engine.planning",
    "DASCPL": "scpl.methods",
    "DGL": "scpl.methods",
    "SCPL": "scpl.methods",
    "AssociatedLearning": "scpl.methods",
    "Backpropagation": "scpl.methods",
    "DeInfoReg": "scpl.methods",
    "EarlyExit": "scpl.methods",
    "PredSim": "scpl.methods",
    "Method": "scpl.methods",
    "Objective": "scpl.methods.base",
    "Partition": "scpl.partition",
    "split": "scpl.partition",
    "Evaluation": "scpl.engine.scores",
    "Pipeline": "scpl.pipeline",
    "Scores": "scpl.engine.scores",
    "Report": "scpl.engine.worker",
    "Classes": "scpl.tasks",
    "MultiLabel": "scpl.tasks",
    "Regression": "scpl.tasks",
    "Task": "scpl.tasks",
}

__all__ = [
    "DASCPL",
    "DGL",
    "SCPL",
    "AssociatedLearning",
    "Backpropagation",
    "Checkpoints",
    "Classes",
    "DeInfoReg",
    "EarlyExit",
    "Evaluation",
    "Method",
    "MultiLabel",
    "Objective",
    "Partition",
    "Pipeline",
    "Plan",
    "Precision",
    "PredSim",
    "Regression",
    "Report",
    "Scores",
    "StageParameters",
    "Task",
    "connect",
    "plan",
    "split",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'scpl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
