"""Decoded images kept on disk, so that the next run does not decode them again.

Decoding 60,000 small JPEGs takes seconds, reading them back a fraction of one. The cache is an aid
and never a reason to fail: a missing, damaged or unwritable one means decoding, nothing else. It
lives in ``$SCPL_CACHE``, else ``~/.cache/scpl``; ``SCPL_CACHE=off`` turns it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from scpl.data.extras import require

__all__ = ["remember"]

_log = logging.getLogger(__name__)

_FORMAT = "1"  # raise it when the same files decode to other bytes than before
_MIN_IMAGES = 5000  # fewer decode in less than a second


def remember(
    files: Sequence[Path], image_size: int | None, num_images: int, decode: Callable[[], Tensor]
) -> Tensor:
    """Return ``decode()``, or what it returned for the same unchanged files before.

    Args:
        files: What the images are decoded from: path, size and time of change are the key.
        image_size: The size decoded to, which is part of the key.
        num_images: How many there are; a few are not worth a file.
        decode: Makes the images, ``uint8 [N, C, H, W]``.
    """
    folder = _folder()
    if folder is None or num_images < _MIN_IMAGES:
        return decode()
    key = _key(files, image_size)
    path = folder / f"images-{key[:32]}.safetensors"
    images = _read(path, key)
    if images is None or len(images) != num_images:
        images = decode()
        _write(path, key, images)
    return images


def _folder() -> Path | None:
    setting = os.environ.get("SCPL_CACHE", "")
    if setting.lower() in ("off", "0", "none"):
        return None
    try:
        return Path(setting).expanduser() if setting else Path.home() / ".cache" / "scpl"
    except RuntimeError:  # there is no home folder
        return None


def _key(files: Sequence[Path], image_size: int | None) -> str:
    # The decoder's version counts: another one may round otherwise.
    version = require("PIL", "images", "Decoding images").__version__
    digest = hashlib.sha256(f"{_FORMAT} {version} {image_size}".encode())
    for file in files:
        state = file.stat()
        digest.update(f"\n{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read(path: Path, key: str) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            images: Tensor = file.get_tensor("images")
    except (OSError, SafetensorError) as error:
        if path.exists():
            _log.info("the cache file %s is damaged and will be made again: %s", path, error)
        return None
    if stored.get("key") != key or stored.get("crc32") != _checksum(images):
        _log.info("the cache file %s is damaged and will be made again", path)
        return None
    return images


def _write(path: Path, key: str, images: Tensor) -> None:
    from safetensors.torch import save_file

    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * images.nbytes:
            _log.info("no room in %s to keep the decoded images", path.parent)
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file({"images": images}, temporary, {"key": key, "crc32": _checksum(images)})
        os.replace(temporary, path)  # readers see the old file or the new one, never half of one
        _log.info("kept the decoded images in %s (%d MB)", path, images.nbytes // 10**6)
    except Exception as error:
        _log.info("could not keep the decoded images in %s: %s", path.parent, error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _checksum(images: Tensor) -> str:
    return str(zlib.crc32(images.contiguous().numpy().data))
