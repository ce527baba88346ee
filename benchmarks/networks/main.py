"""Which networks can be cut, and are they the same afterwards? Prints a table of many networks.

Each is cut automatically at 2, 3 and 4 stages, and compared with itself: outputs in evaluation mode
at batch sizes 1 to 17 and, where it takes sequences, at several lengths; outputs, gradients and
buffers in training mode. With --ranks it is trained for five steps on one process and on two, with
scpl and with its rivals, whose weights must be those of a plain loop.

usage: main.py [--only NAME ...] [--stages 2 3 4] [--ranks] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rank import plain
from torch import Tensor, nn
from zoo import ZOO, Entry

import scpl
from scpl.errors import PartitionError, ScplError
from scpl.partition.verify import BOTH_MODES, difference

HERE = Path(__file__).parent
QUICK = ("skip over every cut", "two inputs, two outputs", "data-dependent branch")
SIZES = ((1, 9), (2, 4), (3, 9), (5, 6), (8, 11), (13, 3), (17, 7))
RIVALS = ("bp-cut", "gpipe", "1f1b", "ddp")
EQUAL = "1 = 2 processes"
CLOSE = 1e-5
"""Gradients of micro-batches are added up in another order."""


def cut(entry: Entry, num_stages: int) -> dict[str, Any]:
    """Cut a network and compare it with itself."""
    torch.manual_seed(0)
    model, example = entry.build(), entry.batch(4, 9)
    keys = list(model.state_dict())
    begin = time.perf_counter()
    try:
        parts = scpl.split(model, num_stages=num_stages, example=example, output=entry.output)
    except PartitionError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - begin
    faults = []
    for rows, length in SIZES:
        modes = BOTH_MODES if rows > 1 else (False,)
        try:
            batch = parts.form.arrange(entry.batch(rows, length))
            fault = difference(model, parts, batch, modes, parts.unused)
        except ScplError as error:
            faults.append(f"{rows} rows, length {length}: {error}")
        else:
            faults += [f"{rows} rows, length {length}: {fault.what}"] if fault else []
    if list(model.state_dict()) != keys:
        faults.append("the network's keys have changed")
    return {
        "cuts": parts.cuts,
        "traced": parts.is_traced,
        "seconds": seconds,
        "faults": faults,
    }


def train(name: str, num_stages: int) -> dict[str, str]:
    """Train a network on one and on two processes."""
    found: dict[str, str] = {}
    alone = [sys.executable]
    both = [*alone, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with tempfile.TemporaryDirectory() as folder:
        _start(alone, folder, num_stages, "scpl", name)
        _start(both, folder, num_stages, ",".join(("scpl", *RIVALS)), name)
        states = {p.stem: torch.load(p, weights_only=False) for p in Path(folder).glob("*.pt")}
    ends = {key: value["state"] for key, value in states.items()}
    found[EQUAL] = _compared(ends.get("scpl-1"), ends.get("scpl-2"), exact=True)
    network, expected = ZOO[name].build(), plain(ZOO[name])
    has_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    for method in RIVALS:
        end = ends.get(f"{method}-2")
        if has_norm and method != "bp-cut" and end is not None:
            found[method] = "runs (BatchNorm)"
        else:
            found[method] = _compared(expected, end, exact=False)
    return found


def _start(launch: list[str], folder: str, num_stages: int, methods: str, name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    arguments = [str(HERE / "rank.py"), folder, str(num_stages), methods, name]
    done = subprocess.run(
        [*launch, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)


def _compared(
    one: dict[str, Tensor] | None, other: dict[str, Tensor] | None, *, exact: bool
) -> str:
    if one is None or other is None:
        return "failed"
    if one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one):
        return "equal"
    if exact:
        return "differs"
    apart = max(_apart(one[key].double(), other[key].double()) for key in one if one[key].numel())
    return "equal up to rounding" if apart <= CLOSE else f"differs by {apart:.1g}"


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value if that is above 1."""
    return float((one - other).abs().max() / one.abs().max().clamp(min=1.0))


def row(name: str, stages: list[int], *, ranks: bool) -> dict[str, Any]:
    entry = ZOO[name]
    cuts = {count: cut(entry, count) for count in stages}
    result: dict[str, Any] = {"network": name, "cuts": cuts}
    if ranks and "refused" not in cuts[stages[-1]]:
        result["trained"] = train(name, min(3, stages[-1]))
    return result


def as_table(rows: list[dict[str, Any]], stages: list[int]) -> str:
    """Write the results in Markdown."""
    columns = [f"{count} stages" for count in stages]
    with_ranks = any("trained" in each for each in rows)
    heads = ["network", "cut", *columns, *([EQUAL, *RIVALS] if with_ranks else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    notes = []
    for each in rows:
        cuts = each["cuts"]
        refused = next((c["refused"] for c in cuts.values() if "refused" in c), "")
        kinds = {c.get("traced") for c in cuts.values()} - {None}
        cells = [each["network"], "graph" if True in kinds else "chain" if kinds else "-"]
        for found in cuts.values():
            if "refused" in found:
                cells.append("refused")
            else:
                cells.append("equal" if not found["faults"] else "DIFFERS")
        if refused:
            notes.append(f"- {each['network']}: {refused.splitlines()[0]}")
        notes += [f"- {each['network']}: {f}" for c in cuts.values() for f in c.get("faults", [])]
        trained = each.get("trained", {})
        if with_ranks:
            cells += [trained.get(key, "-") for key in (EQUAL, *RIVALS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(ZOO)}")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument(
        "--ranks", action="store_true", help="train on one and on two processes, too"
    )
    parser.add_argument("--quick", action="store_true", help="three networks, two stages")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = options.only or (QUICK if options.quick else tuple(ZOO))
    stages = [2] if options.quick else options.stages
    unknown = [name for name in names if name not in ZOO]
    if unknown:
        parser.error(f"unknown networks: {', '.join(unknown)}; known are: {', '.join(ZOO)}")
    rows = []
    for name in names:
        rows.append(row(name, stages, ranks=options.ranks))
        if not options.json:
            print(as_table(rows[-1:], stages).splitlines()[2], flush=True, file=sys.stderr)
    if options.json:
        print(json.dumps({"results": rows, "torch": torch.__version__}))
    else:
        print(as_table(rows, stages))


if __name__ == "__main__":
    main()
