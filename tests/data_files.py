"""Tiny data sets in every format the package reads."""

import gzip
import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from scpl.data.images import Split
from scpl.data.images.raw import FILES

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def rng(seed=0):
    return np.random.default_rng(seed)


def random_split(n=20, classes=4, shape=(3, 8, 8), seed=0):
    draws = rng(seed)
    images = draws.integers(0, 256, (n, *shape), dtype=np.uint8)
    labels = np.arange(n) % classes
    draws.shuffle(labels)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def idx_bytes(values):
    code = IDX_CODES[values.dtype.str[1:]]
    head = bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(values.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder: Path, n=20, compress=True, seed=0):
    """Write the four files; return the pixels and labels by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    draws, written = rng(seed), {}
    for name in FILES:
        labels = (np.arange(n) % 10).astype(np.uint8)
        pixels = draws.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        written[name] = pixels if "images" in name else labels
        data = idx_bytes(written[name])
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(data, mtime=0) if compress else data)
    return written


def write_cifar(folder: Path, fine=False, n=10, seed=0):
    """Write the binary version; return pixels and labels of the test file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    draws = rng(seed)
    for name in ["train.bin", "test.bin"] if fine else names:
        pixels = draws.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        labels = draws.integers(0, 100 if fine else 10, (n, 1), dtype=np.uint8)
        columns = [np.full_like(labels, 7), labels] if fine else [labels]
        rows = np.concatenate([*columns, pixels.reshape(n, -1)], 1)
        (folder / name).write_bytes(rows.tobytes())
    return pixels, labels[:, 0]


def picture(size=(8, 8), mode="RGB", seed=0):
    """A random picture of ``size`` = (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image, kind="PNG", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def write_parquet(
    path: Path, pictures, labels, image="image", label="label", names=None, metadata=True
):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": encoded(each), "path": None} for each in pictures]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels)})
    if metadata:
        label_feature = {"_type": "ClassLabel", "names": list(names)} if names else {}
        features = {image: {"_type": "Image"}, label: label_feature}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path)


def write_hub(folder: Path, mode="RGB", size=(32, 32), n=10, classes=10, **columns):
    """Write train and test files as the hub has them."""
    for kind in ("train", "test"):
        pictures = [picture(size, mode, seed) for seed in range(n)]
        labels = [i % classes for i in range(n)]
        write_parquet(folder / f"{kind}-00000-of-00001.parquet", pictures, labels, **columns)


def write_folder(root: Path, classes=("cat", "dog"), n=5, size=(8, 8), mode="RGB"):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture(size, mode, 100 * number + i).save(root / name / f"{i:03}.png")
