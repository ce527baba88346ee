"""The checks by theme; importing this package enters them into the registry `CHECKS`."""

# isort: off
# Rows come in this order.
from checks.base import CHECKS, Check, Skipped
from checks import numbers, same_bits, saving, hot_loop, ranks  # noqa: F401

__all__ = ["CHECKS", "Check", "Skipped"]
