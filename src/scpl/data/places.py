"""Where data sets are looked for."""

from __future__ import annotations

import os
from pathlib import Path

from scpl.errors import DataError

__all__ = ["roots"]


def roots(data_dir: Path | None) -> list[Path]:
    """List the folders that may hold data sets: ``data_dir``, then that of ``SCPL_DATA``.

    Raises:
        DataError: ``data_dir`` does not exist.
    """
    if data_dir is not None and not data_dir.expanduser().is_dir():
        raise DataError("--data-dir must be an existing folder", f"Got {data_dir}")
    settings = [data_dir, os.environ.get("SCPL_DATA")]
    return list(dict.fromkeys(Path(setting).expanduser() for setting in settings if setting))
