"""The same means for every method: the processes and threads that each one gets.

Methods that spread over several processes are compared with end-to-end training in one process:
with the threads of one of theirs (``bp``), and with as many as all of theirs together
(``bp-wide``, on a CPU the honest rival).
"""

from __future__ import annotations

from dataclasses import replace

from scpl.app.build import share_of_cores
from scpl.app.config import TrainConfig, names
from scpl.errors import unknown_name
from scpl.methods import METHODS, WideBackpropagation

__all__ = ["FREE", "config_for", "method_names"]

FREE = frozenset(
    {"data_dir", "timeout", "max_restarts", "out", "force", "resume", "keep", "trace", "json",
     "quiet", "dry_run"}
)  # fmt: skip
"""What may differ between runs of one table: neither numbers nor speed depend on it."""


def method_names(text: str) -> list[str]:
    """Read ``--methods``: names separated by commas, or ``all``.

    Raises:
        InputError: if one is not known or stands there twice.
    """
    if text.strip() == "all":
        return list(METHODS)
    methods = names(text, "--methods")
    for method in methods:
        if method not in METHODS:
            raise unknown_name("--methods", method, [*METHODS, "all"])
    return methods


def config_for(base: TrainConfig, method: str) -> TrainConfig:
    """Give one method of a comparison its share of what all have in common."""
    kind = METHODS[method]
    own = replace(base, method=method)
    if kind.layout == "stages" or base.processes == 1:
        return own
    if kind.layout == "replicas":
        return replace(own, spread=())  # every process has all stages
    threads = base.threads or share_of_cores(base.processes)
    if kind is WideBackpropagation:
        threads *= base.processes
    return replace(own, processes=1, spread=(), threads=threads)
