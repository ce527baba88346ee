"""The same means for every method: the processes and threads that each one gets.

Methods that spread over several processes are compared with end-to-end training in one process:
with the threads of one of theirs (``bp``), and with as many as all of theirs together
(``bp-wide``, on a CPU the honest rival).
"""

from __future__ import annotations

from dataclasses import replace

from scpl.app.config import TrainConfig
from scpl.app.environment import share_of_cores
from scpl.methods import METHODS, WideBackpropagation

__all__ = ["config_for"]


def config_for(base: TrainConfig, method: str) -> TrainConfig:
    """Give one method of a comparison its share of what all have in common."""
    own = replace(base, method=base.method.for_method(method))
    layout, processes = METHODS[method].layout, base.run.processes
    if layout == "stages" or processes == 1:
        return own
    if layout == "replicas":
        return own.changed(spread=())  # every process has all stages
    threads = base.run.threads or share_of_cores(processes)
    if METHODS[method] is WideBackpropagation:
        threads *= processes
    return own.changed(processes=1, spread=(), threads=threads)
