"""Data sets from the Hugging Face hub, kept in its own cache folder (``HF_HOME``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from scpl.data.extras import require
from scpl.errors import DataError, InputError

__all__ = ["fetch"]

_log = logging.getLogger(__name__)

_PATTERNS = ("*.parquet", "**/*.parquet")
_TIMEOUT_SECONDS = 5.0  # for the question whether something newer exists, not for the download


def fetch(repo: str, name: str, advice: str, patterns: Sequence[str] = _PATTERNS) -> Path:
    """Download the parquet files of a data set, or find them where they were downloaded before.

    Args:
        repo: The repository on the hub, e.g. ``"uoft-cs/cifar10"``.
        name: Name of the data set, for messages.
        advice: What the user can do if the download fails.
        patterns: Which files; by default all parquet files.

    Returns:
        The folder with the files.

    Raises:
        DataError: huggingface_hub is not installed, there is no network, or the download failed.
    """
    rule = f"the data set {name} must be on this machine or be downloadable from {repo}"
    try:
        hub = require("huggingface_hub", "hub", "Downloading")
    except InputError as error:
        raise DataError(rule, error.got, f"{advice}; or: pip install 'scpl[hub]'") from error
    _log.info("getting %s from the Hugging Face hub (%s)", name, repo)
    try:
        folder = hub.snapshot_download(
            repo, repo_type="dataset", allow_patterns=list(patterns), etag_timeout=_TIMEOUT_SECONDS
        )
    except Exception as error:  # its errors have no common base: OSError, ValueError, httpx's own
        reason = str(error).strip().partition("\n")[0]
        got = f"The download failed: {type(error).__name__}: {reason}"
        raise DataError(rule, got, advice) from error
    return Path(folder)
