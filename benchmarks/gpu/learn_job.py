"""One job of learn.py: train a network with a method, and keep its curve.

What a job is and what its results are can be read without torch, which takes seconds to import.
See README.md beside this file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from scpl.errors import InputError
from scpl.files import replacing, write_whole

if TYPE_CHECKING:
    import torch

    import scpl
    from scpl.data.images import Loader

PAPER = {
    "head": "mlp",
    "temperature": 0.1,
    "cross_entropy": 0.0,
    "standardise": False,
    "classifier_gradient": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "bp": {"method": "bp"},
    "scpl": {"method": "scpl"},
    "early-exit": {"method": "early-exit"},
    "predsim": {"method": "predsim"},
    "scpl-imitate": {"method": "scpl"},
    "scpl-paper": {"method": "scpl", **PAPER},
}
"""Settings by the names they have here, in the order in which they decide most."""

STEPS_BETWEEN_LOSSES = 10  # of which the mean over an epoch is made
SPARE = 1.2  # an epoch may take so much longer than the slowest so far
TIMED_BLOCKS, TIMED_STEPS, WARM_STEPS = 5, 50, 40


@dataclass(frozen=True)
class Job:
    """What is trained; everything that decides the numbers.

    Attributes:
        dataset: Its name.
        network: Its name.
        method: One of METHODS.
        seed: Of everything that is drawn.
        epochs: Passes over all training images.
        stages: Into how many the network is cut.
        batch_size: Images per mini-batch.
        image_size: Rows and columns; images of other sizes are resized.
        width: Factor on the channels.
        lr: The highest learning rate; None: the library's default.
        precision: Of the forward pass.
        every: Epochs between two tests.
    """

    dataset: str
    network: str
    method: str
    seed: int
    epochs: int
    stages: int = 4
    batch_size: int = 128
    image_size: int = 32
    width: float = 1.0
    lr: float | None = None
    precision: str = "bfloat16"
    every: int = 5

    @property
    def case(self) -> str:
        """What it has in common with the same job of other seeds."""
        return f"{self.dataset}-{self.network}-{self.method}"

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.case}-{self.seed}"

    def result(self, out: Path) -> dict[str, Any] | None:
        """Read its result, of this or another machine; None if there is none.

        Raises:
            InputError: if the one that is there was made with other settings.
        """
        path = out / f"{self.name}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        mine = asdict(self)
        other = [
            f"{key} {found['job'].get(key)} instead of {mine[key]}"
            for key in mine
            if found["job"].get(key) != mine[key]
        ]
        if other:
            raise InputError(
                "Results in one folder must be of the same settings",
                f"Got {path} with {', '.join(other)}",
                "Give the same flags, or another --out",
            )
        return found


@dataclass(frozen=True)
class Place:
    """Where and how a job runs; nothing of it decides what is learnt, but for rounding.

    Attributes:
        data: The file that `prepare` made.
        out: Folder of the results.
        checkpoints: Folder to go on from in a later call; None: a job that is cut short begins
            anew.
        device: Where to compute.
        graphs: Whether to replay captured CUDA graphs, where the library can.
        channels_last: Whether the weights of convolutions are laid out so.
        beside: How many other jobs may run on the device at the same time.
        until: When it must have ended, in seconds since 1970; None: no limit.
    """

    data: str
    out: str
    checkpoints: str | None
    device: str
    graphs: bool
    channels_last: bool = False
    beside: int = 0
    until: float | None = None


# ---- The data: read once, mapped by every job. ---------------------------------------------------


def prepare(dataset: str, image_size: int, data_dir: str | None, path: Path) -> None:
    """Decode a data set into a file of bytes that jobs can map."""
    from safetensors.torch import save_file

    from scpl.data import images

    folder = None if data_dir is None else Path(data_dir)
    found = images.load(dataset, data_dir=folder, image_size=image_size, download=False)
    tensors = {
        f"{kind}.{part}": getattr(split, part).contiguous()
        for kind, split in (("train", found.train), ("test", found.test))
        for part in ("images", "labels")
    }
    about = {"name": found.name, "classes": found.classes, "mean": found.mean, "std": found.std}
    with replacing(path) as draft:
        save_file(tensors, draft, {"about": json.dumps({**about, "flip": found.flip})})


def read(path: Path) -> Any:
    """Read what `prepare` wrote, as `scpl.data.images.ImageData`."""
    from safetensors import safe_open

    from scpl.data.images import ImageData, Split

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
        import torch

        seen: list[torch.Tensor] = []

        def look(report: scpl.Report) -> None:
            # Copied, for a replayed graph writes its next losses to the same place; and left on
            # the device, for a number could only be read by waiting.
            if report.step % STEPS_BETWEEN_LOSSES == 0 or not seen:
                totals = [torch.stack(list(terms.values())).sum() for terms in report.losses]
                seen.append(torch.stack(totals))

        self.pipeline.train(self.train, look)
        return [float(loss) for loss in torch.stack(seen).double().mean(0).tolist()]

    def synchronise(self) -> None:
        """Wait until everything that was asked for is done."""
        import torch

        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)


def set_up(job: Job, place: Place) -> Setup:
    """Build network, method, optimizer and data with the library's defaults."""
    import inspect

    import torch

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
    from scpl.app.environment import choose_device, describe_environment
    from scpl.app.inputs.base import ImageInputs
    from scpl.data.images import Augmentation, Loader
    from scpl.engine.checkpoint import Checkpoints

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
    if job.method == "scpl-imitate":
        from learn_imitation import imitation

        assert isinstance(method, scpl.SCPL)
        method = imitation(parts, method, inputs.example())
    plain = Augmentation("none", data.mean, data.std)
    basic = Augmentation("basic", data.mean, data.std, data.flip)
    batches: dict[str, Any] = {"batch_size": job.batch_size, "device": device}
    train = Loader(data.train, basic, shuffle=True, seed=job.seed, **batches)
    test = Loader(data.test, plain, **batches)
    chosen, steps = config.optimizer, job.epochs * len(train)
    folder = None if place.checkpoints is None else Path(place.checkpoints) / job.name
    graphs = place.graphs and "cuda_graphs" in inspect.signature(scpl.Pipeline).parameters
    pipeline = scpl.Pipeline(
        parts,
        method,
        optimizer_factory(config),
        scheduler=lambda optimizer: schedule(optimizer, steps, chosen.warmup, chosen.end_lr),
        precision=precision_of(config),
        seed=job.seed,
        checkpoints=Checkpoints(folder, keep=1) if folder else None,
        ranks=scpl.connect(device),
        **({"cuda_graphs": True} if graphs else {}),  # type: ignore[arg-type]
    )
    environment = describe_environment(device, torch.get_num_threads())
    environment.pop("command")  # that of this process tells nobody how to repeat it
    weights = [sum(p.numel() for p in stage.parameters) for stage in pipeline.stages]
    about = {
        "settings": {**asdict(chosen), "augmentation": "basic", "method": config.method.method,
                     "options": dict(config.method.options), "train_images": len(data.train)},
        "cuts": list(parts.cuts),
        "parameters": {"network": sum(p.numel() for p in network.parameters()),
                       "with_objectives": sum(weights)},
        "cuda_graphs": graphs,
        "channels_last": place.channels_last,
        "environment": environment,
    }  # fmt: skip
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
        pipeline = self.setup.pipeline
        if self.place.checkpoints is not None and (note := pipeline.restore()) is not None:
            self.curve = json.loads(note["curve"])
            self.beside = max(self.beside, int(note["beside"]))
        while pipeline.epoch < self.job.epochs and self._has_time():
            self._train_epoch()
        if pipeline.epoch < self.job.epochs and self.curve:
            self._test()
            if self.place.checkpoints is not None:
                pipeline.checkpoint(curve=json.dumps(self.curve), beside=self.beside)
        return self._write()

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
        from scpl.app.environment import peak_memory

        result = {
            "job": asdict(self.job),
            "finished": self.setup.pipeline.epoch >= self.job.epochs,
            "beside": self.beside,
            "seconds_per_epoch": typical_seconds(self.curve),
            "peak_memory_bytes": peak_memory(self.setup.pipeline.device),
            **self.setup.about,
            "curve": self.curve,
        }
        path = Path(self.place.out) / f"{self.job.name}.json"
        write_whole(path, json.dumps(result, indent=1, default=str) + "\n")
        return result


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
    path = Path(place.out) / f"time-{job.case}.json"
    write_whole(path, json.dumps(result, indent=1, default=str) + "\n")
    return result


def _endless(pipeline: scpl.Pipeline, loader: Loader) -> Any:
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
    import torch

    place, job = Place(**arguments["place"]), Job(**arguments["job"])
    if threads := arguments.get("threads"):
        torch.set_num_threads(threads)
    act: Callable[[Job, Place], Any] = measure if arguments.get("time") else _complete
    act(job, place)


def _complete(job: Job, place: Place) -> dict[str, Any]:
    return Run(job, place).complete()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
