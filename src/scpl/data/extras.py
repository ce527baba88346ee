"""Import of optional packages, at the moment they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from scpl.errors import InputError

__all__ = ["import_extra"]


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import ``module``, or raise InputError: ``purpose`` needs it, ``extra`` installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs the package {module.partition('.')[0]!r}",
            f"It cannot be imported: {error}",
            f"Install it with: pip install 'scpl[{extra}]'",
        ) from error
