"""One rank that trains a small network with several methods in turn; `test_baselines.py` starts it.

usage: baseline_job.py OUT METHOD... [--micro-batches N] [--norm | --text] [--clip] [--decay]
    [--narrow] [--channels-last] [--accumulation N] [--compress TYPE] [--save-after STEP]
    [--resume [STEP]] [--task KIND]
"""

import argparse
import gc
import sys
import weakref
from pathlib import Path

import torch
from torch import nn

import scpl
from scpl.engine.ranks import connect
from scpl.methods import METHODS, MicroBatched
from scpl.models.transformer import Transformer

sys.path.insert(0, str(Path(__file__).parent))
from networks import VOCABULARY, data, for_task, texts

EPOCHS = 2


def network(normalise):
    torch.manual_seed(5)
    norm = nn.BatchNorm2d(8) if normalise else nn.GroupNorm(2, 8)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, padding=1),
        norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def task(options):
    """Return the network, where its stages begin, and batches of which the last is smaller."""
    if options.text:
        torch.manual_seed(5)
        sizes = {"depth": 3, "width": 8, "heads": 2, "feed_forward": 12, "dropout": 0.0}
        batches = texts(longest=(7, 4, 9), rows=8) + texts(longest=(5,), rows=6)
        return Transformer(3, VOCABULARY, **sizes), ["layer2", "layer3"], batches
    return network(options.norm), ["2", "4", "6"], data((2, 8, 8), [16, 16, 16, 6])


def decaying(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def train(out, name, ranks, options):
    """Two epochs with plain SGD, so that weights show gradients."""
    model, cuts, batches = task(options)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
        cuts = cuts[:1]  # so that the second rank begins with a convolution
    for layer in options.frozen:
        model.get_submodule(layer).requires_grad_(False)
    learnt, batches = for_task(options.task, batches)
    parts = scpl.split(model, before=cuts, task=learnt, example=batches[0][0][:2])
    kind = METHODS[name]
    sliced = issubclass(kind, MicroBatched) and name != "bp-cut"
    method = kind(options.micro_batches) if sliced else kind()
    if name == "ddp":
        method = kind(compress_gradients=options.compress, accumulation=options.accumulation)
    pipeline = scpl.Pipeline(
        parts,
        method,
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        scheduler=decaying if options.decay else None,
        clip_norm=0.5 if options.clip else None,
        checkpoints=out / "checkpoints" / name,
        precision=scpl.Precision(send_as=torch.bfloat16 if options.narrow else None),
        ranks=ranks,
    )
    if options.resume:
        assert pipeline.restore()["step"] == options.resume
    losses, evaluations = {}, []
    while pipeline.epoch < EPOCHS:
        for report in pipeline.steps(batches):
            losses[report.step] = report.values()
            if report.step == options.save_after:
                pipeline.checkpoint()
        evaluations.append(pipeline.evaluate(batches))
        if pipeline.epoch == 1 and options.save_after is None:
            pipeline.checkpoint()
    results = [vars(scores.result()) for scores in evaluations]
    details = evaluations[-1].details(range(parts.num_outputs))
    logits = pipeline.predict([inputs for inputs, _ in batches])
    exported = pipeline.export().state_dict()
    pipeline.close()
    events, bytes_per_step = pipeline.timeline.events(), pipeline.bytes_per_step
    weight = weakref.ref(next(model.parameters()))
    del pipeline, parts, model
    gc.collect()
    assert weight() is None, f"{name} keeps its network when nobody else does"
    return {
        "losses": losses,
        "evaluations": results,
        "details": details,
        "logits": logits,
        "exported": exported,
        "bytes": bytes_per_step,
        "events": events,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("methods", nargs="+", choices=METHODS)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--norm", action="store_true")
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--task", default="classes")
    parser.add_argument("--clip", action="store_true")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--decay", action="store_true")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--compress", default="none")
    parser.add_argument("--save-after", type=int)
    parser.add_argument("--resume", type=int, nargs="?", const=4)
    parser.add_argument("--frozen", type=lambda names: names.split(","), default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = connect(timeout=20.0)
    found = {name: train(options.out, name, ranks, options) for name in options.methods}
    rank = ranks.mesh.rank
    ranks.close()
    torch.save(found, options.out / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
