"""Images as PNG, for pages that show some of them. It needs no optional package, unlike reading."""

from __future__ import annotations

import struct
import zlib

from torch import Tensor
from torch.nn import functional as F

__all__ = ["png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR = 0, 2


def png(image: Tensor, largest: int = 96) -> bytes:
    """Encode an image; a larger one is shrunk so that its longer side has ``largest`` pixels.

    Args:
        image: ``uint8 [C, H, W]`` with 1 channel (grey) or 3 (red, green, blue); of another number
            the first is shown.
        largest: See above.

    Source: the PNG specification, third edition (https://www.w3.org/TR/png-3/).
    """
    image = image.cpu()
    if image.shape[0] not in (1, 3):
        image = image[:1]
    longer = max(image.shape[1:])
    if longer > largest:
        size = [max(1, round(side * largest / longer)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    channels, height, width = image.shape
    rows = image.permute(1, 2, 0).reshape(height, -1)
    # Each row begins with the number of its filter: 0 for none.
    content = b"".join(b"\0" + row.numpy().tobytes() for row in rows)
    kind = _COLOUR if channels == 3 else _GREY
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(content, 9)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
