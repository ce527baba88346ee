"""Fine-tune a pre-trained encoder with local objectives and with backpropagation.

    python benchmarks/fine-tune/study.py --model path/to/all-MiniLM-L6-v2 --data-dir ~/data

Every run is one of `scpl compare`, with the defaults for networks of transformers: the same texts,
order, epochs and mini-batches for every method. Finished runs are kept, so the same command goes on
where it was interrupted; ``--table`` only writes the table of what is there.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

SETS = {
    # name: how it is reduced
    "sst2-sentences": ["--limit-train", "3000", "--max-tokens", "64"],
    "sst2-1000": ["--limit-train", "1000", "--max-tokens", "64"],
    "ag_news": ["--limit-train", "4000", "--max-tokens", "96"],
    "imdb": ["--limit-train", "2000", "--limit-test", "5000", "--max-tokens", "200"],
}
QUICK = ["--limit-train", "80", "--limit-test", "40", "--max-tokens", "16", "--epochs", "1"]
WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Group:
    """Methods that one comparison trains with the same settings.

    Attributes:
        data: A name in `SETS`.
        label: What the rows of its methods are called, with the method's name.
        methods: Separated by commas.
        seed: Of its runs.
        settings: Further flags.
        scratch: Whether the network begins with drawn weights.
    """

    data: str
    label: str
    methods: str
    seed: int = 0
    settings: tuple[str, ...] = ()
    scratch: bool = False

    def out(self, root: Path) -> Path:
        """The folder of the comparison."""
        return root / self.data / f"{self.label}-seed{self.seed}"


def groups(stages: list[int], more_epochs: int | None) -> Iterator[Group]:
    """List what is trained on each data set, the most important first."""
    for data in SETS:
        for count in stages:
            methods = "bp,scpl,early-exit" if count == stages[0] else "scpl,early-exit"
            yield Group(data, f"{count} stages", methods, settings=("--stages", str(count)))
    for data in SETS:
        if more_epochs:
            settings = ("--stages", "2", "--epochs", str(more_epochs))
            yield Group(data, f"2 stages, {more_epochs} epochs", "scpl", settings=settings)
        settings = ("--stages", "2", "--cross-entropy", "0.8")
        yield Group(data, "2 stages, contrast 0.2", "scpl", settings=settings)
        yield Group(data, "from scratch", "bp,scpl", settings=("--stages", "2"), scratch=True)


def write_sentences(data_dir: Path, out: Path) -> Path:
    """Make a data set of SST-2's whole sentences; its training split is of phrases."""
    out.mkdir(parents=True, exist_ok=True)
    for ours, theirs in (("train", "train_sentences"), ("test", "test")):
        table = pq.read_table(data_dir / "sst2" / f"{theirs}-00000-of-00001.parquet")
        pq.write_table(table, out / f"{ours}.parquet")
    return out


def write_scratch(model: Path, out: Path) -> Path:
    """Copy a checkpoint without its weights."""
    if not out.is_dir():
        shutil.copytree(model, out, ignore=shutil.ignore_patterns(*WEIGHTS, "1_Pooling"))
    return out


def command(group: Group, args: argparse.Namespace) -> list[str]:
    """The comparison that trains a group."""
    own = args.out / "data" / group.data
    model = args.out / "scratch" if group.scratch else args.model
    settings = QUICK if args.quick else SETS[group.data]
    return [
        sys.executable, "-m", "scpl", "compare", "--methods", group.methods,
        "--seeds", str(group.seed), "--model", f"hf:{model}", "--threads", str(args.threads),
        "--data", str(own if own.is_dir() else group.data), "--data-dir", str(args.data_dir),
        "--out", str(group.out(args.out)), "--device", args.device, *settings, *group.settings,
    ]  # fmt: skip


def run(group: Group, args: argparse.Namespace) -> None:
    """Train what a group lacks; a failure is said, and leaves the others alone."""
    if time.time() > args.until:
        return
    began = time.perf_counter()
    done = subprocess.run(command(group, args), capture_output=True, text=True, check=False)
    status = "" if done.returncode == 0 else f": {done.stderr.strip().splitlines()[-1:]}"
    seconds = time.perf_counter() - began
    sys.stderr.write(f"{group.out(args.out)}: {seconds:.0f} s{status}\n")


def collect(out: Path) -> list[dict[str, object]]:
    """Read what the runs ended with."""
    rows = []
    for file in sorted(out.glob("*/*/*/summary.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        label, _, seed = file.parents[1].name.rpartition("-seed")
        row = {"data": file.parents[2].name, "method": found["method"], "seed": int(seed)}
        row["settings"] = "" if found["method"] == "bp" and label.endswith("stages") else label
        for key in ("test_accuracy", "valid_accuracy", "train_seconds"):
            row[key] = found[key]
        rows.append(row)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Write test accuracies, mean and standard deviation over seeds, beside those of bp."""
    sets = [name for name in SETS if any(row["data"] == name for row in rows)]
    kinds = sorted({(str(r["settings"]), str(r["method"])) for r in rows}, key=_order)
    lines = [
        "| method | " + " | ".join(f"{name} | to bp" for name in sets) + " |",
        "|---|" + "---:|---:|" * len(sets),
    ]
    for settings, method in kinds:
        cells = []
        for name in sets:
            own = _accuracies(rows, name, settings, method)
            base = _accuracies(rows, name, "", "bp")
            pairs = [100 * (own[seed] - base[seed]) for seed in own if seed in base]
            spread = f" ± {100 * statistics.stdev(own.values()):.2f}" if len(own) > 1 else ""
            mean = f"{100 * statistics.fmean(own.values()):.2f}" if own else ""
            cells.append(f"{mean}{spread} ({len(own)})" if own else "not run")
            cells.append(f"{statistics.fmean(pairs):+.2f}" if pairs and method != "bp" else "")
        kind = f"`{method}`" + (f", {settings}" if settings else "")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(kind: tuple[str, str]) -> tuple[bool, str, str]:
    settings, method = kind
    return settings.startswith("from scratch"), settings, method


def _accuracies(
    rows: list[dict[str, object]], data: str, settings: str, method: str
) -> dict[int, float]:
    wanted = (data, settings, method)
    return {
        int(str(row["seed"])): float(str(row["test_accuracy"]))
        for row in rows
        if (row["data"], row["settings"], row["method"]) == wanted
    }


def main() -> None:
    """Run the study."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    options.add_argument("--data-dir", type=Path, required=True, help="where data sets lie")
    options.add_argument("--out", type=Path, default=Path("runs/fine-tune"), help="for its runs")
    options.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    options.add_argument("--stages", nargs="+", type=int, default=[2, 3, 6])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument(
        "--more-epochs", type=int, default=5, help="that fit into the time of bp; 0: none"
    )
    options.add_argument("--jobs", type=int, default=1, help="comparisons at the same time")
    options.add_argument("--threads", type=int, default=1, help="of each run")
    options.add_argument("--device", default="cpu")
    options.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    options.add_argument("--quick", action="store_true", help="a few texts, one epoch")
    options.add_argument("--table", action="store_true", help="run nothing")
    args = options.parse_args()
    args.until = time.time() + 60 * args.minutes
    if not args.table:
        for name in ("sst2-sentences", "sst2-1000"):
            write_sentences(args.data_dir, args.out / "data" / name)
        write_scratch(args.model, args.out / "scratch")
        waiting = [
            replace(group, seed=seed)
            for seed in args.seeds
            for group in groups(args.stages, args.more_epochs)
            if group.data in args.sets
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda group: run(group, args), waiting))
    rows = collect(args.out)
    (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
