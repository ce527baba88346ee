"""How many epochs of each method fit into the time of backpropagation."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scpl.app.bench.bench import bench
from scpl.app.config import BenchConfig, TrainConfig
from scpl.app.fairness import FREE
from scpl.app.train.resume import changed_settings
from scpl.data import is_here
from scpl.errors import InputError
from scpl.report.groups import BASELINE

__all__ = ["epochs_in_equal_time"]

FILE = "equal_time.json"


def epochs_in_equal_time(base: TrainConfig, methods: Sequence[str], out: Path) -> dict[str, int]:
    """Measure how fast the methods train, and share out the time that ``bp`` takes.

    A schedule spans the epochs of a run, so a method that has time for more of them must know it
    from the first step. What was measured is kept in the folder of the comparison: the same
    command later trains the same runs.

    Args:
        base: What the methods have in common; ``epochs`` are those of ``bp``.
        methods: Their names, ``bp`` among them.
        out: Folder of the comparison; it exists.

    Returns:
        Epochs by method: whole ones, rounded down, at least 1. Methods that cannot run are left
        out, and so are all if the data is missing: their runs tell why.

    Raises:
        InputError: what was kept is damaged, or of other settings.
    """
    file = out / FILE
    ratios = {} if base.force else _kept(file, base)
    missing = [method for method in methods if method not in ratios]
    if missing and is_here(base.data, base.data_dir):
        if not base.quiet:
            sys.stderr.write("how many epochs fit into the time of bp?\n")
        ratios = {**ratios, **_measured(base, [*missing, BASELINE])}
        kept = {"config": base.to_dict(), "ratio_to_bp": ratios}
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return {
        method: max(1, int(base.epochs * ratio))
        for method, ratio in ratios.items()
        if method in methods
    }


def _measured(base: TrainConfig, methods: Sequence[str]) -> Mapping[str, float]:
    """Measure samples per second against bp, in turns; methods that cannot run are left out."""
    plain = replace(base, resume=None, dry_run=False)
    results = bench(BenchConfig(plain, ",".join(dict.fromkeys(methods))))["results"]
    ratios = {
        one["method"]: one["ratio_to"][BASELINE]["median"]
        for one in results
        if BASELINE in one["ratio_to"]
    }
    return {**ratios, BASELINE: 1.0}


def _kept(file: Path, base: TrainConfig) -> dict[str, float]:
    """Read what was measured before; nothing if nothing was."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        ratios = {str(method): float(ratio) for method, ratio in kept["ratio_to_bp"].items()}
        if not all(ratio > 0 for ratio in ratios.values()):
            raise ValueError("a ratio is not above 0")
        before = TrainConfig.from_dict(kept["config"], str(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "What a comparison in equal time has measured must be readable",
            f"{file}: {type(error).__name__}: {error}",
            "Delete it to measure again",
        ) from error
    changed = changed_settings(before, base, ignored=FREE)
    if changed:
        raise InputError(
            "A comparison in equal time must go on with the settings that it was measured with",
            f"{file} is of others: {', '.join(changed)}",
            "Choose another folder with --out, or start anew with --force",
        )
    return ratios
