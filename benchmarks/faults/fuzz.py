"""Read many damaged files with every parser and loader, and print a table of what came of it.

    python benchmarks/faults/fuzz.py --inputs 100000 --seed 0

An input passes if it is read, or refused with an error of ours, within the time and the memory
allowed. The last columns should be empty.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from hostile import damaged, targets
from scpl.errors import ScplError


class TooLong(BaseException):
    """An input took longer than is allowed several times over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one input")
    parser.add_argument("--memory", type=float, default=2.0, help="GB besides that at the start")
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--show", type=int, default=1, help="tracebacks of each kind of failure")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [each for each in targets(Path(folder)) if options.only in each.name]
        for each in chosen:
            each.attempt(each.valid)  # whatever is loaded once is loaded now
        before = _mapped()
        limit = before + int(options.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        failed = _tried(chosen, options)
    sys.exit(1 if failed else 0)


def _tried(chosen: list, options: argparse.Namespace) -> int:
    print("| target | inputs | read | refused | slowest, s | tracebacks | too slow |")
    print("|---|---|---|---|---|---|---|")
    kinds: Counter[str] = Counter()
    share = -(-options.inputs // len(chosen))
    for each in chosen:
        draw = random.Random(f"{options.seed} {each.name}")
        counts: Counter[str] = Counter()
        slowest = 0.0
        for _ in range(share):
            content = damaged(each.valid, draw)
            started = time.process_time()
            signal.setitimer(signal.ITIMER_REAL, 20 * options.seconds)
            try:
                each.attempt(content)
                counts["read"] += 1
            except ScplError:
                counts["refused"] += 1
            except (Exception, TooLong) as error:
                counts["failed"] += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{each.name}: {type(error).__name__} in {last.name}, line {last.lineno}"
                kinds[kind] += 1
                if kinds[kind] <= options.show:
                    traceback.print_exc()
                    sys.stderr.write(f"{kind}, of {content[:300]!r}\n")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            # Processor time: another program on this machine makes nothing slow.
            seconds = time.process_time() - started
            slowest = max(slowest, seconds)
            counts["slow"] += seconds > options.seconds
        each.path.write_bytes(each.valid)
        print(
            f"| {each.name} | {share:,} | {counts['read']:,} | {counts['refused']:,} "
            f"| {slowest:.2f} | {counts['failed'] or ''} | {counts['slow'] or ''} |",
            flush=True,
        )
        kinds["slow"] += counts["slow"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\n{share * len(chosen):,} inputs, seed {options.seed}; peak memory {peak / 1e6:.2f} GB")
    for kind, count in kinds.most_common():
        if count:
            print(f"{count:,} x {kind}")
    return sum(kinds.values())


def _mapped() -> int:
    """Bytes of address space, which is what can be limited."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _too_long(*_: object) -> None:
    raise TooLong


if __name__ == "__main__":
    main()
