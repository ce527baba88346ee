"""What does it cost that nothing is lost? Two processes that save and show signs of life, or not.

    python benchmarks/faults/cost.py --pairs 40

The same two processes train blocks of 50 steps, by turns with a checkpoint of every stage in the
middle of the block (checksums, fsync, and room on the disk looked at) and the watchdog that writes
and reads sealed signs of life, and with neither. Two blocks make a pair, in an order that changes,
so that a machine that slows down slows both. The figure is the ratio of their steps per second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from statistics import median, quantiles

STEPS = 50
"""Of a block, and from one checkpoint to the next."""

BATCH = 64


def rank(name: str, pairs: int) -> None:
    """Be one of two ranks; the last prints a line of JSON for each pair."""
    import torch

    import scpl
    from scpl import models
    from scpl.engine.watchdog import Watchdog

    safe = threading.Event()
    safe.set()

    class Gate(threading.Event):
        """Ends no wait while safety is off, so that the watchdog does nothing in that time."""

        def wait(self, timeout: float | None = None) -> bool:
            while not super().wait(timeout):
                if safe.is_set():
                    return False
            return True

    watch = Watchdog._run

    def gated(self: Watchdog) -> None:
        self._closing = Gate()
        watch(self)

    Watchdog._run = gated  # type: ignore[method-assign]

    class Switched(scpl.Checkpoints):
        def is_due(self, step: int) -> bool:
            return safe.is_set() and super().is_due(step)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = models.build(
        name, num_classes=10, in_channels=3, image_size=32, width=0.5 if name == "vgg8" else 1.0
    )
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    ranks = scpl.connect()
    parts = scpl.split(network, before=models.paper_cuts(name), example=batch[0][:2])
    with tempfile.TemporaryDirectory() as folder:
        pipeline = scpl.Pipeline(
            parts,
            scpl.SCPL(),
            lambda p: torch.optim.Adam(p, lr=1e-4),
            checkpoints=Switched(folder, every=STEPS),
            ranks=ranks,
        )

        def block(is_safe: bool) -> list[float]:
            (safe.set if is_safe else safe.clear)()
            begin, used = time.perf_counter(), time.process_time()
            pipeline.train([batch] * STEPS)
            return [time.perf_counter() - begin, time.process_time() - used]

        pipeline.train([batch] * (STEPS // 2))  # so that a checkpoint is due within a block
        block(True)
        for number in range(pairs):
            order = (True, False) if number % 2 else (False, True)
            took = {is_safe: block(is_safe) for is_safe in order}
            everyone = ranks.exchange(f"cost {number}", [took[True], took[False]])
            if ranks.mesh.is_last:
                walls = [max(one[place][0] for one in everyone) for place in (0, 1)]
                works = [sum(one[place][1] for one in everyone) for place in (0, 1)]
                print(json.dumps([walls, works]), flush=True)
        safe.set()
        pipeline.close()
        ranks.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("small-cnn", "vgg8"), default="small-cnn")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.model, options.pairs)
        return
    from scpl.engine.local import local_ranks

    words = [sys.executable, __file__, "--rank", "--model", options.model]
    words += ["--pairs", str(options.pairs)]
    ratios: dict[str, list[float]] = {"wall-clock": [], "processor": []}
    with local_ranks(2) as places:
        started = [
            subprocess.Popen(
                words,
                env={**os.environ, **place, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for place in places
        ]
        last = started[-1].stdout
        assert last is not None
        for number, line in enumerate(last):
            for clock, (on, off) in zip(ratios, json.loads(line), strict=True):
                ratios[clock].append(off / on)
            print(
                f"pair {number}: throughput with, of that without: {ratios['wall-clock'][-1]:.3f} "
                f"by the clock, {ratios['processor'][-1]:.3f} by processor time",
                flush=True,
            )
        codes = [process.wait(timeout=60) for process in started]
        if any(codes):
            sys.exit("A rank failed")
    for clock, values in ratios.items():
        low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
        print(
            f"throughput with, of that without ({clock}), {len(values)} pairs: "
            f"{median(values):.3f} ({low:.3f} .. {high:.3f})"
        )


if __name__ == "__main__":
    main()
