"""The device computes what a CPU computes: networks, methods, precisions, layouts, compilers."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import scpl
from checks.base import Setup, Skipped, check, distance, require
from checks.subjects import (
    METHOD_NAMES,
    NUM_CLASSES,
    Learned,
    Task,
    adam,
    falls,
    image_batches,
    learn,
    make_pipeline,
    seeded,
    task_named,
    text_batches,
)  # fmt: skip
from scpl import models
from scpl.models.own import build_timm

ROUNDING = 3e-2
"""Two devices add up in another order, and training makes more of it from step to step."""
NARROW = 1e-1
"""Types with fewer digits, against float32."""
NEAR = {ROUNDING: 0.1, NARROW: 0.25}
"""By how much accuracies at the end may differ."""


def compare(setup: Setup, found: Learned, expected: Learned, what: str) -> str:
    """Compare curves, and accuracies at the end; both must have learned."""
    falls(found)
    falls(expected)
    assert setup.tolerance is not None
    text = setup.near(f"{what}: losses", distance(found.losses, expected.losses))
    apart, allowed = abs(found.accuracies[-1] - expected.accuracies[-1]), NEAR[setup.tolerance]
    require(apart <= allowed, f"{what}: accuracies {apart:.2f} apart (allowed {allowed})")
    return f"{text}; {found.summary()}"


def on_device_and_cpu(
    setup: Setup, task: Task, method: str, *, epochs: int = 3, **options: Any
) -> str:
    """Train on the device and on a CPU."""
    found, expected = (
        learn(make_pipeline(task, method, device, **options), task.batches, epochs)
        for device in (setup.device, "cpu")
    )
    return compare(setup, found, expected, f"{setup.device} and cpu")


@check(
    "network",
    {name: {"name": name} for name in (*models.known(), *models.known_text())},
    tolerance=ROUNDING,
    limit=90.0,
)
def networks(setup: Setup, name: str) -> str:
    """Under scpl a network learns on the device as on a CPU: losses of every stage, accuracy."""
    task = task_named(name, setup)
    # Deep ones make so much of a rounding error in 20 steps that the curves would say nothing.
    epochs = 8 // len(task.batches) if name in ("resnet34", "resnet50") else 3
    return on_device_and_cpu(setup, task, "scpl", epochs=epochs)


@check(
    "method",
    {
        f"{method}-{name}": {"method": method, "name": name}
        for method in METHOD_NAMES
        for name in ("small-cnn", "transformer")
        if method != "scpl"  # it trained every network
    },
    tolerance=ROUNDING,
)
def methods(setup: Setup, method: str, name: str) -> str:
    """A method learns on the device as on a CPU: losses of every stage, accuracy."""
    return on_device_and_cpu(setup, task_named(name, setup), method)


@check(
    "optimizer",
    {name: {"name": name} for name in ("small-cnn", "transformer")},
    tolerance=NARROW,
)
def optimizers(setup: Setup, name: str) -> str:
    """The commands' fused Adam, with a schedule and clipping, learns as on a CPU."""
    return on_device_and_cpu(
        setup, task_named(name, setup), "scpl", optimizer=adam, clip_norm=1.0,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
    )  # fmt: skip


@check(
    "precision",
    {
        f"{kind}-{name}": {"kind": kind, "name": name}
        for kind in ("bf16", "fp16", "send-bf16", "bf16-send-bf16")
        for name in ("vgg8", "transformer")
    },
    tolerance=NARROW,
)
def precisions(setup: Setup, kind: str, name: str) -> str:
    """Fewer digits, in the layers or on the way, learn as float32 does."""
    precision = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "send-bf16": scpl.Precision(send_as=torch.bfloat16),
        "bf16-send-bf16": scpl.Precision(torch.bfloat16, send_as=torch.bfloat16),
    }[kind]
    task = task_named(name, setup)
    narrow, full = (
        learn(
            make_pipeline(task, "scpl", setup.device, optimizer=adam, precision=each),
            task.batches,
        )
        for each in (precision, torch.float32)
    )
    return compare(setup, narrow, full, f"{kind} and float32")


@check("overflow")
def overflow(setup: Setup) -> str:
    """A step whose float16 gradients overflow is left out, and later ones are scaled less."""
    task = task_named("small-cnn", setup)
    pipeline = make_pipeline(task, "scpl", setup.device, precision=torch.float16)
    pipeline.train(task.batches[:1])  # the scale exists from here on
    stage, huge = pipeline.stages[0], 2.0**40
    assert stage.scaler is not None
    stage.scaler.update(huge)
    before = [parameter.detach().clone() for parameter in stage.parameters]
    pipeline.train(task.batches[:1])
    kept = all(map(torch.equal, before, stage.parameters))
    require(kept, "the parameters must stay as they were when gradients overflow")
    scale = stage.scaler.get_scale()
    require(scale == huge / 2, f"the scale must fall from 2^40 to 2^39; it is {scale:g}")
    stage.scaler.update(2.0**10)
    pipeline.train(task.batches[:1])
    require(not all(map(torch.equal, before, stage.parameters)), "later steps must count again")
    return f"scale 2^40 to 2^39, {len(before)} parameters of stage 0 as before"


@check(
    "channels-last",
    {name: {"name": name} for name in ("vgg8", "resnet18")},
    tolerance=ROUNDING,
)
def channels_last(setup: Setup, name: str) -> str:
    """Channels last in memory, a network learns as with contiguous maps."""
    task = task_named(name, setup)
    found, expected = (
        learn(make_pipeline(task, "scpl", setup.device, layout=layout), task.batches)
        for layout in (torch.channels_last, torch.contiguous_format)
    )
    return compare(setup, found, expected, "channels last and contiguous")


@check(
    "compile",
    {name: {"name": name} for name in ("mlp", "small-cnn", "transformer")},
    tolerance=ROUNDING,
    limit=240.0,
)
def compiled(setup: Setup, name: str) -> str:
    """Stages compiled one by one learn as plain ones, also with another size of the batch."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise Skipped("torch.compile needs a C compiler, and none is here")
    if setup.device == "cuda" and importlib.util.find_spec("triton") is None:
        raise Skipped("torch.compile needs triton on CUDA, and it is not here")
    if setup.device == "cpu" and name != "mlp":
        raise Skipped("compiling for a CPU takes long; the mlp stands for all")
    task = replace(task_named(name, setup), cuts=2)  # every stage is compiled several times
    found, expected = (
        learn(make_pipeline(task, "scpl", setup.device, compiled=on), task.batches)
        for on in (True, False)
    )
    return compare(setup, found, expected, "compiled and plain")


@check("transformers", {"bert": {"kind": "bert"}, "vit": {"kind": "vit"}}, tolerance=ROUNDING)
def pretrained(setup: Setup, kind: str) -> str:
    """A network of transformers, cut along its graph, learns on the device as on a CPU."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not here")
    task = bert_task(setup) if kind == "bert" else vit_task(setup)
    return on_device_and_cpu(setup, task, "scpl")


def bert_task(setup: Setup) -> Task:
    """A small BERT for texts with masks, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    def make() -> nn.Module:
        width = 16 if setup.tiny else 64
        config = BertConfig(
            vocab_size=60, hidden_size=width, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=2 * width, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=NUM_CLASSES,
        )  # fmt: skip
        return BertForSequenceClassification(config)

    batches = [
        ({"input_ids": tokens, "attention_mask": (tokens != 0).long()}, target)
        for tokens, target in text_batches(setup)
    ]
    return Task(seeded(make), 3, batches)


def vit_task(setup: Setup) -> Task:
    """A small ViT for images, without dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    def make() -> nn.Module:
        width = 16 if setup.tiny else 64
        config = ViTConfig(
            image_size=16, patch_size=4, hidden_size=width, num_hidden_layers=3,
            num_attention_heads=4, intermediate_size=2 * width, num_labels=NUM_CLASSES,
        )  # fmt: skip
        return ViTForImageClassification(config)

    batches = [({"pixel_values": x}, target) for x, target in image_batches(setup, 16)]
    return Task(seeded(make), 3, batches)


@check(
    "split",
    {name: {"name": name} for name in ("vgg8", "resnet18", "transformer", "lstm", "bert", "vit")},
    tolerance=ROUNDING,
)
def cut_there(setup: Setup, name: str) -> str:
    """A network that lies on the device is cut there as on a CPU, and learns the same."""
    if name in ("bert", "vit") and importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not here")
    makers = {"bert": bert_task, "vit": vit_task}
    task = makers[name](setup) if name in makers else task_named(name, setup)
    task = replace(task, cuts=3)
    there, here = task.split(setup.device), task.split()
    require(there.cuts == here.cuts, f"cuts must be the same; {there.cuts} and {here.cuts}")
    learned = [
        learn(scpl.Pipeline(parts, scpl.SCPL(), adam), task.batches, 1) for parts in (there, here)
    ]
    apart = setup.near("losses", distance(learned[0].losses, learned[1].losses))
    return f"{len(there.cuts)} cuts, {there.rounding or 'stages equal bit for bit'}; {apart}"


@check("timm", tolerance=ROUNDING)
def timm_network(setup: Setup) -> str:
    """A network of timm, cut along its graph, learns on the device as on a CPU."""
    if importlib.util.find_spec("timm") is None:
        raise Skipped("timm is not here")

    def make() -> nn.Module:
        offers = {"num_classes": NUM_CLASSES, "in_channels": 3}
        return build_timm("resnet10t", {"pretrained": False}, offers)

    return on_device_and_cpu(setup, Task(seeded(make), 3, image_batches(setup, 32)), "scpl")
