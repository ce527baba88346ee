"""What a finished run says of the user's own inputs: `scpl predict`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TextIO

import torch

from scpl.app.commands import PredictConfig
from scpl.app.environment import set_threads
from scpl.app.evaluate import Exits, compute_logits, open_run
from scpl.app.inputs import modality_named
from scpl.app.network import task_named, weights_epoch
from scpl.app.progress import Count
from scpl.app.rows import CsvRows, JsonRows, Row, Rows, new_file
from scpl.app.signals import Unbroken
from scpl.data.loader import prefetched
from scpl.errors import InputError, Interrupted

__all__ = ["predict"]

_STAGES = "stages"  # the column that says how many an input went through
_AHEAD = 2  # mini-batches that are read while the network computes


def predict(config: PredictConfig, out: TextIO) -> None:
    """Predict of the user's own inputs and write a row for each, mini-batch by mini-batch.

    However many inputs there are, only a few mini-batches of them are held.

    Args:
        config: What of, and how.
        out: Where rows are printed, unless the configuration names a file.

    Raises:
        CheckpointError: if the run is not finished or damaged.
        DataError: before anything, if an input is missing; at the end, if some could not be read:
            the rows of the others are written.
        InputError: for a flag that does not fit what the network predicts, or a file that cannot be
            written.
        Interrupted: if a signal to end came. What was printed are whole rows; a file is not
            written.
    """
    if config.json and config.out is not None:
        raise InputError(
            "--json is for what is printed",
            f"Got --out {config.out}",
            "Leave --json out; a file that ends in .jsonl holds JSON lines",
        )
    folder, trained, network, description, device = open_run(config, config.exit_threshold)
    task, classes = task_named(description), description["classes"]
    columns = task.columns(classes, config.top)
    if not 1 <= config.batch_size <= 1 << 16:
        raise InputError(f"--batch-size must lie in 1 .. {1 << 16}", f"Got {config.batch_size}")
    set_threads(trained.run.threads, 1)
    modality = modality_named(description)
    exits = Exits(network, config.exit_threshold)
    # A number may be called like what names an input, and what is kept like anything.
    before = {**modality.COLUMNS, **dict.fromkeys(config.keep, "")}
    apart = {n: f"predicted {n}" if n in before else n for n in (*columns, _STAGES)}

    def rows_of(names: Sequence[Row], outputs: torch.Tensor) -> Iterator[Row]:
        """Put together what names the inputs and what is predicted, ``outputs [N, C]``."""
        stages = [None] * len(names) if exits.stages is None else (exits.stages + 1).tolist()
        written = task.written(outputs, classes, config.top)
        for name, values, stage in zip(names, written, stages, strict=True):
            row = {**name, **{apart[column]: value for column, value in values.items()}}
            yield row if stage is None else {**row, apart[_STAGES]: stage}

    # All outputs above 0, so that lists of labels are not empty.
    (example,) = rows_of([before], torch.ones(1, len(classes)))
    if config.exit_threshold is not None:
        example = {**example, apart[_STAGES]: 1}
    pending = modality.pending(config, folder, description)
    chosen = weights_epoch(folder)
    if "best_by" in chosen:  # else it is the last one, as anyone would think
        sys.stderr.write(f"{folder.path}: the network after epoch {chosen['weights_epoch']}\n")
    count = Count(modality.SAMPLES, pending.total, None if config.out else out)
    # A thread that waits for standard input would keep us waiting, too.
    ahead = prefetched(pending.batches(count.say), _AHEAD, patient=not pending.waits)
    try:
        with Unbroken() as signals, _written(config, out, example) as rows, count, closing(ahead):
            for names, inputs in ahead:
                outputs = compute_logits(exits, inputs, device, trained.optimizer.precision)
                found = list(rows_of(names, outputs))
                with signals.unbroken():
                    rows.write(found)
                    count.add(len(found))
    except Interrupted as error:
        kept = (
            "What was printed are whole rows" if not config.out else f"{config.out} was not written"
        )
        told = Interrupted(f"Interrupted after {count.summary()}", kept)
        told.signal = error.signal
        raise told from None
    if config.out is not None:
        sys.stderr.write(f"{config.out}: {count.summary()}\n")
    pending.check(count.say)


def _written(config: PredictConfig, out: TextIO, example: Row) -> AbstractContextManager[Rows]:
    if config.out is not None:
        return new_file(config.out, example, force=config.force)
    return nullcontext(JsonRows(out) if config.json else CsvRows(out, list(example)))
