"""What does it cost that nothing is lost? Two processes that save and show signs of life, or not.

    python benchmarks/faults/cost.py --rounds 8

Each round trains the same steps twice, in an order that changes: with a checkpoint of every stage
each 50 steps (checksums, fsync, and room on the disk looked at) and the watchdog that writes and
reads sealed signs of life; and with neither. The figure is the ratio of the steps per second of the
two runs of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median, quantiles

EVERY = 50
WARM_UP = 10
BATCH = 64


def rank(safe: bool, name: str, steps: int) -> None:
    """Be one of two ranks; the last prints seconds of wall-clock, and each its processor time."""
    import torch

    import scpl
    from scpl import models
    from scpl.engine.watchdog import Watchdog

    torch.set_num_threads(1)
    if not safe:
        Watchdog._run = lambda self: None  # type: ignore[method-assign]
    torch.manual_seed(0)
    network, size = {
        "small-cnn": (models.build("small-cnn", num_classes=10, in_channels=3, image_size=32), 32),
        "vgg8": (models.build("vgg8", num_classes=10, in_channels=3, image_size=32, width=0.5), 32),
    }[name]
    batch = torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))
    ranks = scpl.connect()
    parts = scpl.split(network, before=models.paper_cuts(name), example=batch[0][:2])
    with tempfile.TemporaryDirectory() as folder:
        kept = scpl.Checkpoints(folder, every=EVERY) if safe else None
        pipeline = scpl.Pipeline(
            parts,
            scpl.SCPL(),
            lambda p: torch.optim.Adam(p, lr=1e-4),
            checkpoints=kept,
            ranks=ranks,
        )
        pipeline.train([batch] * WARM_UP)
        begin, used = time.perf_counter(), time.process_time()
        pipeline.train([batch] * steps)
        seconds, work = time.perf_counter() - begin, time.process_time() - used
        everyone = ranks.exchange("cost", [seconds, work])
        pipeline.close()
        ranks.close()
    if ranks.mesh.is_last:
        print(json.dumps([max(one[0] for one in everyone), sum(one[1] for one in everyone)]))


def run(safe: bool, name: str, steps: int) -> tuple[float, float]:
    """Start two ranks; returns seconds of wall-clock and of processors."""
    from scpl.engine.local import local_ranks

    words = [sys.executable, __file__, "--rank", "on" if safe else "off", name, str(steps)]
    with local_ranks(2) as places:
        started = [
            subprocess.Popen(
                words, env={**os.environ, **place, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
            )
            for place in places
        ]
        outs = [process.communicate(timeout=600)[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("A rank failed")
    wall, work = json.loads(b"".join(outs))
    return wall, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("small-cnn", "vgg8"), default="small-cnn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank[0] == "on", options.rank[1], int(options.rank[2]))
        return
    ratios: dict[str, list[float]] = {"wall-clock": [], "processor": []}
    for number in range(options.rounds):
        order = (True, False) if number % 2 else (False, True)
        found = {safe: run(safe, options.model, options.steps) for safe in order}
        for place, clock in enumerate(ratios):
            ratios[clock].append(found[False][place] / found[True][place])
        print(
            f"round {number}: {found[True][0]:.1f} s with, {found[False][0]:.1f} s without; "
            f"throughput {ratios['wall-clock'][-1]:.3f} by the clock, "
            f"{ratios['processor'][-1]:.3f} by processor time",
            flush=True,
        )
    for clock, values in ratios.items():
        low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
        print(
            f"throughput with, of that without ({clock}): {median(values):.3f} "
            f"({low:.3f} .. {high:.3f})"
        )


if __name__ == "__main__":
    main()
