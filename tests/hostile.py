"""Damaged files for every parser and loader that reads from outside, drawn from a seed.

A *target* is a small valid file and what reads it. Whatever a reader makes of a damaged copy, it is
a success or an error of ours; `benchmarks/faults/fuzz.py` tries many, `tests/test_fuzz.py` a few.
"""

import gzip
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from data_files import encoded, idx_bytes, picture
from run_folders import make_run
from scpl import models
from scpl.app.commands import CompareConfig
from scpl.app.config import TrainConfig, write_toml
from scpl.app.network import load_network
from scpl.data.images.decode import decode_images
from scpl.data.images.encoded import _classes_file, list_parquet
from scpl.data.images.raw import parse_idx
from scpl.data.notes import Faults
from scpl.data.tables import rows_of
from scpl.data.text.tokenizer import from_json, read_vectors
from scpl.engine.messages import TrainBatch, decode, encode
from scpl.report.pages import run_page
from scpl.runs import RunFolder, RunRecord
from text_files import tickets, write_table

ODD = (
    b"1e999", b"-1", b"0", b"NaN", b"Infinity", b"null", b"true", b'""', b"[]", b"{}", b"1e-999",
    b"9" * 30, b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"a." * 3000, b"\0", b"\xff\xfe", b'"',
    b"\n", b"=", b",", b"10000000", b"[[1]]", b"1e300", b"-0.5", b'"\\ud800"',
)  # fmt: skip
_NUMBER = re.compile(rb"-?\d+(\.\d+)?(e-?\d+)?")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One to three faults: flipped bits, a lost end or piece, odd values, something twice."""
    for _ in range(draw.randint(1, 3)):
        size = len(content)
        one, other = sorted(draw.randrange(size + 1) for _ in range(2))
        match draw.randrange(7):
            case 0 if size:
                place = draw.randrange(size)
                flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
                content = content[:place] + flipped + content[place + 1 :]
            case 1:
                content = content[:one]
            case 2:
                content = content[:one] + content[min(other, one + 40) :]
            case 3:
                content = content[:one] + draw.choice(ODD) + content[one:]
            case 4 | 5:
                numbers = list(_NUMBER.finditer(content[:100_000]))
                if numbers:
                    found = draw.choice(numbers)
                    content = content[: found.start()] + draw.choice(ODD) + content[found.end() :]
            case 6:
                content = content[:other] + content[one:other] + content[other:]
    return content


@dataclass(frozen=True)
class Target:
    """A valid file, where it lies, and what reads it."""

    name: str
    path: Path
    read: Callable[[], object]
    valid: bytes

    def attempt(self, content: bytes) -> None:
        """Have a damaged copy read in place of the file."""
        self.path.write_bytes(content)
        self.read()


def targets(root: Path) -> list[Target]:
    """All targets, with their files below a folder."""
    found: list[Target] = []

    def add(name: str, path: Path, read: Callable[[], object], valid: bytes | None = None) -> None:
        if valid is not None:
            path.write_bytes(valid)
        found.append(Target(name, path, read, path.read_bytes()))

    recipe = root / "recipe.toml"
    config = TrainConfig.of(lr=1e-3, stages=3, lr_factors=(0.1, 0.3, 1.0), cuts=("a", "b"))
    read = lambda: CompareConfig.from_recipe(recipe).train.check()  # noqa: E731
    add("recipe", recipe, read, write_toml(config).encode())

    for suffix in (".csv", ".tsv", ".jsonl", ".parquet", ".arrow"):
        table = root / f"table{suffix}"
        write_table(table, tickets(20))
        add(f"table {suffix}", table, lambda t=table: list(rows_of(t, ["body", "queue"], Faults())))

    idx = root / "idx"
    raw = idx_bytes(np.arange(48, dtype=np.uint8).reshape(3, 4, 4))
    add("idx", idx, lambda: parse_idx(idx.read_bytes(), "idx"), raw)
    packed = root / "idx.gz"
    add("idx, gzip", packed, lambda: parse_idx(packed.read_bytes(), "idx"), gzip.compress(raw))

    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        file = root / f"image.{kind.lower()}"
        add(f"image {kind}", file, lambda f=file: decode_images([f], 8), encoded(picture(), kind))

    exif = Image.Exif()
    exif[0x112] = 6
    deep, real = (np.linspace(0, top, 64).reshape(8, 8) for top in (4000, 1))
    unusual = {
        "turned": encoded(picture(), "JPEG", exif=exif),
        "16 bits": encoded(Image.fromarray(deep.astype(np.uint16))),
        "32 bits": encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "real numbers": encoded(Image.fromarray(real.astype(np.float32)), "TIFF"),
        "transparent": encoded(picture().convert("RGBA")),
    }
    for name, content in unusual.items():
        file = root / name
        add(f"image, {name}", file, lambda f=file: decode_images([f], 8), content)

    hub = root / "hub"
    hub.mkdir()
    for split in ("train", "test"):
        write_images(hub / f"{split}.parquet")
    add("images, parquet", hub / "train.parquet", lambda: list_parquet(hub).decoded())
    names = root / "classes.json"
    classes = [{"label": 0, "name": "cat"}, {"label": 1, "name": "dog"}]
    add("classes.json", names, lambda: _classes_file(names), json.dumps(classes).encode())

    tokenizer = root / "tokenizer.json"
    words = {"kind": "words", "words": ["<pad>", "<unk>", "a", "b"]}
    read = lambda: from_json(tokenizer.read_text("utf-8", "replace"), "x")  # noqa: E731
    add("tokenizer", tokenizer, read, json.dumps(words).encode())
    vectors = root / "vectors.txt"
    known = words["words"]
    add("word vectors", vectors, lambda: read_vectors(vectors, known), b"a 0.5 1\nb -2 3e-1\n")

    run = make_run(root / "run", epochs=3, num_steps=5)
    account = {
        "table": [{"class": name, "samples": 3, "f1": 0.5} for name in "ab"],
        "confusion": [[2, 1], [1, 2]],
        "calibration": {"expected_calibration_error": 0.1, "bins": [{"from": 0, "to": 1}]},
        "mistakes": [{"sample": "x.png", "true": "a", "predicted": "b", "picture": "AAAA"}],
    }
    RunFolder(run).write_test(account)
    for name in ("summary.json", "metrics.csv", "steps.jsonl", "timeline.json", "env.json",
                 "test.json"):  # fmt: skip
        add(f"run: {name}", run / name, lambda: run_page(RunRecord.read(run), []))
    add("run: config.toml", run / "config.toml", lambda: run_page(RunRecord.read(run), []))

    finished = root / "finished"
    finished.mkdir()
    network = models.build("small-cnn", num_classes=3, in_channels=1, image_size=8)
    save_file(network.state_dict(), finished / "model.safetensors")
    (finished / "config.toml").write_text(write_toml(TrainConfig.of(threads=1)))
    described = {
        "model": "small-cnn", "num_classes": 3, "in_channels": 1, "image_size": 8, "width": 1.0,
        "mean": [0.4], "std": [0.3], "classes": list("abc"), "task": {"kind": "classes"},
        "white": [4095, 1.0],
        "recipe": {"model": "small-cnn", "method": "scpl", "stages": 2, "temperature": 0.1},
    }  # fmt: skip
    read = lambda: load_network(RunFolder(finished))  # noqa: E731
    add("model.json", finished / "model.json", read, json.dumps(described).encode())
    add("model.safetensors", finished / "model.safetensors", read)

    header = root / "header"
    batch = TrainBatch(1, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), (torch.ones(1),))
    add("message header", header, lambda: decode(header.read_bytes()), encode(batch)[0])
    return found


def write_images(path: Path) -> None:
    """A parquet file of two images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": encoded(picture(seed=seed)), "path": None} for seed in range(2)]
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), path)
