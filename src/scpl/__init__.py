"""Train one network across several devices or machines without a backward pass between them.

The public names are loaded when they are first used, so that ``scpl --help`` need not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scpl.mesh import Mesh
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
    from scpl.objectives import Objective
    from scpl.partition import Partition, split
    from scpl.pipeline import Pipeline
    from scpl.scores import Evaluation, Scores
    from scpl.worker import Report

__version__ = "0.1.0"

_HOME = {
    "Mesh": "scpl.mesh",
    "DASCPL": "scpl.methods",
    "DGL": "scpl.methods",
    "SCPL": "scpl.methods",
    "AssociatedLearning": "scpl.methods",
    "Backpropagation": "scpl.methods",
    "DeInfoReg": "scpl.methods",
    "EarlyExit": "scpl.methods",
    "PredSim": "scpl.methods",
    "Method": "scpl.methods",
    "Objective": "scpl.objectives",
    "Partition": "scpl.partition",
    "split": "scpl.partition",
    "Evaluation": "scpl.scores",
    "Pipeline": "scpl.pipeline",
    "Scores": "scpl.scores",
    "Report": "scpl.worker",
}

__all__ = [
    "DASCPL",
    "DGL",
    "SCPL",
    "AssociatedLearning",
    "Backpropagation",
    "DeInfoReg",
    "EarlyExit",
    "Evaluation",
    "Mesh",
    "Method",
    "Objective",
    "Partition",
    "Pipeline",
    "PredSim",
    "Report",
    "Scores",
    "split",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'scpl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
