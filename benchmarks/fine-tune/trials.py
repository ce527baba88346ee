"""Trials of what a stage of a pre-trained BERT reads its features through.

    python benchmarks/fine-tune/trials.py --model minilm --data-dir ~/data --head unit1+mlp

A plain loop with no part of scpl in it: stages one after the other, each with its own loss and
optimizer. Prints validation accuracy of every stage after each epoch, in percent.

A head is COPIES+READER. Copies, with weights of their own: none; unitN: the next N halves of
layers (attention, feed-forward part); nextN: the next N layers; lastN: the last N; rest: all that
follow. Readers: mlp: token mean, linear, GELU, linear; pooled-mlp: token mean, linear, ReLU,
linear, linear; lin: token mean, linear; pool: a copy of the network's pooler of the class token,
linear.
"""

import argparse
import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

SETS = {
    # name: files to learn from and validate on, texts to learn from, in all, most tokens
    "sst2": (["train_sentences", "validation"], 3000, None, 64),
    "ag_news": (["train_partial"], 4000, 8000, 96),
    "imdb": (["train"], 2000, 5000, 200),
}
WARM_UP, DECAY, HEAD_RATE, BATCH = 0.1, 0.01, 1e-3, 32


class Unit(nn.Module):
    """Half of a layer: its attention, or its feed-forward part."""

    def __init__(self, layer: Any, *, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        if attends:
            self.attention = layer.attention
        else:
            self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, hidden: Tensor, blocked: Tensor) -> Tensor:
        """Compute hidden vectors ``[N, L, C]`` of hidden vectors."""
        if self.attends:
            result = self.attention(hidden, blocked)
            return result[0] if isinstance(result, tuple) else result
        return self.output(self.intermediate(hidden), hidden)


class Head(nn.Module):
    """What a stage is read through."""

    def __init__(
        self, kind: str, network: Any, units: nn.ModuleList, at: int, classes: int
    ) -> None:
        super().__init__()
        copies, self.reader = kind.split("+")
        word = copies.rstrip("0123456789")
        count = int(copies.removeprefix(word) or 0)
        width = network.config.hidden_size
        chosen = {
            "none": range(0),
            "unit": range(at, at + count),
            "next": range(at, at + 2 * count),
            "last": range(len(units) - 2 * count, len(units)),
            "rest": range(at, len(units)),
        }[word]
        self.copies = nn.ModuleList(copy.deepcopy(units[i]) for i in chosen)
        self.pooler = copy.deepcopy(network.bert.pooler) if self.reader == "pool" else None
        self.between = {
            "mlp": nn.Sequential(nn.Linear(width, width), nn.GELU()),
            "pooled-mlp": nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 128)),
        }.get(self.reader, nn.Sequential())
        dropout = nn.Dropout(0.1 if self.reader in ("lin", "pool") else 0.0)
        self.classifier = nn.Sequential(
            dropout, nn.Linear(128 if self.reader == "pooled-mlp" else width, classes)
        )

    def forward(self, hidden: Tensor, mask: Tensor, blocked: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and what contrast compares."""
        for unit in self.copies:
            hidden = unit(hidden, blocked)
        if self.pooler is not None:
            read = self.pooler(hidden)
        else:
            read = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        read = self.between(read)
        return self.classifier(read), read

    def is_new(self, name: str) -> bool:
        """Whether a parameter starts from nothing."""
        return name.startswith(("between", "classifier"))


def texts(args: argparse.Namespace) -> tuple[list[Any], np.ndarray, int]:
    """Tokenise a data set, in an order that does not depend on the seed."""
    names, count, most, length = SETS[args.data]
    tables = [
        pq.read_table(next((args.data_dir / args.data).glob(f"{n}-*.parquet"))) for n in names
    ]
    order = np.random.default_rng(0).permutation(len(tables[0]))[:most]
    rows = [tables[0]["text"][int(i)].as_py() for i in order]
    labels = [tables[0]["label"][int(i)].as_py() for i in order]
    for table in tables[1:]:  # validated on
        rows += table["text"].to_pylist()
        labels += table["label"].to_pylist()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return [each.ids for each in tokenizer.encode_batch(rows)], np.array(labels), count


def batches(rows: list[Any], places: np.ndarray) -> Iterator[np.ndarray]:
    """Yield mini-batches of about equal lengths, from pools of fifty."""
    found = []
    for begin in range(0, len(places), 50 * BATCH):
        pool = sorted(places[begin : begin + 50 * BATCH], key=lambda i: len(rows[i]))
        found += [np.array(pool[i : i + BATCH]) for i in range(0, len(pool), BATCH)]
    return iter(found)


def padded(rows: list[Any], places: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Return tokens and their mask ``[N, L]``."""
    longest = max(len(rows[i]) for i in places)
    tokens, mask = np.zeros((len(places), longest), np.int64), np.zeros((len(places), longest))
    for row, place in enumerate(places):
        tokens[row, : len(rows[place])] = rows[place]
        mask[row, : len(rows[place])] = 1
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device).float()


def contrast(read: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss of standardised rows, divided by the positives + 1."""
    unit = functional.normalize((read - read.mean(0)) / (read.std(0) + 1e-5))
    own = torch.eye(len(target), dtype=torch.bool, device=target.device)
    similar = unit @ unit.T / temperature
    log_share = similar - similar.masked_fill(own, -1e9).logsumexp(1, keepdim=True)
    positive = (target[:, None] == target[None]) & ~own
    return -((log_share * positive).sum(1) / (positive.sum(1) + 1)).mean()


def trial(args: argparse.Namespace) -> None:
    """Train once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    random = np.random.default_rng(args.seed + 1)
    rows, labels, count = texts(args)
    classes = int(labels.max()) + 1
    network: Any = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=classes
    ).to(device)
    layers = network.bert.encoder.layer
    units = nn.ModuleList(Unit(each, attends=first) for each in layers for first in (True, False))
    cuts = args.cuts or [len(units) * k // args.stages for k in range(1, args.stages)]
    edges = [0, *cuts, len(units)]
    heads = [Head(args.head, network, units, cut, classes).to(device) for cut in cuts]
    steps = args.epochs * -(-count // BATCH)
    rising = int(WARM_UP * steps)
    optimizers, schedules = [], []
    for stage in range(len(edges) - 1):
        held: list[nn.Module] = list(units[edges[stage] : edges[stage + 1]])
        held += [network.bert.embeddings] if stage == 0 else []
        last = stage == len(heads)
        held += [network.bert.pooler] if last else []
        named = [(p, args.lr) for module in held for p in module.parameters()]
        if last:
            named += [(p, HEAD_RATE) for p in network.classifier.parameters()]
        else:
            head = heads[stage]
            named += [
                (p, HEAD_RATE if head.is_new(n) else args.lr) for n, p in head.named_parameters()
            ]
        kinds = sorted({(rate, DECAY if p.ndim > 1 else 0.0) for p, rate in named})
        groups = [
            {
                "params": [p for p, r in named if (r, DECAY if p.ndim > 1 else 0.0) == kind],
                "lr": kind[0],
                "weight_decay": kind[1],
            }
            for kind in kinds
        ]
        optimizers.append(torch.optim.AdamW(groups))
        schedules.append(
            torch.optim.lr_scheduler.LambdaLR(
                optimizers[-1],
                lambda step: min(
                    (step + 1) / (rising + 1), max(0.0, (steps - step) / max(1, steps - rising))
                ),
            )
        )

    def stages(places: np.ndarray) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield logits and what contrast compares, stage by stage."""
        hidden, mask = padded(rows, places, device)
        blocked = ((1 - mask) * torch.finfo(torch.float32).min)[:, None, None, :]
        for stage, (begin, end) in enumerate(pairwise(edges)):
            hidden = network.bert.embeddings(hidden) if stage == 0 else hidden.detach()
            for unit in units[begin:end]:
                hidden = unit(hidden, blocked)
            if stage < len(heads):
                yield (stage, *heads[stage](hidden, mask, blocked))
            else:
                pooled = network.bert.pooler(hidden)
                yield stage, network.classifier(network.dropout(pooled)), pooled

    for epoch in range(args.epochs):
        for module in (network, units, *heads):
            module.train()
        pools = list(batches(rows, random.permutation(count)))
        random.shuffle(pools)  # type: ignore[arg-type]
        for places in pools:
            target = torch.tensor(labels[places], device=device)
            for stage, logits, read in stages(places):
                loss = functional.cross_entropy(logits, target)
                if stage < len(heads) and args.cross_entropy < 1:
                    loss = args.cross_entropy * loss + (1 - args.cross_entropy) * contrast(
                        read, target, args.temperature
                    )
                loss.backward()
                trained = [p for g in optimizers[stage].param_groups for p in g["params"]]
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizers[stage].step()
                optimizers[stage].zero_grad()
                schedules[stage].step()
        for module in (network, units, *heads):
            module.eval()
        right = [0] * len(optimizers)
        with torch.no_grad():
            for places in batches(rows, np.arange(count, len(rows))):
                for stage, logits, _ in stages(places):
                    right[stage] += int((logits.argmax(1).cpu().numpy() == labels[places]).sum())
        shares = [f"{100 * each / (len(rows) - count):.2f}" for each in right]
        print(f"epoch {epoch + 1}: {' | '.join(shares)}", flush=True)


def main() -> None:
    """Read the options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, required=True, help="folder of a BERT")
    options.add_argument("--data-dir", type=Path, required=True, help="where data sets lie")
    options.add_argument("--data", choices=SETS, default="sst2")
    options.add_argument("--head", default="unit1+mlp", help="see above")
    options.add_argument("--stages", type=int, default=2, help="1: backpropagation")
    options.add_argument("--cuts", type=int, nargs="+", help="halves of layers before each cut")
    options.add_argument("--cross-entropy", type=float, default=1.0, help="the rest is contrast")
    options.add_argument("--temperature", type=float, default=0.1)
    options.add_argument("--lr", type=float, default=1e-4)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    trial(options.parse_args())


if __name__ == "__main__":
    main()
