"""Samples per second of two versions of the source, measured in turns in one run.

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

MODELS = {
    "vgg8": ["--model", "vgg8", "--data", "cifar10", "--batch-size", "64"],
    "transformer": [
        *("--model", "transformer", "--data", "imdb", "--batch-size", "32"),
        *("--max-tokens", "64", "--vocab-size", "5000"),
    ],
}
NARROW = {"vgg8": ["--width", "0.125"], "transformer": ["--hidden", "32"]}
METHODS = (
    *(("bp", 1), ("early-exit", 1), ("scpl", 1)),
    *(("scpl", 2), ("gpipe", 2), ("1f1b", 2), ("ddp", 2)),
)
SETTINGS = {
    f"{model} {method} {processes}": (model, method, processes)
    for model in MODELS
    for method, processes in METHODS
}


def rate_of(source: Path, setting: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Start the processes of one version, warm them up, and time blocks of steps.

    Returns:
        Samples per second, and the cores that others used meanwhile.
    """
    model, method, processes = SETTINGS[setting]
    flags = [*MODELS[model], *(NARROW[model] if arguments.quick else [])]
    flags += ["--methods", method, "--processes", str(processes), "--threads", "1"]
    flags += ["--repeats", str(arguments.blocks), "--steps", str(arguments.steps)]
    command = [sys.executable, "-m", "scpl", "bench", *flags, "--synthetic", "--json", "--quiet"]
    done = run(source, command)
    if done.returncode:
        raise SystemExit(f"{setting} does not run with {source}: {done.stderr.strip()}")
    found = json.loads(done.stdout)["results"][0]
    return {
        "rate": found["samples_per_second"]["median"],
        "others": (found["other_load"] or {"median": 0.0})["median"],
    }


def run(source: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(source)}
    with tempfile.TemporaryDirectory() as elsewhere:  # where no scpl can be imported from
        return subprocess.run(
            command, env=environment, cwd=elsewhere, capture_output=True, text=True
        )


def check(source: Path) -> Path:
    """Make sure that this source, and not an installed one, is what will be measured."""
    source = source.resolve()
    done = run(source, [sys.executable, "-c", "import scpl; print(scpl.__file__)"])
    if not done.stdout.startswith(str(source)):
        got = done.stdout.strip() or done.stderr.strip()
        raise SystemExit(f"{source} must be a folder that scpl is imported from. Got: {got}")
    return source


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every setting: old, new, new, old, ..."""
    sources = {"old": check(arguments.old), "new": check(arguments.new)}
    rates: dict[str, dict[str, list[dict[str, float]]]] = {
        setting: {"old": [], "new": []} for setting in arguments.settings
    }
    for number in range(arguments.rounds):
        for setting in arguments.settings:
            for version in ("old", "new") if number % 2 == 0 else ("new", "old"):
                rates[setting][version].append(rate_of(sources[version], setting, arguments))
            old, new = (rates[setting][version][-1]["rate"] for version in ("old", "new"))
            line = f"round {number + 1}/{arguments.rounds}, {setting}: {old:.1f} -> {new:.1f}"
            print(line, file=sys.stderr, flush=True)
    return {setting: summary(found, arguments.least) for setting, found in rates.items()}


def summary(found: Mapping[str, list[dict[str, float]]], least: float) -> dict[str, Any]:
    """Compare round by round: what slows the machine for a while slows both versions."""
    old, new = ([one["rate"] for one in found[version]] for version in ("old", "new"))
    ratios = [ours / theirs for ours, theirs in zip(new, old, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
    return {
        "old": median(old),
        "new": median(new),
        "ratio": {"median": middle, "quartiles": [low, high], "rounds": ratios},
        "other_load": max(one["others"] for version in found.values() for one in version),
        "slower": middle < least,
    }


def table(results: Mapping[str, dict[str, Any]], least: float) -> Iterator[str]:
    """Lines of Markdown."""
    yield (
        "| network, method, processes | old, samples/s | new, samples/s "
        f"| new/old: median (quartiles) | at least {least} | other load, cores |"
    )
    yield "|---|---:|---:|---:|---|---:|"
    for setting, row in results.items():
        low, high = row["ratio"]["quartiles"]
        yield (
            f"| {setting} | {row['old']:.1f} | {row['new']:.1f} "
            f"| **{row['ratio']['median']:.3f}** ({low:.3f} .. {high:.3f}) "
            f"| {'no' if row['slower'] else 'yes'} | {row['other_load']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, required=True, help="source folder, PATH/src")
    parser.add_argument("--new", type=Path, required=True, help="source folder, PATH/src")
    parser.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING",
        help="network, method and processes, as in 'vgg8 scpl 2'; default: all",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=6, help="pairs of each setting")
    parser.add_argument("--blocks", type=int, default=3, help="timed blocks of a start")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block")
    parser.add_argument("--least", type=float, default=0.98, help="smallest ratio that is right")
    parser.add_argument("--quick", action="store_true", help="narrow networks, not for quoting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = measure(arguments)
    if arguments.json:
        print(json.dumps({"results": results, "arguments": vars(arguments)}, default=str))
    else:
        print("\n".join(table(results, arguments.least)))
    sys.exit(1 if any(row["slower"] for row in results.values()) else 0)


if __name__ == "__main__":
    main()
