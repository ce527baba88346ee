"""Live logs: the numbers of a run in tools that others look at runs with, while it trains.

A tool is imported when it is asked for, and only where results are written. One that fails says so
once, and the run goes on: its own files hold all numbers anyway.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, final

from scpl.data.extras import import_extra
from scpl.runs import RunFolder

__all__ = ["TOOLS", "Logs", "MLflow", "TensorBoard", "Tool", "WeightsAndBiases", "import_tools"]


class Tool(ABC):
    """One tool, for one run.

    What it writes goes into the run folder, unless the tool's own environment says otherwise.

    Args:
        folder: Of the run.
        config: Its settings.
        step: Training steps done before: more than 0 where a run is resumed.
        known: What `known` returned at an earlier start of this run; else nothing.
    """

    module: ClassVar[str]
    """What it is imported as."""
    takes_back: ClassVar[bool] = False
    """Whether it forgets what was logged after `step`, and takes it again."""

    @abstractmethod
    def __init__(
        self, folder: RunFolder, config: Mapping[str, Any], step: int, known: Mapping[str, Any]
    ) -> None: ...

    @abstractmethod
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers by name, as they are after this step."""

    @abstractmethod
    def end(self, *, finished: bool) -> None:
        """Write all that is on its way; ``finished`` says whether the run is at its end."""

    def known(self) -> dict[str, Any]:
        """What another start of this run must know to go on in the same log, in JSON values."""
        return {}


@final
class TensorBoard(Tool):
    """Event files in ``tensorboard/``."""

    module = "tensorboard"
    takes_back = True

    def __init__(
        self, folder: RunFolder, config: Mapping[str, Any], step: int, known: Mapping[str, Any]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = step + 1 if known else None
        path = str(folder.path / "tensorboard")
        self._writer: Any = SummaryWriter(path, purge_step=purged, flush_secs=5)
        if not known:
            lines = "\n".join(f"    {name} = {value}" for name, value in config.items())
            self._writer.add_text("config", lines, step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:  # noqa: D102
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def end(self, *, finished: bool) -> None:  # noqa: D102
        self._writer.close()

    def known(self) -> dict[str, Any]:  # noqa: D102
        return {"begun": True}


@final
class MLflow(Tool):
    """A run of MLflow, in ``mlflow/`` unless MLFLOW_TRACKING_URI says where."""

    module = "mlflow"

    def __init__(
        self, folder: RunFolder, config: Mapping[str, Any], step: int, known: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it prefers a data base by now
        tracking = importlib.import_module("mlflow.tracking")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder.path / "mlflow").absolute().as_uri()
        self._client = tracking.MlflowClient(uri)
        self._run = known.get("run")
        if self._run is not None:
            self._client.update_run(self._run, "RUNNING")
            return
        experiment = self._client.get_experiment_by_name("scpl")
        place = experiment.experiment_id if experiment else self._client.create_experiment("scpl")
        self._run = self._client.create_run(place, run_name=folder.path.name).info.run_id
        for name, value in config.items():
            self._client.log_param(self._run, name, value)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:  # noqa: D102
        for name, value in numbers.items():
            self._client.log_metric(self._run, name, value, step=step)

    def end(self, *, finished: bool) -> None:  # noqa: D102
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")

    def known(self) -> dict[str, Any]:  # noqa: D102
        return {"run": self._run}


@final
class WeightsAndBiases(Tool):
    """A run of Weights & Biases in ``wandb/``, offline unless WANDB_MODE says otherwise.

    ``wandb sync`` brings it to their server; all starts of a run have one name there.
    """

    module = "wandb"

    def __init__(
        self, folder: RunFolder, config: Mapping[str, Any], step: int, known: Mapping[str, Any]
    ) -> None:
        self._run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", "scpl"),
            name=folder.path.name,
            id=folder.run,
            resume="allow",
            config=dict(config),
            dir=str(folder.path),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings={"silent": True, "console": "off"},  # terminal and log are ours
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:  # noqa: D102
        self._run.log(dict(numbers), step=step)

    def end(self, *, finished: bool) -> None:  # noqa: D102
        self._run.finish(exit_code=0 if finished else 1)


TOOLS: Mapping[str, type[Tool]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
"""The tools by the names that --log takes."""


def import_tools(names: Sequence[str]) -> None:
    """Import the tools of these names, before there is anything to lose.

    Raises:
        InputError: if one is not installed.
    """
    for name in names:
        import_extra(TOOLS[name].module, name, f"--log {name}")


class Logs:
    """The tools of a run.

    Args:
        names: Which.
        folder: Of the run.
        config: Its settings by name.
        tell: Called with a sentence if a tool fails, which is left out from there on.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: RunFolder,
        config: Mapping[str, Any],
        tell: Callable[[str], object],
    ) -> None:
        self._names, self._folder, self._config, self._tell = names, folder, config, tell
        self._tools: dict[str, Tool] = {}
        self._until: dict[str, int] = {}  # the last step that each tool has

    def start(self, step: int) -> None:
        """Begin, or go on in the same logs, after so many training steps."""
        before = self._folder.read_json(self._folder.logged, optional=True) if self._names else {}
        for name in self._names:
            kept = before.get(name, {})
            made = partial(TOOLS[name], self._folder, self._config, step, kept.get("known", {}))
            tool = self._try(name, made)
            if tool is not None:
                self._tools[name] = tool
                self._until[name] = step if tool.takes_back else int(kept.get("until", -1))

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Log what is a number of these, by name: once for each step, in order.

        A tool that has a step already, from before a resume, does not get it again.
        """
        values = {k: float(v) for k, v in numbers.items() if isinstance(v, (int, float))}
        new = [name for name in self._tools if step > self._until[name]]
        self._until.update(dict.fromkeys(new, step))
        if new:
            self._remember()  # before: a kill in between costs a number, and doubles none
        for name in new:
            self._try(name, partial(self._tools[name].log, step, values))

    def end(self, step: int = 0, results: Mapping[str, float] | None = None) -> None:
        """Write all that is on its way; of a run that is at its end also what it came to."""
        for name, tool in list(self._tools.items()):
            if results:
                self._try(name, partial(tool.log, step, results))
            self._try(name, partial(tool.end, finished=bool(results)))
        self._tools = {}

    def _remember(self) -> None:
        about = {
            name: {"until": self._until[name], "known": tool.known()}
            for name, tool in self._tools.items()
        }
        self._folder.write_json(self._folder.logged, about)

    def _try(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a tool raises: no number of the run depends on it
            self._tools.pop(name, None)
            told = (str(error).splitlines() or [""])[0]
            self._tell(
                f"--log {name} failed and is left out from here on: {type(error).__name__}: {told}"
            )
            return None
