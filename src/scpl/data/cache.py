"""What took long to prepare is kept on disk: decoded images, their digests, encoded texts.

Decoding 60,000 small JPEGs takes seconds, reading them back a fraction of one. The cache is an aid
and never a reason to fail: a missing, damaged or unwritable one means doing the work, nothing else.
It lives in ``$SCPL_CACHE``, else ``~/.cache/scpl``; ``SCPL_CACHE=off`` turns it off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from scpl.data.extras import import_extra
from scpl.files import replacing

__all__ = ["folder", "keep", "recall", "remember"]

_log = logging.getLogger(__name__)

_FORMAT = "2"  # raise it when the same files decode to other bytes than before
_MIN_IMAGES = 5000  # fewer decode in less than a second


def remember(
    kind: str,
    files: Sequence[Path],
    how: object,
    num_images: int,
    make: Callable[[], tuple[Tensor, str]],
) -> tuple[Tensor, str]:
    """Return ``make()`` or what it returned for these files before: a tensor, a text about it.

    The key is the path, size and time of change of each file, and how it is made of them: a value
    of which the text says all. A few images are not worth a file.

    Args:
        kind: What is made of them, e.g. ``"images"`` or ``"digests"``.
        files: What it is made of.
        how: How it is made of them.
        num_images: How many images there are.
        make: Makes it.
    """
    if folder() is None or num_images < _MIN_IMAGES:
        return make()
    key = _key(files, how)
    if found := recall(kind, key):
        return found[0][kind], found[1]["about"]
    made, about = make()
    keep(kind, key, {kind: made}, {"about": about})
    return made, about


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
    checksum = about.pop("crc32", None)
    if about.pop("key", None) != key or checksum != _checksum(tensors, about):
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
        stored = {**(about or {}), "key": key, "crc32": _checksum(tensors, about or {})}
        with replacing(path) as draft:
            save_file(dict(tensors), draft, stored)
        _log.info("kept %s in %s (%d MB)", kind, path, size // 10**6)
    except Exception as error:
        _log.info("could not keep %s in %s: %s", kind, path.parent, error)


def _path(kind: str, key: str) -> Path | None:
    place = folder()
    return None if place is None else place / f"{kind}-{key[:32]}.safetensors"


def folder() -> Path | None:
    """Return where the cache lies; None: it is off."""
    setting = os.environ.get("SCPL_CACHE", "")
    if setting.lower() in ("off", "0", "none"):
        return None
    try:
        return Path(setting).expanduser() if setting else Path.home() / ".cache" / "scpl"
    except RuntimeError:  # there is no home folder
        return None


def _key(files: Sequence[Path], how: object) -> str:
    # The decoder's version counts: another one may round otherwise.
    version = import_extra("PIL", "images", "Decoding images").__version__
    digest = hashlib.sha256(f"{_FORMAT} {version} {how}".encode())
    folders: dict[Path, Path] = {}  # resolved once each: for a file it takes longer than all else
    for file in files:
        parent = folders.get(file.parent) or folders.setdefault(file.parent, file.parent.resolve())
        state = file.stat()
        about = f"\n{parent / file.name} {state.st_size} {state.st_mtime_ns}"
        digest.update(about.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    total = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().numpy().data, total)
    return str(total)
