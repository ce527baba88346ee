"""Data sets: known ones, and the user's own images and texts.

``images/`` and ``text/`` know nothing of each other; what both need stands beside them.
May import: errors, tasks.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_here"]


def is_here(name: str, data_dir: Path | None = None) -> bool:
    """Whether a known data set lies on this machine; what is not known is for loading to judge.

    Raises:
        DataError: ``data_dir`` does not exist, or a shard is missing.
    """
    from scpl.data.images.load import locate as locate_images
    from scpl.data.known import IMAGE_SETS, TEXT_SETS, roots
    from scpl.data.text.splits import locate as locate_texts

    if name in TEXT_SETS:
        return any(locate_texts(root, name) for root in roots(data_dir))
    return name not in IMAGE_SETS or any(locate_images(root, name) for root in roots(data_dir))
