"""The methods: one file each."""

from scpl.methods.backpropagation import (
    Backpropagation,
    CutBackpropagation,
    DataParallel,
    GPipe,
    MicroBatched,
    OneForwardOneBackward,
    WideBackpropagation,
    ZeroBubble,
)
from scpl.methods.base import Layout, Method, Site
from scpl.methods.early_exit import EarlyExit
from scpl.methods.supervised_contrastive import SCPL, HeadFactory

__all__ = [
    "METHODS",
    "SCPL",
    "Backpropagation",
    "CutBackpropagation",
    "DataParallel",
    "EarlyExit",
    "GPipe",
    "HeadFactory",
    "Layout",
    "Method",
    "MicroBatched",
    "OneForwardOneBackward",
    "Site",
    "WideBackpropagation",
    "ZeroBubble",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SCPL,
        EarlyExit,
        Backpropagation,
        WideBackpropagation,
        CutBackpropagation,
        GPipe,
        OneForwardOneBackward,
        ZeroBubble,
        DataParallel,
    )
}
