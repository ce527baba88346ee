"""The checks by theme; importing this package enters them into the registry `CHECKS`."""

from checks import hot_loop, numbers, ranks, same_bits, saving  # noqa: F401 (in the table's order)
from checks.base import CHECKS, Check, Skipped

__all__ = ["CHECKS", "Check", "Skipped"]
