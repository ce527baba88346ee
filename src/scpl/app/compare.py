"""`scpl compare`: the same network, data and settings under several methods."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from scpl import models
from scpl.app.bench.bench import bench, config_for
from scpl.app.build import build_loaders
from scpl.app.commands import BenchConfig, CompareConfig, method_names, names
from scpl.app.config import FREE_IN_A_COMPARISON, TrainConfig, changed_settings, write_toml
from scpl.app.inputs.base import DataSummary, changed_data
from scpl.app.launch import BAD_INPUT, INTERRUPTED
from scpl.app.probe import probe_run
from scpl.app.signals import end_signals
from scpl.data import is_here
from scpl.data.identity import identities_to_json
from scpl.errors import InputError, Interrupted, ScplError
from scpl.files import write_whole
from scpl.outside import parse_json, read_text
from scpl.report import Absent, Comparison, write_comparison_report
from scpl.report.groups import BASELINE
from scpl.runs import RunFolder

__all__ = ["compare", "epochs_in_equal_time"]

EQUAL_TIME = "equal_time.json"
VERDICT = "scpl: "  # how the command line begins the sentence that it ends with


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train every method with every seed, and write one report.

    Each run is a process of its own, so that its memory is its own and a failure ends nothing
    else. For each seed all methods run before the next seed begins. A method that cannot run in
    this setting (too few processes, a batch that cannot be divided) is left out and named.

    With ``equal="time"`` each method gets the epochs that fit into the time of ``bp``.

    Returns:
        ``results`` (one per method, see `scpl.report.Comparison.results`), ``target``, ``equal``,
        ``not_runnable`` (method to reason), ``failures`` (run to reason), ``report`` (files),
        ``command`` and ``environment``.

    Raises:
        InputError: for bad settings, or if no run succeeded.
        Interrupted: after Ctrl-C; the same command continues.
    """
    base, methods, seeds = _checked(config)
    out = base.run.out or Path("runs/compare")
    RunFolder(out).ensure()
    epochs = epochs_in_equal_time(base, methods, out) if config.equal == "time" else {}
    jobs = _jobs(base, methods, seeds, epochs, out)
    _check_same_data(base, list(jobs))
    done, absent = _run_all(base, jobs, out)
    if not done:
        reasons = "; ".join(f"{one.run}: {one.reason}" for one in absent)
        raise InputError("A comparison needs at least one run that ends", f"Got {reasons}")
    if config.probe:
        _probe(done, base.network.model, quiet=base.run.quiet)
    comparison = Comparison.read(
        done,
        f"{base.network.model} on {base.data.data}: {', '.join(methods)}"
        + (", in equal time" if config.equal == "time" else ""),
        target=config.target,
        absent=absent,
        command=shlex.join(["scpl", *sys.argv[1:]]),
    )
    written = write_comparison_report(out, comparison)
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    table = comparison.table()
    notes = "" if base.run.quiet else f"\n{textwrap.fill(table.footnote, width or 100)}\n"
    sys.stderr.write(f"\n{table.text(width)}{notes}\n{', '.join(map(str, written))}\n")
    target = comparison.target
    return {
        "results": comparison.results(),
        "target": target and {target.metric.name: target.score, "origin": target.origin},
        "equal": config.equal,
        "not_runnable": {one.run: one.reason for one in absent if not one.failed},
        "failures": {one.run: one.reason for one in absent if one.failed},
        "report": [str(path) for path in written],
        "command": comparison.command,
        "environment": dict(comparison.runs[0].environment),
    }


def _probe(done: Sequence[Path], model: str, *, quiet: bool) -> None:
    """Add the accuracy of linear probes to the summaries of the runs that have none."""
    for folder in done:
        try:
            found = probe_run(folder, model)
        except ScplError as error:  # the comparison is worth more than this picture
            sys.stderr.write(f"no linear probes of {folder.name}: {error}\n")
            continue
        if found and not quiet:
            by_stage = " | ".join(f"{100 * accuracy:.1f}" for accuracy in found)
            sys.stderr.write(f"linear probes of {folder.name}: {by_stage} %\n")


def _checked(config: CompareConfig) -> tuple[TrainConfig, list[str], list[int]]:
    """Check everything before the first run: common settings, methods, seeds."""
    methods = method_names(config.methods)
    config.train.check(methods)
    if config.target is not None and not 0 < config.target <= 1:
        raise InputError(
            "--target must be an accuracy (F1, R2) above 0 and at most 1",
            f"Got {config.target:g}",
            "Write 85 % as 0.85",
        )
    seeds = [_seed(text) for text in names(config.seeds, "--seeds")]
    if config.equal == "time" and BASELINE not in methods:
        raise InputError(
            f"--equal time gives every method the time that {BASELINE} takes",
            f"Got --methods {','.join(methods)}",
            f"Add {BASELINE} to them",
        )
    return config.train, methods, seeds


def _jobs(
    base: TrainConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    epochs: Mapping[str, int],
    out: Path,
) -> dict[Path, TrainConfig]:
    """All runs in their order, by folder.

    Methods that ``epochs`` does not name make as many passes as ``base`` says.
    """
    jobs = {}
    for seed in seeds:
        for method in methods:
            own = config_for(base, method)
            job = own.changed(seed=seed, epochs=epochs.get(method, own.chosen.epochs))
            jobs[out / f"{method}-seed{seed}"] = job
    return jobs


def _check_same_data(base: TrainConfig, folders: Sequence[Path]) -> None:
    """Check that runs which are trained now would learn from what the others of the table did.

    Raises:
        InputError: The data have changed since.
    """
    runs = [RunFolder(folder) for folder in folders]
    begun = [run for run in runs if run.description.is_file()]
    to_do = [run for run in runs if not run.summary.is_file()]
    if base.run.force or not (begun and to_do) or not is_here(base.data.data, base.data.data_dir):
        return
    try:
        data = DataSummary.of(build_loaders(base))
    except ScplError:
        return  # the runs themselves tell what is wrong with the data
    now = {"data": identities_to_json(data.identities)}
    for run in begun:
        if changed := changed_data(run.read_json(run.description), now, data.noun):
            raise InputError(
                "All runs of a comparison must be of the same data",
                f"{run.path} was trained on others: {'; '.join(changed)}",
                "Put the old data back, choose another folder with --out, or train all again with "
                "--force",
            )


def _run_all(
    base: TrainConfig, jobs: Mapping[Path, TrainConfig], out: Path
) -> tuple[list[Path], list[Absent]]:
    """Do all runs; returns the folders of those that ended well, and the others."""
    done: list[Path] = []
    absent: list[Absent] = []
    for number, (folder, job) in enumerate(jobs.items(), 1):
        method = job.method.method
        if any(one.run == method for one in absent):
            continue  # another seed changes nothing
        if not base.run.quiet:
            sys.stderr.write(f"[{number}/{len(jobs)}] {folder.name}\n")
        problem = _complete(folder, job, out)
        if problem is None:
            done.append(folder)
            continue
        name = folder.name if problem.failed else method
        absent.append(Absent(name, problem.reason, problem.failed))
        sys.stderr.write(f"{name} {absent[-1].words}\n")
    return done, absent


def _complete(folder: Path, job: TrainConfig, out: Path) -> Absent | None:
    """Make sure that a run is finished; return why it is not."""
    run, recipe = RunFolder(folder), out / f".{folder.name}.toml"
    if run.config.is_file() and not job.run.force:
        _check_same(run, job)
        if run.summary.is_file():
            return None
        arguments = ["--resume", str(folder), *(["--quiet"] if job.run.quiet else [])]
        if models.origin_of(job.network.model) == "factory":  # the user has named it to us
            arguments += ["--model", job.network.model]
    else:
        plain = job.changed(out=folder, resume=None, json=True, dry_run=False, force=False)
        recipe.write_text(write_toml(plain), encoding="utf-8")
        arguments = [str(recipe), *(["--force"] if folder.exists() else [])]
    status, reason = _run_child([sys.executable, "-m", "scpl", "train", *arguments])
    recipe.unlink(missing_ok=True)
    if not status:
        return None
    # A setting is refused before the first step; what breaks later has failed.
    began = run.steps.is_file() and run.steps.stat().st_size > 0
    return Absent(folder.name, reason, failed=began or status != BAD_INPUT)


def _run_child(command: list[str]) -> tuple[int, str]:
    """Run one training process; returns its exit status, and what it said last if that is not 0.

    Raises:
        Interrupted: if it was, or if a signal came that was passed on to it.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as child:
        assert child.stderr is not None
        last = ""
        received: list[signal.Signals] = []

        def pass_on(number: signal.Signals) -> None:  # the child saves and ends by itself
            received.append(number)
            with suppress(OSError):
                child.send_signal(number)

        with end_signals(pass_on):
            for line in child.stderr:
                # Whatever else is heard while several ranks end, ours is the verdict.
                if line.strip() and (line.startswith(VERDICT) or not last.startswith(VERDICT)):
                    last = line.strip()
                sys.stderr.write(f"    {line}")
            status = child.wait()
    if received or status in INTERRUPTED:
        saved = "The comparison was interrupted; everything is saved"
        error = Interrupted(saved, fix="The same command continues it")
        error.signal = received[0] if received else status - 128
        raise error
    if status < 0:
        return status, f"killed by signal {-status} ({signal.Signals(-status).name})"
    said = last.removeprefix(VERDICT)
    return status, said if status == BAD_INPUT else f"exit status {status}: {said}"


def _check_same(run: RunFolder, job: TrainConfig) -> None:
    """A kept run must be of the same configuration: two settings never share a table."""
    changed = changed_settings(TrainConfig.read(run.config), job, FREE_IN_A_COMPARISON)
    if changed:
        raise InputError(
            "All runs of a comparison must have the same settings",
            f"{run.path} was trained with others: {', '.join(changed)}",
            "Choose another folder with --out, or train it again with --force",
        )


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError("--seeds must be whole numbers", f"Got {text!r}") from error


def epochs_in_equal_time(base: TrainConfig, methods: Sequence[str], out: Path) -> dict[str, int]:
    """Measure how fast the methods train, and share out the time that ``bp`` takes.

    A schedule spans the epochs of a run, so a method that has time for more of them must know it
    from the first step. What was measured is kept in the folder of the comparison: the same
    command later trains the same runs.

    Returns:
        Epochs by method: whole ones, rounded down, at least 1. Methods that cannot run are left
        out, and so are all if the data is missing: their runs tell why.

    Raises:
        InputError: what was kept is damaged, or of other settings.
    """
    file = out / EQUAL_TIME
    ratios = {} if base.run.force else _kept(file, base)
    missing = [method for method in methods if method not in ratios]
    if missing and is_here(base.data.data, base.data.data_dir):
        if not base.run.quiet:
            sys.stderr.write("how many epochs fit into the time of bp?\n")
        ratios = {**ratios, **_measured(base, [*missing, BASELINE])}
        kept = {"config": base.to_dict(), "ratio_to_bp": ratios}
        write_whole(file, json.dumps(kept, indent=1) + "\n")
    return {
        method: max(1, int(base.chosen.epochs * ratio))
        for method, ratio in ratios.items()
        if method in methods
    }


def _measured(base: TrainConfig, methods: Sequence[str]) -> Mapping[str, float]:
    """Measure samples per second against bp, in turns; methods that cannot run are left out."""
    plain = base.changed(resume=None, dry_run=False)
    together = max(plain.method.options.get("accumulation", 1), 1)
    steps = -(-BenchConfig.steps // together) * together
    names = ",".join(dict.fromkeys(methods))
    results = bench(BenchConfig(plain, names, steps=steps))["results"]
    ratios = {one["method"]: one["ratio_to"].get(BASELINE) for one in results}
    return {**{name: ratio["median"] for name, ratio in ratios.items() if ratio}, BASELINE: 1.0}


def _kept(file: Path, base: TrainConfig) -> dict[str, float]:
    """Read what was measured before; nothing if nothing was."""
    try:
        kept = parse_json(read_text(file))
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
    changed = changed_settings(before, base, FREE_IN_A_COMPARISON)
    if changed:
        raise InputError(
            "A comparison in equal time must go on with the settings that it was measured with",
            f"{file} is of others: {', '.join(changed)}",
            "Choose another folder with --out, or start anew with --force",
        )
    return ratios
