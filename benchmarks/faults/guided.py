"""Fuzz every parser and loader, guided by coverage: what reaches new code is damaged further.

    pip install atheris
    python benchmarks/faults/guided.py --inputs 2000

Each target of `tests/hostile.py` has a process of its own, since libFuzzer never returns. An input
passes as in `fuzz.py`. Inputs that do not are kept in the folder `findings`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

LIMIT = 2_000_000_000  # bytes of address space besides what is mapped at the start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=2_000, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--findings", type=Path, default=Path("findings"))
    parser.add_argument("--target", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target is not None:
        fuzz(options)
        return
    from hostile import targets

    with tempfile.TemporaryDirectory() as folder:
        names = [target.name for target in targets(Path(folder))]
    print("| target | inputs | features reached, of the valid file and in all | findings |")
    print("|---|---:|---:|---|")
    total = failed = 0
    for place, name in enumerate(names):
        if options.only in name:
            count, features, findings = run(place, options)
            print(f"| {name} | {count:,} | {features} | {'; '.join(findings)} |", flush=True)
            total, failed = total + count, failed + len(findings)
    print(f"\n{total:,} inputs, seed {options.seed}")
    sys.exit(1 if failed else 0)


def run(place: int, options: argparse.Namespace) -> tuple[int, str, list[str]]:
    """Fuzz one target in a process of its own; returns inputs, features and kinds of findings."""
    words = [sys.executable, __file__, "--target", str(place), "--inputs", str(options.inputs)]
    words += ["--seed", str(options.seed), "--findings", str(options.findings)]
    ended = subprocess.run(words, capture_output=True, text=True, errors="replace")
    features = [int(number) for number in re.findall(r" ft: (\d+)", ended.stderr)]
    counts = re.findall(r"^#(\d+)\t", ended.stderr, re.MULTILINE)
    findings = sorted(set(re.findall(r"^FINDING (.*)$", ended.stdout, re.MULTILINE)))
    if ended.returncode or not counts:
        findings.append(f"ended with {ended.returncode}: {ended.stderr[-300:]!r}")
    reached = f"{features[0]:,}, {features[-1]:,}" if features else "none"
    return int(counts[-1]) if counts else 0, reached, findings


def fuzz(options: argparse.Namespace) -> None:
    """Be the process of one target."""
    import atheris

    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["scpl"]):
        import scpl.app.evaluate
        import scpl.data.images.load
        import scpl.data.text.load
        import scpl.engine.messages
        import scpl.report.pages  # noqa: F401
        from hostile import damaged, targets
        from scpl.errors import ScplError
    logging.disable()
    folder = tempfile.TemporaryDirectory()
    target = targets(Path(folder.name))[options.target]
    target.attempt(target.valid)  # whatever is loaded once is loaded now
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LIMIT, mapped + LIMIT))

    def attempt(content: bytes) -> None:
        begin = time.process_time()
        found = ""
        try:
            target.attempt(content)
        except ScplError:
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__} in {last.name}, line {last.lineno}"
        if time.process_time() - begin > 1:
            found = "above one second"
        if found:
            options.findings.mkdir(parents=True, exist_ok=True)
            name = f"{target.name}-{hashlib.sha256(content).hexdigest()[:16]}".replace("/", "-")
            (options.findings / name).write_bytes(content)
            print(f"FINDING {found}", flush=True)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        # libFuzzer's own changes find short ways; ours know what values parsers stumble over.
        if seed % 2:
            return bytes(atheris.Mutate(content, most))
        return damaged(content, random.Random(seed))[:most]

    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "valid").write_bytes(target.valid)
        most = max(20_000, 2 * len(target.valid))
        arguments = [f"-runs={options.inputs}", f"-seed={options.seed}", f"-max_len={most}"]
        # Time and memory are watched above, as errors that are counted, not as crashes.
        arguments += ["-timeout=60", "-rss_limit_mb=0", "-print_final_stats=0"]
        atheris.Setup([sys.argv[0], corpus, *arguments], attempt, custom_mutator=mutate)
        with contextlib.suppress(SystemExit):
            atheris.Fuzz()


if __name__ == "__main__":
    main()
