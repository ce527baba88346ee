"""Fine-tune a pre-trained network for several labels, and for a number: scpl against bp.

Both data sets are made of public ones. *Digests* join one to three items of AG News; a digest has
the topics of its items as labels. *Reviews* join one to five sentences of SST-2; what is to be
predicted is the share of positive ones, in percent. Items and sentences of the test are none of
those of the training.

usage: tasks.py --model hf:FOLDER [--data-dir DIR] [--out DIR] [--train N] [--seeds 0,1,2]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scpl.data.text import Faults, columns_of, rows_of
from scpl.data.text.splits import find_files

Item = tuple[str, str]
"""A text and its class."""
WORDS = 14
"""Words of an item of AG News: about its title and how its text begins."""
SETTINGS = {
    "digests": ["--task", "multi-label", "--label", "topics"],
    "reviews": ["--task", "regression", "--label", "positive"],
}
RECIPE = ["--stages", "2", "--max-tokens", "64", "--threads", "1", "--device", "cpu"]
"""What is not the default for networks of transformers."""
METRICS = {
    "digests": ("macro_f1", "micro_f1", "mean_average_precision", "exact_match"),
    "reviews": ("r2", "mean_absolute_error", "spearman"),
}


def parts_of(name: str, data_dir: Path | None) -> list[list[Item]]:
    """Texts and classes of a known data set, of the training and of the test split."""
    files = find_files(name, data_dir=data_dir)
    known = files.known
    assert known is not None
    column = next(name for name in known.text if name in columns_of(files.train[0]))
    return [
        [
            (str(text), known.classes[int(label)])
            for path in paths
            for _, (text, label) in rows_of(path, (column, "label"), Faults())
        ]
        for paths in (files.train, files.test)
    ]


def digest(items: Sequence[Item], draws: random.Random) -> dict[str, Any]:
    """Some items of different news, in random order, and the set of their topics."""
    chosen = draws.sample(items, draws.randint(1, 3))
    text = " ".join(" ".join(item.split()[:WORDS]) for item, _ in chosen)
    return {"text": text, "topics": ";".join(sorted({topic for _, topic in chosen}))}


def review(sentences: Sequence[Item], draws: random.Random) -> dict[str, Any]:
    """Some sentences, and the share of the positive ones in percent.

    How positive a review is is drawn first, so that all shares are about equally frequent.
    """
    good = [text for text, feeling in sentences if feeling == "positive"]
    bad = [text for text, feeling in sentences if feeling == "negative"]
    count = draws.randint(1, 5)
    positive = draws.randint(0, count)
    chosen = draws.sample(good, positive) + draws.sample(bad, count - positive)
    draws.shuffle(chosen)
    text = " ".join(f"{sentence.strip()} ." for sentence in chosen)
    return {"text": text, "positive": round(100 * positive / count, 1)}


def write(
    folder: Path,
    name: str,
    source: str,
    make: Callable[[Sequence[Item], random.Random], dict[str, Any]],
    sizes: tuple[int, int],
    data_dir: Path | None,
) -> Path:
    """Write the tables train and test of a data set that is made of another."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, items, size in zip(
        ("train", "test"), parts_of(source, data_dir), sizes, strict=True
    ):
        # Phrases of SST-2's training split are parts of its sentences; short ones say little.
        usable = [(text, label) for text, label in items if len(text.split()) >= 5]
        draws = random.Random(f"{name} {split}")
        made = [make(usable, draws) for _ in range(size)]
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(made[0]))
            table.writeheader()
            table.writerows(made)
    return folder


def table(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Write a table for the README: mean and deviation of each metric over the seeds."""
    names = METRICS[name]
    rows = [["method", "runs", *(metric.replace("_", " ") for metric in names)]]
    rows.append(["---", "---:", *("---:" for _ in names)])
    for one in results:
        cells = [one[f"test_{metric}"] for metric in names]
        written = [f"{c['mean']:.3f} ± {c['sd'] or 0:.3f}" for c in cells]
        rows.append([one["label"], str(len(one["runs"])), *written])
    return f"\n{name}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    """Make the data sets, and compare methods on each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="hf:FOLDER of a pre-trained encoder")
    parser.add_argument("--data-dir", type=Path, help="where AG News and SST-2 lie")
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--train", type=int, default=2000, help="training texts, with validation")
    parser.add_argument("--test", type=int, default=1000, help="test texts")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="scpl,bp")
    parser.add_argument("--only", choices=SETTINGS, help="one of the two data sets")
    options = parser.parse_args()
    made = {"digests": ("ag_news", digest), "reviews": ("sst2", review)}
    for name in [options.only] if options.only else SETTINGS:
        source, make = made[name]
        sizes = (options.train, options.test)
        data = write(options.out / "data", name, source, make, sizes, options.data_dir)
        command = [
            sys.executable, "-m", "scpl", "compare", "--methods", options.methods,
            "--seeds", options.seeds, "--model", options.model, "--data", str(data),
            *SETTINGS[name], *RECIPE, "--out", str(options.out / name), "--quiet", "--json",
        ]  # fmt: skip
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=alone)
        (options.out / f"{name}.json").write_text(done.stdout)
        sys.stdout.write(table(name, json.loads(done.stdout)["results"]))


if __name__ == "__main__":
    main()
