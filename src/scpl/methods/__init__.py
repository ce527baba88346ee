"""The methods: one file each."""

from scpl.methods.backpropagation import Backpropagation
from scpl.methods.base import Method, Site
from scpl.methods.early_exit import EarlyExit
from scpl.methods.supervised_contrastive import SCPL, HeadFactory

__all__ = ["METHODS", "SCPL", "Backpropagation", "EarlyExit", "HeadFactory", "Method", "Site"]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (SCPL, EarlyExit, Backpropagation)
}
