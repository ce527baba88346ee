"""The process of one job of learn.py: train a network with a method, and keep its curve."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from learn_imitation import imitation
from learn_job import METHODS, Job, Place
from safetensors import safe_open
from safetensors.torch import save_file

import scpl
from scpl.app.build import (
    build_method,
    build_network,
    cut_network,
    optimizer_factory,
    precision_of,
    schedule,
)
from scpl.app.config import TrainConfig
from scpl.app.environment import choose_device, describe_environment, peak_memory
from scpl.app.inputs.base import ImageInputs
from scpl.data import images
from scpl.data.images import Augmentation, ImageData, Loader, Split
from scpl.engine.checkpoint import Checkpoints
from scpl.errors import InputError
from scpl.files import replacing, write_whole

STEPS_BETWEEN_LOSSES = 10  # of which the mean over an epoch is made
SPARE = 1.2  # an epoch may take so much longer than the slowest so far
TIMED_BLOCKS, TIMED_STEPS, WARM_STEPS = 5, 50, 40


# ---- The data: read once, mapped by every job. ---------------------------------------------------


def prepare(dataset: str, image_size: int, data_dir: str | None, path: Path) -> None:
    """Decode a data set into a file of bytes that jobs can map."""
    folder = None if data_dir is None else Path(data_dir)
    write(images.load(dataset, data_dir=folder, image_size=image_size, download=False), path)


def write(data: ImageData, path: Path) -> None:
    """Write images for `read`."""
    tensors = {
        f"{kind}.{part}": getattr(split, part).contiguous()
        for kind, split in (("train", data.train), ("test", data.test))
        for part in ("images", "labels")
    }
    about = {"name": data.name, "classes": data.classes, "mean": data.mean, "std": data.std}
    with replacing(path) as draft:
        save_file(tensors, draft, {"about": json.dumps({**about, "flip": data.flip})})


def read(path: Path) -> ImageData:
    """Read what `write` wrote."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        train, test = (
            Split(file.get_tensor(f"{kind}.images"), file.get_tensor(f"{kind}.labels"))
            for kind in ("train", "test")
        )
    classes, mean, std = (tuple(about[key]) for key in ("classes", "mean", "std"))
    return ImageData(about["name"], train, test, classes, mean, std, about["flip"])


# ---- What is trained. ----------------------------------------------------------------------------


@dataclass
class Setup:
    """A pipeline with its data, ready to train."""

    pipeline: scpl.Pipeline
    train: Loader
    test: Loader
    about: dict[str, Any]

    def train_epoch(self) -> list[float]:
        """Train an epoch; the mean loss of every stage, over every tenth step of it."""
        seen: list[torch.Tensor] = []

        def look(report: scpl.Report) -> None:
            # Left on the device, for a number could only be read by waiting.
            if report.step % STEPS_BETWEEN_LOSSES == 0 or not seen:
                totals = [torch.stack(list(terms.values())).sum() for terms in report.losses]
                seen.append(torch.stack(totals))

        self.pipeline.train(self.train, look)
        return [float(loss) for loss in torch.stack(seen).double().mean(0).tolist()]

    def synchronise(self) -> None:
        """Wait until everything that was asked for is done."""
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)


def set_up(job: Job, place: Place) -> Setup:
    """Build network, method, optimizer and data with the library's defaults."""
    config = TrainConfig.of(
        data=job.dataset, validation=0.0, image_size=job.image_size, augmentation="basic",
        batch_size=job.batch_size, model=job.network, width=job.width, stages=job.stages,
        epochs=job.epochs, lr=job.lr, precision=job.precision, seed=job.seed, device=place.device,
        **METHODS[job.method],
    ).resolved()  # fmt: skip
    config.check()
    device = choose_device(place.device)
    data = read(Path(place.data))
    inputs = ImageInputs(data.channels, data.image_size, data.mean, data.std, job.width)
    network = build_network(config, inputs, data.num_classes)
    parts = cut_network(config, network, inputs, data.num_classes)
    if place.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method = build_method(config.method, config.rows)
    options = dict(config.method.options)
    if job.method == "scpl-imitate":
        assert isinstance(method, scpl.SCPL)
        method = imitation(parts, method, inputs.example())
        options["head"] = "learn_imitation.py"
    plain = Augmentation("none", data.mean, data.std)
    basic = Augmentation("basic", data.mean, data.std, data.flip)
    batches: dict[str, Any] = {"batch_size": job.batch_size, "device": device}
    train = Loader(data.train, basic, shuffle=True, seed=job.seed, **batches)
    test = Loader(data.test, plain, **batches)
    chosen, steps = config.optimizer, job.epochs * len(train)
    folder = place.folder_of(job)
    graphs = (
        place.graphs
        and device.type == "cuda"
        and "cuda_graphs" in inspect.signature(scpl.Pipeline).parameters
    )
    pipeline = scpl.Pipeline(
        parts,
        method,
        optimizer_factory(config),
        scheduler=lambda optimizer: schedule(optimizer, steps, chosen.warmup, chosen.end_lr),
        precision=precision_of(config),
        seed=job.seed,
        checkpoints=Checkpoints(folder, keep=1) if folder else None,
        ranks=scpl.connect(device),
        **({"cuda_graphs": True} if graphs else {}),
    )
    environment = describe_environment(device, torch.get_num_threads())
    environment.pop("command")  # that of this process tells nobody how to repeat it
    weights = [sum(p.numel() for p in stage.parameters) for stage in pipeline.stages]
    settings = {
        **asdict(chosen),
        "cuda_graphs": graphs,
        "augmentation": "basic",
        "train_images": len(data.train),
        "method": config.method.method,
        "options": options,
    }
    about = {
        "settings": settings,
        "cuts": list(parts.cuts),
        "parameters": {
            "network": sum(p.numel() for p in network.parameters()),
            "with_objectives": sum(weights),
        },
        "channels_last": place.channels_last,
        "environment": environment,
    }
    return Setup(pipeline, train, test, about)


# ---- Training, to the end or as far as time allows. ----------------------------------------------


class Run:
    """A job as it goes on.

    Attributes:
        curve: A row for each epoch: its number, the seconds of training so far, the loss of every
            stage; after every few epochs the test accuracy, too.
    """

    def __init__(self, job: Job, place: Place) -> None:
        self.job, self.place = job, place
        self.curve: list[dict[str, Any]] = []
        self.beside = place.beside
        self.setup = set_up(job, place)

    def complete(self) -> dict[str, Any]:
        """Train until all epochs are done or time is up; write the result, and return it."""
        with self.setup.pipeline:
            return self._complete()

    def _complete(self) -> dict[str, Any]:
        pipeline, folder = self.setup.pipeline, self.place.folder_of(self.job)
        if folder is not None and (note := pipeline.restore()) is not None:
            self._go_on(note)
        while pipeline.epoch < self.job.epochs and self._has_time():
            self._train_epoch()
        self._test()
        if folder is not None and pipeline.epoch < self.job.epochs:
            about = {"job": json.dumps(asdict(self.job)), "curve": json.dumps(self.curve)}
            pipeline.checkpoint(**about, beside=self.beside)
        elif folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return self._write()

    def _go_on(self, note: Mapping[str, Any]) -> None:
        """Take up where a checkpoint ends."""
        if json.loads(note["job"]) != asdict(self.job):
            raise InputError(
                "A checkpoint must be of the same settings",
                f"Got one of {self.job.name} with {note['job']} in {self.place.checkpoints}",
                "Give the same flags, or another --checkpoints",
            )
        self.curve = json.loads(note["curve"])
        self.beside = max(self.beside, int(note["beside"]))

    def _has_time(self) -> bool:
        """Whether another epoch fits; nobody knows how long the first one takes."""
        until, lengths = self.place.until, epoch_seconds(self.curve)
        if until is None or not self.curve:
            return True
        return time.time() + SPARE * max(lengths[-3:]) < until

    def _train_epoch(self) -> None:
        setup, job = self.setup, self.job
        before = self.curve[-1]["seconds"] if self.curve else 0.0
        setup.synchronise()
        begin = time.perf_counter()
        losses = setup.train_epoch()
        setup.synchronise()
        epoch = setup.pipeline.epoch
        seconds = before + time.perf_counter() - begin
        self.curve.append({"epoch": epoch, "seconds": seconds, "loss": losses})
        if epoch % job.every == 0 or epoch == job.epochs:
            self._test()
            self._write()

    def _test(self) -> None:
        if "accuracy" not in self.curve[-1]:
            found = self.setup.pipeline.evaluate(self.setup.test).result()
            self.curve[-1] |= {
                "accuracy": found.accuracy,
                "stage_accuracy": list(found.stage_accuracy),
            }

    def _write(self) -> dict[str, Any]:
        result = {
            "job": asdict(self.job),
            "finished": self.setup.pipeline.epoch >= self.job.epochs,
            "beside": self.beside,
            "seconds_per_epoch": typical_seconds(self.curve),
            "peak_memory_bytes": peak_memory(self.setup.pipeline.device),
            **self.setup.about,
            "curve": self.curve,
        }
        return _written(result, Path(self.place.out) / f"{self.job.name}.json")


def _written(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write a result, and return what is read."""
    text = json.dumps(result, indent=1)
    write_whole(path, f"{text}\n")
    read: dict[str, Any] = json.loads(text)
    return read


def epoch_seconds(curve: list[dict[str, Any]]) -> list[float]:
    """The seconds of training of every epoch."""
    ends = [0.0, *(row["seconds"] for row in curve)]
    return [end - begin for begin, end in pairwise(ends)]


def typical_seconds(curve: list[dict[str, Any]]) -> float | None:
    """The median of all epochs but the first, in which everything is made ready."""
    lengths = epoch_seconds(curve)
    return median(lengths[1:] or lengths) if lengths else None


def measure(job: Job, place: Place) -> dict[str, Any]:
    """Measure how long a step takes, with the batches of an epoch; write it beside the results."""
    setup = set_up(job, place)
    pipeline, blocks = setup.pipeline, []
    steps = _endless(pipeline, setup.train)
    for steps_now in (WARM_STEPS, *[TIMED_STEPS] * TIMED_BLOCKS):
        setup.synchronise()
        begin = time.perf_counter()
        for _ in islice(steps, steps_now):
            pass
        setup.synchronise()
        blocks.append((time.perf_counter() - begin) / steps_now)
    steps.close()
    pipeline.close()
    result = {
        "job": asdict(job),
        "seconds_per_step": median(blocks[1:]),
        "blocks": blocks[1:],
        "seconds_per_epoch": median(blocks[1:]) * len(setup.train),
        **setup.about,
    }
    return _written(result, Path(place.out) / f"time-{job.case}.json")


def _endless(pipeline: scpl.Pipeline, loader: Loader) -> Generator[scpl.Report, None, None]:
    """Steps of one epoch after the other."""
    while True:
        yield from pipeline.steps(loader)


# ---- The process. --------------------------------------------------------------------------------


def main(arguments: Mapping[str, Any]) -> None:
    """Do what learn.py wrote into the one argument of this process."""
    if "prepare" in arguments:
        told = arguments["prepare"]
        prepare(told["dataset"], told["image_size"], told["data_dir"], Path(told["path"]))
        return
    place, job = Place(**arguments["place"]), Job(**arguments["job"])
    if threads := arguments.get("threads"):
        torch.set_num_threads(threads)
    act: Callable[[Job, Place], Any] = measure if arguments.get("time") else _complete
    act(job, place)


def _complete(job: Job, place: Place) -> dict[str, Any]:
    return Run(job, place).complete()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
