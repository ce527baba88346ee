"""`scpl predict`: classify the user's own inputs with a finished run."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from scpl.app.config import PredictConfig
from scpl.app.environment import set_threads
from scpl.app.inputs import modality_named
from scpl.app.use.evaluate import compute_logits, open_run
from scpl.errors import InputError

__all__ = ["predict"]


def predict(config: PredictConfig, out: TextIO) -> None:
    """Classify inputs and write a line for each, batch by batch.

    Args:
        config: Which run, which inputs, how many classes for each.
        out: Where the lines go.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        DataError: before anything, if an input is missing; at the end, if some could not be read.
    """
    folder, trained, network, description, device = open_run(config)
    classes, top, size = description["classes"], config.top, config.batch_size
    for flag, value, most in (("--top", top, len(classes)), ("--batch-size", size, 1 << 16)):
        if not 1 <= value <= most:
            raise InputError(f"{flag} must lie in 1 .. {most}", f"Got {value}")
    set_threads(trained.run.threads, 1)
    precision = trained.optimizer.precision
    modality = modality_named(description)
    columns = _row(dict.fromkeys(modality.COLUMNS, ""), [""] * top, [0.0] * top)
    table = csv.DictWriter(out, list(columns), lineterminator="\n")
    batches = modality.pending(config, folder, description)
    if not config.json:
        table.writeheader()
    for names, inputs in batches:
        best = compute_logits(network, inputs, device, precision).softmax(1).topk(top)
        chances, indices = best.values.tolist(), best.indices.tolist()
        for number, name in enumerate(names):
            labels = [classes[index] for index in indices[number]]
            row = _row(name, labels, chances[number])
            if config.json:
                out.write(json.dumps(row) + "\n")
            else:
                table.writerow(row)
        out.flush()


def _row(
    name: Mapping[str, Any], labels: Sequence[str], chances: Sequence[float]
) -> dict[str, str | float]:
    """One input's line: its name, label, probability, label2, probability2, ..."""
    row: dict[str, str | float] = dict(name)
    for place, (label, chance) in enumerate(zip(labels, chances, strict=True), start=1):
        number = "" if place == 1 else place
        row |= {f"label{number}": label, f"probability{number}": round(chance, 6)}
    return row
