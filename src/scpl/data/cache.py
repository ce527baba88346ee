"""What took long to prepare is kept on disk: decoded images, their digests, encoded texts.

Decoding 60,000 small JPEGs takes seconds, reading them back a fraction of one. The cache is an aid
and never a reason to fail: a missing, damaged or unwritable one means doing the work, nothing else.
It lives in ``$SCPL_CACHE``, else ``~/.cache/scpl``; ``SCPL_CACHE=off`` turns it off.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from scpl.data.extras import import_extra
from scpl.files import replacing

__all__ = ["keep", "recall", "remember"]

_log = logging.getLogger(__name__)

_FORMAT = "1"  # raise it when the same files decode to other bytes than before
_MIN_IMAGES = 5000  # fewer decode in less than a second


def remember(
    kind: str,
    files: Sequence[Path],
    image_size: int | None,
    num_images: int,
    make: Callable[[], Tensor],
) -> Tensor:
    """Return ``make()``, ``[N, ...]``, or what it returned for these files before.

    The key is the path, size and time of change of each file, and the size decoded to. A few images
    are not worth a file.

    Args:
        kind: What is made of them: ``"images"`` or ``"digests"``.
        files: What it is made of.
        image_size: The size decoded to.
        num_images: N.
        make: Makes it.
    """
    if _folder() is None or num_images < _MIN_IMAGES:
        return make()
    key = _key(files, image_size)
    found = recall(kind, key)
    if found is not None and len(found[0][kind]) == num_images:
        return found[0][kind]
    made = make()
    keep(kind, key, {kind: made})
    return made


def recall(kind: str, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors and texts kept under a key; None if there are none, or damaged ones.

    The kind begins the file's name; the key is a hexadecimal digest of all that they depend on.
    """
    from safetensors import SafetensorError, safe_open

    path = _path(kind, key)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        if path.exists():
            _log.info("the cache file %s is damaged and will be made again: %s", path, error)
        return None
    if about.pop("key", None) != key or about.pop("crc32", None) != _checksum(tensors):
        _log.info("the cache file %s is damaged and will be made again", path)
        return None
    return tensors, about


def keep(
    kind: str, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Keep tensors and texts under a key, for `recall`; a failure is logged, no more."""
    from safetensors.torch import save_file

    path = _path(kind, key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shutil.disk_usage(path.parent).free < 2 * size:
            _log.info("no room in %s to keep %s", path.parent, kind)
            return
        stored = {**(about or {}), "key": key, "crc32": _checksum(tensors)}
        with replacing(path) as draft:
            save_file(dict(tensors), draft, stored)
        _log.info("kept %s in %s (%d MB)", kind, path, size // 10**6)
    except Exception as error:
        _log.info("could not keep %s in %s: %s", kind, path.parent, error)


def _path(kind: str, key: str) -> Path | None:
    folder = _folder()
    return None if folder is None else folder / f"{kind}-{key[:32]}.safetensors"


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
    version = import_extra("PIL", "images", "Decoding images").__version__
    digest = hashlib.sha256(f"{_FORMAT} {version} {image_size}".encode())
    for file in files:
        state = file.stat()
        digest.update(f"\n{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().numpy().data, total)
    return str(total)
