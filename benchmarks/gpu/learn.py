"""What local learning reaches at full width and length, beside backpropagation.

Every job (a data set, a network, a method, a seed) is a process of its own, several at a time on
one GPU. Results of earlier calls, also of other machines, are kept. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from learn_job import METHODS, Job, Place
from learn_process import Worker, say
from learn_table import draw, table

from scpl.errors import InputError

START = 15.0  # seconds that a process takes until it trains
TO_END = 6.0  # seconds before the end of --seconds in which jobs write down what they have
TICK = 0.1
QUICK = {"datasets": ["digits"], "networks": ["vgg8"], "epochs": 2, "width": 1 / 16, "every": 1,
         "image_size": 16, "precision": "float32"}  # fmt: skip
FULL = {"datasets": ["cifar10", "fashion-mnist"], "networks": ["vgg8", "resnet18"], "epochs": 60,
        "width": 1.0, "every": 5, "image_size": 32,
        "precision": "bfloat16"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then show what is there; returns the exit status."""
    chosen = parsed(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    if not chosen.table:
        with tempfile.TemporaryDirectory(prefix="scpl-learn-") as folder:
            crew = Crew(chosen, Path(folder))
            try:
                failed = crew.work()
            finally:
                crew.end()
    print("\n".join(table(chosen.out)))
    if picture := draw(chosen.out):
        print(f"\nPicture: {picture}")
    return 1 if failed else 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="where data sets lie; default: $SCPL_DATA")
    add("--out", type=Path, default=Path("runs/gpu-learn"), help="folder of the results")
    add("--table", action="store_true", help="only show what is in --out")
    add("--device", help="default: cuda if there is one")
    add("--datasets", nargs="+", help="default: cifar10 fashion-mnist")
    add("--networks", nargs="+", help="default: vgg8 resnet18")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--epochs", type=int, help="default: 60")
    add("--stages", type=int, default=4)
    add("--batch-size", type=int, default=128)
    add("--image-size", type=int, help="default: 32")
    add("--width", type=float, help="factor on the channels; default: 1")
    add("--lr", type=float, help="highest learning rate; default: the library's")
    add("--precision", choices=["float32", "bfloat16", "float16"], help="default: bfloat16")
    add("--every", type=int, help="epochs between two tests; default: 5")
    add("--seconds", type=float, help="end by then; what cannot finish is not begun")
    add("--parallel", type=int, help="jobs at a time; default: 4 on a GPU, 1 on a CPU")
    add("--threads", type=int, help="CPU threads of a job; default: its share of the cores")
    add("--checkpoints", type=Path, help="keep jobs that are cut short here, to go on with later")
    add("--graphs", action=argparse.BooleanOptionalAction, default=True,
        help="replay CUDA graphs, where the library can")  # fmt: skip
    add("--channels-last", action="store_true", help="lay convolutions out so")
    add("--time-alone", action="store_true",
        help="only measure how long an epoch takes, one job at a time")  # fmt: skip
    add("--quick", action="store_true", help="narrow networks on the digits, not for quoting")
    chosen = parser.parse_args(arguments)
    for name, value in (QUICK if chosen.quick else FULL).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


def jobs_of(chosen: argparse.Namespace) -> Iterator[Job]:
    """All jobs, those first that decide most."""
    for seed in chosen.seeds:
        for dataset in chosen.datasets:
            for network in chosen.networks:
                for method in sorted(chosen.methods, key=list(METHODS).index):
                    yield Job(
                        dataset, network, method, seed, chosen.epochs, chosen.stages,
                        chosen.batch_size, chosen.image_size, chosen.width, chosen.lr,
                        chosen.precision, chosen.every,
                    )  # fmt: skip


class Crew:
    """The processes of one call.

    Args:
        chosen: The command line.
        folder: For decoded data.
    """

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen, self.folder = chosen, folder
        self.device = chosen.device or ("cuda" if has_gpu() else "cpu")
        on_gpu = self.device.startswith("cuda")
        self.parallel = 1 if chosen.time_alone else chosen.parallel or (4 if on_gpu else 1)
        self.threads = chosen.threads or max(1, cores() // self.parallel)
        self.until = None if chosen.seconds is None else time.time() + chosen.seconds
        self.jobs = list(jobs_of(chosen))
        if chosen.time_alone:
            self.jobs = [replace(job, seed=0) for job in self.jobs if job.seed == chosen.seeds[0]]
        self.preparing: dict[str, Worker] = {}
        self.working: list[tuple[Job, Worker]] = []

    def work(self) -> int:
        """Do all that is missing and fits into the time; returns how many jobs failed."""
        todo = [job for job in self.jobs if not self._is_done(job)]
        say(f"{len(todo)} of {len(self.jobs)} jobs to do, {self.parallel} at a time")
        for dataset in dict.fromkeys(job.dataset for job in todo):
            self.preparing[dataset] = self._prepare(dataset)
        failed = 0
        while todo or self.working:
            failed += self._reap()
            if self.until is not None and time.time() > self.until:
                say("Time is up")
                break
            if len(self.working) < self.parallel and (job := self._next(todo)) is not None:
                todo.remove(job)
                if self._is_prepared(job.dataset):
                    self._begin(job)
                else:
                    failed += 1
            elif not self.working and not any(self._could_begin(job) for job in todo):
                break
            else:
                time.sleep(TICK)
        for job in todo:
            say(f"{job.name}: not begun, for it could not be finished in time")
        return failed

    def end(self) -> None:
        """End what still runs."""
        for worker in (*self.preparing.values(), *(worker for _, worker in self.working)):
            worker.end()

    def _is_done(self, job: Job) -> bool:
        if self.chosen.time_alone:
            return bool((self.chosen.out / f"time-{job.case}.json").exists())
        result = job.result(self.chosen.out)
        return result is not None and bool(result["finished"])

    def _prepare(self, dataset: str) -> Worker:
        directory = self.chosen.data_dir and str(self.chosen.data_dir)
        told = {"dataset": dataset, "image_size": self.chosen.image_size, "data_dir": directory,
                "path": str(self._data(dataset))}  # fmt: skip
        log = self.chosen.out / f"{dataset}.log"
        return Worker.start(f"Reading {dataset}", log, {"prepare": told})

    def _data(self, dataset: str) -> Path:
        return self.folder / f"{dataset}.safetensors"

    def _is_prepared(self, dataset: str) -> bool:
        return self._data(dataset).exists()

    def _next(self, todo: Sequence[Job]) -> Job | None:
        """The first job that could begin, if what it learns from has been read (or cannot be)."""
        job = next((job for job in todo if self._could_begin(job)), None)
        if job is None:
            return None
        reader = self.preparing.get(job.dataset)
        if reader is not None:
            if reader.process.poll() is None:
                return None
            reader.succeeded()
            del self.preparing[job.dataset]
        return job

    def _could_begin(self, job: Job) -> bool:
        """Whether a job can be finished in time, as far as is known, or saved to go on with."""
        if self.until is None:
            return True
        left: float = self.until - TO_END - time.time() - START
        if self.chosen.checkpoints is not None or self.chosen.time_alone:
            return left > 0
        seconds = self._seconds_per_epoch(job)
        return left > (job.epochs * seconds if seconds is not None else 0)

    def _seconds_per_epoch(self, job: Job) -> float | None:
        """What this case would take beside what runs now, by what was measured; or nothing.

        It is the case's own time or else the slowest of the same network. Jobs beside each other
        are taken to share the device: a job that is left alone goes faster.
        """
        known: dict[tuple[str, str], float] = {}
        for other in self.jobs:
            result = other.result(self.chosen.out)
            if result is not None and result["seconds_per_epoch"] and self._like_here(result):
                key = (other.network, other.method)
                share = result["seconds_per_epoch"] / (result["beside"] + 1)
                known[key] = max(known.get(key, 0.0), share * (len(self.working) + 1))
        same = [seconds for (network, _), seconds in known.items() if network == job.network]
        return known.get((job.network, job.method), max(same, default=None))

    def _like_here(self, result: dict[str, Any]) -> bool:
        kind = self.device.partition(":")[0]
        return bool(result["environment"]["hardware"]["device"].startswith(kind))

    def _begin(self, job: Job) -> None:
        chosen = self.chosen
        place = Place(
            data=str(self._data(job.dataset)),
            out=str(chosen.out),
            checkpoints=chosen.checkpoints and str(chosen.checkpoints),
            device=self.device,
            graphs=chosen.graphs,
            channels_last=chosen.channels_last,
            beside=self.parallel - 1,
            until=None if self.until is None else self.until - TO_END,
        )
        told = {"job": asdict(job), "place": asdict(place), "threads": self.threads,
                "time": chosen.time_alone}  # fmt: skip
        self.working.append((job, Worker.start(job.name, chosen.out / f"{job.name}.log", told)))

    def _reap(self) -> int:
        """Take note of jobs that ended; returns how many failed."""
        failed = 0
        for job, worker in [each for each in self.working if each[1].process.poll() is not None]:
            self.working.remove((job, worker))
            if not worker.succeeded():
                failed += 1
            elif not self.chosen.time_alone and (result := job.result(self.chosen.out)):
                end = result["curve"][-1]
                say(
                    f"{job.name}: {100 * end['accuracy']:.2f} % after {end['epoch']} of "
                    f"{job.epochs} epochs, {result['seconds_per_epoch']:.2f} s per epoch with up "
                    f"to {result['beside']} beside it"
                )
        return failed


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, without importing torch."""
    return Path("/dev/nvidiactl").exists()


def cores() -> int:
    """Cores that this process may use."""
    limited = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
