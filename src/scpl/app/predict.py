"""What a finished run says of the user's own inputs: `scpl predict`."""

from __future__ import annotations

import csv
import json
from typing import Any, TextIO

from scpl.app.config import PredictConfig
from scpl.app.environment import set_threads
from scpl.app.evaluate import Exits, compute_logits, open_run
from scpl.app.inputs import modality_named
from scpl.app.network import task_named
from scpl.errors import InputError

__all__ = ["predict"]


def predict(config: PredictConfig, out: TextIO) -> None:
    """Predict of the user's own inputs and write a line for each to `out`, batch by batch.

    In CSV, lists (of labels, of their probabilities) are written with ; between.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        DataError: before anything, if an input is missing; at the end, if some could not be read.
        InputError: for a flag that does not fit what the network predicts.
    """
    folder, trained, network, description, device = open_run(config, config.exit_threshold)
    task, classes = task_named(description), description["classes"]
    columns = task.columns(classes, config.top)
    if not 1 <= config.batch_size <= 1 << 16:
        raise InputError(f"--batch-size must lie in 1 .. {1 << 16}", f"Got {config.batch_size}")
    set_threads(trained.run.threads, 1)
    precision = trained.optimizer.precision
    modality = modality_named(description)
    exits = Exits(network, config.exit_threshold)
    # A number may be called like what names an input.
    apart = {n: f"predicted {n}" if n in modality.COLUMNS else n for n in columns}
    names_of = [*modality.COLUMNS, *apart.values()]
    if config.exit_threshold is not None:
        names_of.append("stages")
    table = csv.DictWriter(out, names_of, lineterminator="\n")
    batches = modality.pending(config, folder, description)
    if not config.json:
        table.writeheader()
    for names, inputs in batches:
        outputs = compute_logits(exits, inputs, device, precision)
        predicted = task.written(outputs, classes, config.top)
        for number, (name, values) in enumerate(zip(names, predicted, strict=True)):
            row = {**name, **{apart[column]: value for column, value in values.items()}}
            if exits.stages is not None:
                row["stages"] = int(exits.stages[number]) + 1
            if config.json:
                out.write(json.dumps(row) + "\n")
            else:
                table.writerow({column: _cell(value) for column, value in row.items()})
        out.flush()


def _cell(value: Any) -> Any:
    return ";".join(map(str, value)) if isinstance(value, list) else value
