"""The command line. Torch is imported only after the arguments are understood."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from scpl import __version__
from scpl.app.config import TrainConfig, read_toml
from scpl.errors import (
    InputError,
    Interrupted,
    LinkError,
    RemoteError,
    ScplError,
    StageError,
    unknown_name,
)

__all__ = ["BENCH_EXAMPLES", "OVERVIEW", "main"]

Config = TypeVar("Config")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    status = run(list(sys.argv[1:] if arguments is None else arguments))
    if status and "RANK" in os.environ:
        # A rank that ends early may have threads blocked in a receive that nothing will answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name.

    Returns:
        Exit status: 0, 1 (the network's own code failed), 2 (bad input), or 128 + signal.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(OVERVIEW)
        return 0
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"scpl {__version__}\n")
        return 0
    try:
        command = COMMANDS.get(arguments[0])
        if command is None:
            raise unknown_name("A command", arguments[0], COMMANDS, "See `scpl --help`")
        return command(arguments[1:])
    except Interrupted as error:
        sys.stderr.write(f"{error}\n")
        return 128 + error.signal
    except StageError as error:
        if error.__cause__ is not None:
            import traceback

            traceback.print_exception(error.__cause__)
        sys.stderr.write(f"scpl: {error}\n")
        return 1
    except RemoteError:
        return 1  # the rank that failed has said why
    except LinkError as error:
        sys.stderr.write(f"scpl: {error}\n")
        return 1
    except ScplError as error:
        sys.stderr.write(f"scpl: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`scpl ... | head`): not an error of ours. Python
        # would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A full disk, a folder without rights: everywhere else a user's mistake like the others.
        sys.stderr.write(f"scpl: Files must be readable and writable. Got: {error}.\n")
        return 2


def _train(arguments: list[str]) -> int:
    config = _train_config(arguments)
    from scpl.app.launch import is_rank
    from scpl.app.train.preview import dry_run
    from scpl.app.train.resume import resumed_config
    from scpl.app.train.run import train

    if config.resume is not None:
        config = resumed_config(config, config.resume)
    if config.dry_run:
        return _show(dry_run(config), as_json=config.json)
    if config.processes > 1 and not is_rank():
        return _launch(config, arguments)
    summary = train(config)
    if summary is None:
        return 0
    _report(Path(summary["run"]), quiet=config.quiet)
    return _show(summary if config.json else None, as_json=True)


def _launch(config: TrainConfig, arguments: list[str]) -> int:
    """Start the ranks; they get this command with a folder that they can agree on."""
    from scpl.app.launch import launch
    from scpl.runs import RunFolder

    config.check()
    folder = config.resume or config.out
    if folder is None:
        name = f"{Path(config.data).name}-{config.model}-{config.method}"
        folder = RunFolder.free_name(Path("runs") / name)
        arguments = [*arguments, "--out", str(folder)]
    return launch(["train", *arguments], config.processes, config.max_restarts, folder)


def _train_config(arguments: list[str]) -> TrainConfig:
    """Read `[RECIPE] [FLAGS]`: defaults, then the recipe or resumed run, then the flags."""
    default = TrainConfig()
    resume = _value_of(arguments, "--resume")
    recipe, arguments = _recipe(arguments)
    if recipe is not None:
        from scpl.app.config import CompareConfig

        # A recipe may also say what `scpl compare` compares; that is not for one run.
        default = CompareConfig.from_recipe(recipe).train
    elif resume is not None and (Path(resume) / "config.toml").is_file():
        path = Path(resume) / "config.toml"
        default = TrainConfig.from_dict(read_toml(path), str(path))
    return _parse(TrainConfig, "train [RECIPE]", arguments, default)


def _compare(arguments: list[str]) -> int:
    from scpl.app.config import CompareConfig

    recipe, arguments = _recipe(arguments)
    default = CompareConfig.from_recipe(recipe)
    config = _parse(CompareConfig, "compare [RECIPE]", arguments, default)
    from scpl.app.compare.compare import compare

    result = compare(config)
    _show(result if config.train.json else None, as_json=True)
    return 1 if result["failures"] else 0


def _bench(arguments: list[str]) -> int:
    from scpl.app.config import BenchConfig

    recipe, arguments = _recipe(arguments)
    default = BenchConfig.from_recipe(recipe)
    config = _parse(BenchConfig, "bench [RECIPE]", arguments, default, BENCH_EXAMPLES)
    from scpl.app.bench.bench import bench
    from scpl.report import throughput_table

    result = bench(config)
    if config.train.json:
        _show(result, as_json=True)
    else:
        sys.stdout.write(throughput_table(result["results"]))
    return 1 if result["failures"] else 0


def _eval(arguments: list[str]) -> int:
    from scpl.app.config import EvalConfig

    config = _parse(EvalConfig, "eval RUN", arguments)
    from scpl.app.use.evaluate import evaluate
    from scpl.app.use.probe import probe

    readouts = {"readout_accuracy": probe(config)} if config.probe else {}
    return _show({**evaluate(config), **readouts}, as_json=config.json)


def _predict(arguments: list[str]) -> int:
    from scpl.app.config import PredictConfig

    config = _parse(PredictConfig, "predict RUN INPUT...", arguments)
    from scpl.app.use.predict import predict

    predict(config, sys.stdout)
    return 0


def _export(arguments: list[str]) -> int:
    from scpl.app.config import ExportConfig

    config = _parse(ExportConfig, "export RUN --to FILE", arguments)
    from scpl.app.use.evaluate import export

    return _show(export(config), as_json=config.json)


def _recipes(arguments: list[str]) -> int:
    from scpl.app.recipes import recipes

    sys.stdout.write(recipes(arguments))
    return 0


def _doctor(arguments: list[str]) -> int:
    from scpl.app.config import DoctorConfig

    config = _parse(DoctorConfig, "doctor", arguments)
    from scpl.app.doctor import doctor

    findings, healthy = doctor(config)
    _show(findings, as_json=config.json)
    return 0 if healthy else 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "bench": _bench,
    "eval": _eval,
    "predict": _predict,
    "export": _export,
    "recipes": _recipes,
    "doctor": _doctor,
}


def _parse(
    kind: type[Config],
    prog: str,
    arguments: list[str],
    default: Config | None = None,
    examples: str = "",
) -> Config:
    """Turn flags into a configuration; tyro answers --help and bad flags (exit status 2)."""
    keep: dict[str, Any] = {} if default is None else {"default": default}
    if examples:
        keep["description"] = f"{inspect.getdoc(kind)}\n{examples}"
    return tyro.cli(kind, prog=f"scpl {prog}", args=arguments, **keep)  # type: ignore[no-any-return]


def _recipe(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Take the recipe, if one is named, off the arguments."""
    if not arguments or arguments[0].startswith("-"):
        return None, arguments
    from scpl.app.recipes import find_recipe

    return find_recipe(arguments[0]), arguments[1:]


def _value_of(arguments: list[str], name: str) -> str | None:
    """Find a flag's value before the flags are parsed."""
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _report(folder: Path, *, quiet: bool) -> None:
    from scpl.report import write_run_report

    paths = write_run_report(folder)
    if not quiet:
        sys.stderr.write(f"{folder}: {', '.join(path.name for path in paths)}\n")


def _show(value: Any, *, as_json: bool) -> int:
    """Print a result: one JSON object, or aligned lines."""
    if value is None:
        return 0
    if as_json:
        sys.stdout.write(json.dumps(value) + "\n")
        return 0
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if not isinstance(value, dict):
        raise InputError("A result must be a dictionary", f"Got {type(value).__name__}")
    width = max(map(len, value))
    for name, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], str):
            sys.stdout.write("".join(f"{line}\n" for line in (f"{name}:", *item)))
        else:
            sys.stdout.write(f"{name:<{width}}  {item}\n")
    return 0


OVERVIEW = """\
Train one network across several devices without a backward pass between them.

usage: scpl COMMAND [OPTIONS]

commands:
  train     train a network from flags or a recipe
  compare   train the same network with several methods and compare them
  bench     measure how fast several methods train, in turns
  eval      test a trained run
  predict   classify images or texts with a trained run
  export    write a trained network as safetensors
  recipes   list, show or copy the recipes that come with scpl
  doctor    show versions and devices, and what is wrong

examples:
  scpl train                                    # handwritten digits, within a minute
  scpl train --data fashion-mnist --data-dir ~/data --epochs 3
  scpl train recipe.toml --lr 3e-4              # flags override the recipe
  scpl compare --methods scpl,early-exit,bp
  scpl bench --model vgg8 --data cifar10 --synthetic --processes 2
  scpl train --resume runs/digits-small-cnn-scpl

`scpl COMMAND --help` explains one command.
"""

BENCH_EXAMPLES = """
examples:
  scpl bench quick/digits
  scpl bench --model vgg8 --data cifar10 --synthetic --processes 2
  scpl bench --methods scpl,gpipe,ddp --processes 2 --steps 20 --json
"""
