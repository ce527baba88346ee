"""One rank of a small run; `test_stream.py` starts it once alone and then with several ranks.

usage: stream_job.py CASE OUT [--resume] [--slow] [--staged] [--replicas N ...] [--hosted N ...]
                     [--fail RANK HOW]
"""

import argparse
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import scpl
from scpl.partition.values import tree_map

sys.path.insert(0, str(Path(__file__).parent))
from networks import NUM_CLASSES, VOCABULARY, data, for_task, texts
from scpl import models

BATCHES = 6
EPOCHS = 4
SLOW_EPOCHS, SLOW_REPEATS = 6, 14  # a slow run has 6 epochs of 84 steps


class Mean(nn.Module):
    def forward(self, features):
        return features.mean(1)


def vgg():
    def unit(inputs, outputs):
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *unit(2, 8), *unit(8, 8), nn.MaxPool2d(2), *unit(8, 16), nn.MaxPool2d(2), *unit(16, 16),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def transformer(dropout=0.2):
    def block():
        return nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)

    return nn.Sequential(
        nn.Linear(4, 16), block(), block(), block(), block(), Mean(), nn.Linear(16, 3)
    )


def still():
    """Without dropout, and in float64: so that other orders of adding are all that differs."""
    return transformer(dropout=0.0).double()


def lstm():
    sizes = {"depth": 3, "width": 8, "dropout": 0.2, "hand_over": True}
    return models.build_text("lstm", num_classes=NUM_CLASSES, vocab_size=VOCABULARY, **sizes)


def masked_transformer():
    sizes = {"depth": 3, "width": 16, "heads": 2, "feed_forward": 16, "dropout": 0.2}
    return models.build_text("transformer", num_classes=NUM_CLASSES, vocab_size=VOCABULARY, **sizes)


CASES = {
    # name: network, cuts, shape of a sample, rows of every batch
    "vgg": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * BATCHES),
    "vgg-uneven": (vgg, ["1", "2", "11"], (2, 8, 8), [12] * BATCHES),
    "vgg-partial": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * (BATCHES - 1) + [5]),
    "vgg-al": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * (BATCHES - 1) + [5]),
    "vgg-mixed": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * BATCHES),
    "vgg-half": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * BATCHES),
    "vgg-rounded": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * BATCHES),
    "vgg-int8": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * BATCHES),
    "still-int8": (still, ["2", "3", "4"], (7, 4), [9, 4, 9, 1, 9, 3]),
    "vgg-labels": (vgg, ["3", "7", "11"], (2, 8, 8), [12] * (BATCHES - 1) + [5]),
    "vgg-views": (vgg, ["3", "7", "11"], (2, 8, 8), [24] * BATCHES),
    "transformer": (transformer, ["2", "3", "4"], (7, 4), [9] * BATCHES),
    "transformer-predsim": (transformer, ["2", "3", "4"], (7, 4), [9] * BATCHES),
    "transformer-numbers": (transformer, ["2", "3", "4"], (7, 4), [9] * BATCHES),
    "transformer-weighted": (transformer, ["2", "3", "4"], (7, 4), [9] * BATCHES),
    "transformer-ragged": (transformer, ["1", "2", "4"], (7, 4), [9, 4, 9, 1, 9, 3]),
    "still": (still, ["2", "3", "4"], (7, 4), [9, 4, 9, 1, 9, 3]),
    "still-al": (still, ["2", "3", "4"], (7, 4), [9, 4, 9, 1, 9, 3]),
    "still-predsim": (still, ["2", "3", "4"], (7, 4), [9] * BATCHES),
    "still-deinforeg": (still, ["2", "3", "4"], (7, 4), [9] * BATCHES),
    "still-labels": (still, ["2", "3", "4"], (7, 4), [9, 4, 9, 1, 9, 3]),
    # of texts: how long the longest of every batch is
    "lstm": (lstm, models.paper_cuts("lstm"), "text", [9, 4, 12, 1, 7, 9]),
    "transformer-masked": (
        masked_transformer,
        models.paper_cuts("transformer"),
        "text",
        [9, 4, 12, 1, 7, 9],
    ),
}
METHODS = {
    "vgg": scpl.SCPL(),
    "transformer": scpl.EarlyExit(),
    "vgg-al": scpl.AssociatedLearning(),
    "transformer-numbers": scpl.SCPL(),
    "transformer-predsim": scpl.PredSim(),
    "transformer-masked": scpl.SCPL(head="next"),
    "still": scpl.SCPL(),
    "still-al": scpl.AssociatedLearning(),
    "still-predsim": scpl.PredSim(),
    "still-deinforeg": scpl.DeInfoReg(),
    "lstm": scpl.EarlyExit(),
}
"""By case, or by its first word."""
TASKS = {
    "vgg-labels": "multi-label",
    "still-labels": "multi-label",
    "transformer-numbers": "regression",
    "transformer-weighted": "weighted",
}


def learning(case):
    """The optimizer of a case and its precision."""

    def grouped(params):
        rate = 1e-3 * (params.stage + 1)
        return torch.optim.AdamW(params.groups(weight_decay=0.1), lr=rate, fused=True)

    optimizer = grouped if case in ("vgg-half", "vgg-mixed") else adam
    send_as = torch.bfloat16 if case in ("vgg-rounded", "vgg-mixed") else None
    send_as = torch.int8 if case.endswith("int8") else send_as
    compute = torch.float16 if case == "vgg-half" else torch.float32
    return optimizer, scpl.Precision(compute, send_as)


def adam(params):
    return torch.optim.Adam(params, lr=1e-3)


class Slow(nn.Module):
    def forward(self, features):
        time.sleep(0.02 if self.training else 0.1)
        return features


def build(case, slow):
    network, cuts, shape, sizes = CASES[case]
    torch.manual_seed(11)
    model = network()
    batches = texts(sizes) if shape == "text" else data(shape, sizes)
    if case.endswith("views"):  # a batch holds two views of each image
        batches = [(x, torch.cat([y[: len(y) // 2]] * 2)) for x, y in batches]
    if network is still:
        batches = [(x.double(), y) for x, y in batches]
    if slow:
        layers = list(model)
        model = nn.Sequential(*layers[:-1], Slow(), layers[-1])
    if case == "vgg-mixed":
        model[:3].requires_grad_(False)
    learnt, batches = for_task(TASKS.get(case, "classes"), batches)
    parts = scpl.split(model, before=cuts, task=learnt, example=batches[0][0][:2])
    return parts, batches


def break_on_purpose(pipeline, how):
    if how == "raise":

        def forward(features):
            raise ValueError("broken on purpose")

        pipeline.stages[-1].body.forward = forward
        return
    # However long the disk takes: what is lost then is for other tests.
    pipeline._writer.wait()
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


def main():
    options = argparse.ArgumentParser()
    options.add_argument("case", choices=CASES)
    options.add_argument("out", type=Path)
    options.add_argument("--resume", action="store_true")
    options.add_argument("--slow", action="store_true")
    options.add_argument("--staged", action="store_true")
    options.add_argument("--replicas", nargs="+", type=int)
    options.add_argument("--hosted", nargs="+", type=int)
    options.add_argument("--fail", nargs=2)
    options = options.parse_args()
    torch.set_num_threads(1)
    ranks = scpl.connect(timeout=4.0, replicas=options.replicas, stages_per_rank=options.hosted)
    ranks.staged = options.staged  # as ranks do that compute on CUDA and talk over gloo
    mesh = ranks.mesh
    parts, batches = build(options.case, options.slow)
    method = METHODS.get(options.case) or METHODS[options.case.partition("-")[0]]
    optimizer, precision = learning(options.case)
    pipeline = scpl.Pipeline(
        parts,
        method,
        optimizer,
        scheduler=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 30),
        clip_norm=1.0,
        precision=precision,
        checkpoints=scpl.Checkpoints(options.out / "checkpoints", keep=9),
        ranks=ranks,
    )
    if options.resume:
        assert pipeline.restore() is not None
    losses, evaluations, memory = {}, [], []
    try:
        while pipeline.epoch < (SLOW_EPOCHS if options.slow else EPOCHS):
            for report in pipeline.steps(batches * SLOW_REPEATS if options.slow else batches):
                losses[report.step] = report.values()
                memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                if mesh.is_first and pipeline.step in (6, 10):
                    pipeline.checkpoint(remark="middle")
                if options.fail and mesh.rank == int(options.fail[0]) and pipeline.step == 8:
                    break_on_purpose(pipeline, options.fail[1])
            evaluations.append(pipeline.evaluate(batches))
        results = [scores.result() for scores in evaluations]
        details = [scores.details(range(parts.num_outputs)) for scores in evaluations]
        exported = pipeline.export().state_dict()
        if pipeline.has_exits:
            exported.update(pipeline.export_exits().state_dict())
        pipeline.close()
        ranks.close()
    except Exception as error:
        pipeline.abort()
        if ranks.fail(error, f"Rank {mesh.rank}: {error}"):
            sys.stderr.write(f"VERDICT rank {mesh.rank}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    torch.save(
        {
            "stages": {
                stage.index: tree_map(torch.clone, _plain(stage.state_dict()))
                for stage in pipeline.stages
            },
            "losses": losses,
            "evaluations": [vars(result) for result in results],
            "details": details,
            "exported": exported,
            "memory": memory,
            "bytes": pipeline.bytes_per_step,
            "wait": pipeline.timeline.wait_share(),
            "events": pipeline.timeline.events(),
        },
        options.out / f"rank-{mesh.rank}.pt",
    )


def _plain(state):
    """Numbers as tensors, so that states can be compared whole."""
    if isinstance(state, dict):
        return {str(key): _plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_plain(value) for value in state]
    if isinstance(state, (int, float)):
        return torch.tensor(state, dtype=torch.float64)
    return None if isinstance(state, str) else state


if __name__ == "__main__":
    main()
