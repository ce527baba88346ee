"""Memory of a run, and how long it waits for data, with samples in memory and not.

Makes a folder of small JPEGs, or a table of short texts, once, and trains a network on it, each
time in a process of its own. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scpl.app.build import build_loaders, build_method, build_partition, build_pipeline
from scpl.app.config import TrainConfig
from scpl.app.environment import describe_environment, peak_memory
from scpl.data.loader import Batch, EpochLoader

SIDE, CLASSES = 32, 10


def make(folder: Path, count: int) -> Path:
    """Make so many images: coarse noise, with a tint that tells the class."""
    root, draws = folder / f"{count}-images", np.random.default_rng(0)
    if (root / "made").exists():
        return root / "images"
    for number in range(count):
        label = number % CLASSES
        file = root / "images" / f"c{label}" / f"{number:07}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pixels[:, :, label % 3] //= 1 + label // 3
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(file)
    (root / "made").touch()
    return root / "images"


def make_texts(folder: Path, count: int) -> Path:
    """Make a table of so many texts of 6 to 16 words, one of which tells the class."""
    table, draws = folder / f"{count}-texts.csv", np.random.default_rng(0)
    if table.exists():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    draft = table.with_suffix(".draft")
    with draft.open("w") as file:
        file.write("text,label\n")
        for number in range(count):
            # Few words are common and many are rare, as in a language.
            words = (20_000 ** draws.random(draws.integers(5, 16))).astype(int)
            file.write(f"class{number % CLASSES} {' '.join(f'word{w}' for w in words)},")
            file.write(f"{number % CLASSES}\n")
    draft.rename(table)
    return table


class Clocked:
    """The first batches of an epoch, and how long was waited for them."""

    def __init__(self, loader: EpochLoader, count: int) -> None:
        self.loader, self.count, self.waited, self.started = loader, count, 0.0, 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = self.loader.batches()
        yield next(batches)  # until then the threads start
        self.started = time.perf_counter()
        for _ in range(1, min(self.count, len(self.loader))):
            before = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - before
            yield batch
        batches.close()


def measure(data: Path, in_memory: str, workers: int, steps: int) -> dict[str, Any]:
    """Train some steps and say what they took."""
    own = {"workers": workers} if data.is_dir() else {"model": "lstm", "hidden": 64}
    config = TrainConfig.of(data=str(data), in_memory=in_memory, **own)
    begun = time.perf_counter()
    loaders = build_loaders(config)
    loaded = time.perf_counter() - begun
    parts = build_partition(config, loaders.inputs, len(loaders.classes))
    clocked, clock = Clocked(loaders.train, steps), time.process_time()
    with build_pipeline(config, parts, build_method(config.method), steps) as pipeline:
        pipeline.train(clocked)
        took = time.perf_counter() - clocked.started
        clock = time.process_time() - clock
    return {
        "samples": loaders.train.num_samples,
        "kind": "images" if data.is_dir() else "texts",
        "in_memory": in_memory,
        "workers": own.get("workers", "-"),
        "seconds_to_load": loaded,
        "milliseconds_per_step": took / (steps - 1) * 1e3,
        "processor_milliseconds_per_step": clock / steps * 1e3,
        "share_of_waiting": clocked.waited / took,
        "peak_bytes": peak_memory(torch.device("cpu")),
        "load": os.getloadavg()[0],
    }


def apart(data: Path, *arguments: object) -> dict[str, Any]:
    """Measure in a process of its own; texts with an empty cache."""
    command = [sys.executable, __file__, "--one", str(data), *map(str, arguments)]
    with tempfile.TemporaryDirectory(dir=data.parent) as empty:
        own = {} if data.is_dir() else {"SCPL_CACHE": empty}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **own}
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| to train on | in memory | workers | to load | step | processor time of a step "
        "| waiting for data | peak memory | load |"
    )
    yield "|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        yield (
            f"| {row['samples']:,} {row['kind']} | {row['in_memory']} | {row['workers']} "
            f"| {row['seconds_to_load']:.1f} s | {row['milliseconds_per_step']:.1f} ms "
            f"| {row['processor_milliseconds_per_step']:.1f} ms | {row['share_of_waiting']:.1%} "
            f"| {row['peak_bytes'] / 2**20:,.0f} MiB | {row['load']:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-data"))
    parser.add_argument("--images", type=int, nargs="*", default=[20_000, 200_000])
    parser.add_argument("--texts", type=int, nargs="*", default=[250_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="few samples, not for quoting")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        folder, in_memory, workers, steps = arguments.one
        print(json.dumps(measure(Path(folder), in_memory, int(workers), int(steps))))
        return
    if arguments.quick:
        arguments.images, arguments.texts, arguments.steps = [500], [500], 5
    rows = []
    wanted = [(make, count) for count in arguments.images]
    wanted += [(make_texts, count) for count in arguments.texts]
    for maker, count in wanted:
        data = maker(arguments.folder, count)
        for in_memory in ("yes", "no"):
            print(f"measuring {data}, in memory: {in_memory}", file=sys.stderr)
            rows.append(apart(data, in_memory, arguments.workers, arguments.steps))
    if arguments.json:
        about = describe_environment(torch.device("cpu"), threads=1)
        print(json.dumps({"results": rows, "environment": about}))
    else:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
