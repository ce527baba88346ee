"""What the outputs of a network mean: one class per sample, any number of labels, or numbers.

All that depends on it stands here, in a file for each task: the form of a target, the loss of
outputs, which samples belong together, what is observed and measured, and how a prediction is
written.

May import: errors, measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scpl.tasks.base import KEPT, WORST, Task
from scpl.tasks.classes import MOST_CONFUSED, Classes
from scpl.tasks.labels import MultiLabel
from scpl.tasks.numbers import Regression

__all__ = [
    "KEPT",
    "MOST_CONFUSED",
    "TASKS",
    "WORST",
    "Classes",
    "MultiLabel",
    "Regression",
    "Task",
    "task_of",
]

TASKS: Mapping[str, type[Task]] = {each.kind: each for each in (Classes, MultiLabel, Regression)}
"""Every task by its name in configurations."""


def task_of(values: Mapping[str, Any]) -> Task:
    """Make a task again from `Task.to_json`.

    Raises:
        KeyError, TypeError, ValueError: if the values are damaged.
    """
    own = {k: tuple(map(float, v)) if isinstance(v, list) else v for k, v in values.items()}
    kind = str(own.pop("kind"))
    return TASKS[kind](**own)
