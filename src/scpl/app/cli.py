"""The command line. Torch is imported only after the arguments are understood."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, get_type_hints

import tyro

from scpl import __version__
from scpl.app.commands import (
    BenchConfig,
    CompareConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PredictConfig,
)
from scpl.app.config import MAIN, PARTS, MethodConfig, TrainConfig, flag, in_flags, method_options
from scpl.app.signals import die_with_launcher
from scpl.errors import (
    Interrupted,
    LinkError,
    RemoteError,
    ScplError,
    StageError,
    unknown_name,
)
from scpl.methods import METHODS
from scpl.methods.options import Option, help_of

__all__ = ["COMMANDS", "EXAMPLES", "OVERVIEW", "main", "run"]

Config = TypeVar("Config")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    die_with_launcher()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None, where there is no terminal at all
            # A name that its encoding lacks is shown escaped; it must not end a run.
            stream.reconfigure(errors="backslashreplace")
    status = run(list(sys.argv[1:] if arguments is None else arguments))
    if status > 128:
        # Only the exit is left to interrupt, and Python would do that with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if status and "RANK" in os.environ:
        # A rank that ends early may have threads blocked in a receive that nothing will answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run the command line with what follows the program's name.

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
        with warnings.catch_warnings():
            warnings.showwarning = _tell
            return command(arguments[1:])
    except Interrupted as error:
        sys.stderr.write(f"{error}\n")
        return 128 + error.signal
    except RemoteError as error:
        return error.status  # the rank that ended first has said why
    except ScplError as error:
        if isinstance(error, StageError) and error.__cause__ is not None:
            import traceback

            traceback.print_exception(error.__cause__)
        # What the library calls an argument is a flag here.
        sys.stderr.write(f"scpl: {in_flags(str(error))}\n")
        return 1 if isinstance(error, (StageError, LinkError)) else 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`scpl ... | head`): not an error of ours. Python
        # would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as error:
        # Torch has no exception of its own for the memory of the CPU.
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).partition("DefaultCPUAllocator: ")[2] or str(error) or "too little"
        sys.stderr.write(
            f"scpl: What is asked for must have room in memory. Got: {reason.splitlines()[0]}. "
            "Choose a smaller network, mini-batch or image.\n"
        )
        return 2
    except OSError as error:
        # A full disk, a folder without rights: everywhere else a user's mistake like the others.
        sys.stderr.write(f"scpl: Files must be readable and writable. Got: {error}.\n")
        return 2


def _tell(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning of ours as a sentence; where in the source it was made is of no use here."""
    ours = isinstance(message, ScplError)
    text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(f"scpl: {in_flags(str(message))}\n" if ours else text)


def _train(arguments: list[str]) -> int:
    config = _train_config(arguments)
    from scpl.app.launch import is_rank
    from scpl.app.train.run import dry_run, resumed_config, train

    run = config.run
    if run.resume is not None:
        # A recipe and a flag are the user's own word; the configuration of a run folder is not.
        recipe, flags = _recipe(arguments)
        named = config.network.model if recipe else _value_of(flags, "--model")
        config = resumed_config(config, run.resume, named)
    if run.dry_run:
        return _show(dry_run(config), as_json=run.json)
    if run.processes > 1 and not is_rank():
        return _launch(config, arguments)
    summary = train(config)
    if summary is None:
        return 0
    from scpl.report import write_run_report

    folder = Path(summary["run"])
    paths = write_run_report(folder)
    if not run.quiet:
        sys.stderr.write(f"{folder}: {', '.join(path.name for path in paths)}\n")
    return _show(summary, as_json=True) if run.json else 0


def _launch(config: TrainConfig, arguments: list[str]) -> int:
    """Start the ranks; they get this command with a folder that they can agree on."""
    from scpl.app.launch import launch
    from scpl.runs import RunFolder

    config.check()
    folder = None
    if config.run.resume is None and config.run.out is None:
        folder = RunFolder.reserve(Path("runs") / config.run_name).path
        arguments = [*arguments, "--out", str(folder)]
    try:
        return launch(["train", *arguments], config.run.processes, config.run.max_restarts)
    finally:
        if folder is not None:
            with suppress(OSError):
                folder.rmdir()  # if the run was refused before it wrote anything


def _train_config(arguments: list[str]) -> TrainConfig:
    """Read `[RECIPE] [FLAGS]`: defaults, then the recipe or resumed run, then the flags."""
    default = TrainConfig()
    resume = _value_of(arguments, "--resume")
    recipe, flags = _recipe(arguments)
    if recipe is not None:
        default = CompareConfig.one_run(recipe, _value_of(flags, "--method"))
    elif resume is not None and (Path(resume) / "config.toml").is_file():
        default = TrainConfig.read(Path(resume) / "config.toml")
    return _parse(TrainConfig, "train [RECIPE]", flags, default)


def _compare(arguments: list[str]) -> int:
    recipe, flags = _recipe(arguments)
    config = _parse(CompareConfig, "compare [RECIPE]", flags, CompareConfig.from_recipe(recipe))
    from scpl.app.compare import compare

    result = compare(config)
    if config.train.run.json:
        _show(result, as_json=True)
    return 1 if result["failures"] else 0


def _bench(arguments: list[str]) -> int:
    recipe, flags = _recipe(arguments)
    config = _parse(BenchConfig, "bench [RECIPE]", flags, _bench_default(recipe, flags))
    from scpl.app.bench.bench import bench
    from scpl.report import throughput_table

    result = bench(config)
    if config.train.run.json:
        _show(result, as_json=True)
    else:
        sys.stdout.write(throughput_table(result["results"]))
    return 1 if result["failures"] else 0


def _bench_default(recipe: Path | None, flags: list[str]) -> BenchConfig:
    """Who names neither recipe nor data nor network is shown what the project is for.

    That is a network whose steps last long enough to be shared, on two processes.
    """
    if recipe is not None or _value_of(flags, "--data") or _value_of(flags, "--model"):
        return BenchConfig.from_recipe(recipe)
    from scpl.app.recipes import find_recipe

    wanted = _value_of(flags, "--processes") or ""
    processes = int(wanted) if wanted.isdecimal() else 2
    demo = BenchConfig.from_recipe(find_recipe("quick/demo"))
    train = demo.train.changed(processes=processes, stages=max(processes, 2))
    return replace(demo, train=train, repeats=5, steps=5)


def _plan(arguments: list[str]) -> int:
    recipe, flags = _recipe(arguments)
    default = (
        PlanConfig() if recipe is None else PlanConfig(CompareConfig.from_recipe(recipe).train)
    )
    config = _parse(PlanConfig, "plan [RECIPE]", flags, default)
    from scpl.app.planning import plan, plan_text

    found = plan(config)
    if config.train.run.json:
        return _show(found, as_json=True)
    sys.stdout.write(plan_text(found))
    return 0


def _eval(arguments: list[str]) -> int:
    config = _parse(EvalConfig, "eval RUN", arguments)
    from scpl.app.evaluate import evaluate
    from scpl.app.exits import exits
    from scpl.app.probe import probe

    early = exits(config) if config.exit_thresholds or config.picture else {}
    probes = {"readout_accuracy": probe(config)} if config.probe else {}
    found = {**evaluate(config), **early, **probes}
    if not config.json:
        from scpl.report import in_brief

        found = in_brief(found)
    return _show(found, as_json=config.json)


def _predict(arguments: list[str]) -> int:
    config = _parse(PredictConfig, "predict RUN INPUT...", arguments)
    from scpl.app.predict import predict

    predict(config, sys.stdout)
    return 0


def _export(arguments: list[str]) -> int:
    config = _parse(ExportConfig, "export RUN --to FILE", arguments)
    from scpl.app.export import export

    return _show(export(config), as_json=config.json)


def _recipes(arguments: list[str]) -> int:
    from scpl.app.recipes import recipes

    sys.stdout.write(recipes(arguments))
    return 0


def _doctor(arguments: list[str]) -> int:
    config = _parse(DoctorConfig, "doctor", arguments)
    from scpl.app.doctor import doctor

    findings, healthy = doctor(config)
    _show(findings, as_json=config.json)
    return 0 if healthy else 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "compare": _compare,
    "bench": _bench,
    "plan": _plan,
    "eval": _eval,
    "predict": _predict,
    "export": _export,
    "recipes": _recipes,
    "doctor": _doctor,
}


def _parse(
    kind: type[Config], usage: str, arguments: list[str], default: Config | None = None
) -> Config:
    """Turn flags into a configuration; tyro answers --help and bad flags (exit status 2)."""
    keep: dict[str, Any] = {} if default is None else {"default": default}
    command = usage.partition(" ")[0]
    examples = f"\n\nexamples:\n{EXAMPLES[command]}" if command in EXAMPLES else ""
    return tyro.cli(  # type: ignore[no-any-return]
        kind,
        prog=f"scpl {usage}",
        description=f"{inspect.getdoc(kind)}{examples}",
        args=_named(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        registry=_registry(arguments),
        **keep,
    )


def _named(arguments: list[str]) -> list[str]:
    """Name the metric where `--keep-best` stands alone: tyro knows no value that may be missing."""
    found: list[str] = []
    for argument, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        found.append(argument)
        if argument.replace("_", "-") == "--keep-best" and following.startswith("-"):
            found.append(MAIN)
    return found


def _registry(arguments: list[str]) -> tyro.constructors.ConstructorRegistry:
    """Teach tyro to read texts below fields faster than it does, and the options of the methods."""
    typed = {word.partition("=")[0].replace("_", "-") for word in arguments}
    registry = tyro.constructors.ConstructorRegistry()

    @registry.struct_rule
    def part(info: Any) -> tyro.constructors.StructConstructorSpec | None:
        if info.type not in PARTS.values():
            return None
        default = info.default if isinstance(info.default, info.type) else info.type()
        texts, types = help_of(info.type), get_type_hints(info.type)
        open_switches = [each.name for each in fields(info.type) if types[each.name] == bool | None]

        def build(**values: Any) -> Any:
            # A switch that nobody touched stays what it was, also if that is neither on nor off.
            for name in open_switches:
                if not {flag(name), flag(f"no_{name}")} & typed:
                    values[name] = getattr(default, name)
            return info.type(**values)

        return tyro.constructors.StructConstructorSpec(
            build,
            tuple(
                _setting(types[each.name], each.name, getattr(default, each.name), texts[each.name])
                for each in fields(info.type)
            ),
        )

    @registry.struct_rule
    def method(info: Any) -> tyro.constructors.StructConstructorSpec | None:
        if info.type is not MethodConfig:
            return None
        default = info.default if isinstance(info.default, MethodConfig) else MethodConfig()

        def build(method: str, **values: Any) -> MethodConfig:
            given = {
                name: value
                for name, value in values.items()
                if {flag(name), flag(f"no_{name}")} & typed or name in default.options
            }
            return MethodConfig(method, given)

        options = method_options()
        listed = f"One of: {', '.join(METHODS)}."
        return tyro.constructors.StructConstructorSpec(
            build,
            (
                tyro.constructors.StructFieldSpec("method", str, default.method, listed),
                *(_option(name, options[name], default.options) for name in options),
            ),
        )

    return registry


def _setting(kind: Any, name: str, default: Any, text: str) -> tyro.constructors.StructFieldSpec:
    """One flag; where the default is none, the text says what happens instead."""
    if kind == bool | None:
        kind, default = bool, bool(default)
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    elif default in (None, ()):
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    return tyro.constructors.StructFieldSpec(name, kind, default, text)


def _option(
    name: str, owners: list[tuple[str, Option]], given: Mapping[str, Any]
) -> tyro.constructors.StructFieldSpec:
    """One flag for all methods that have an option of this name."""
    texts: dict[str, list[str]] = {}
    for method, option in owners:
        text = option.help[:1].lower() + option.help[1:].removesuffix(".")
        texts.setdefault(text, []).append(method)
    told = "; ".join(f"{', '.join(methods)}: {text}" for text, methods in texts.items())
    first = owners[0][1]
    defaults = dict.fromkeys(str(option.default) for _, option in owners)
    hint = f"(default: {given[name] if name in given else ' or '.join(defaults)})"
    return tyro.constructors.StructFieldSpec(
        name,
        Annotated[first.type, tyro.conf.arg(help_behavior_hint=hint)],  # type: ignore[arg-type]
        given.get(name, first.default),
        told,
    )


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


def _show(value: Mapping[str, Any], *, as_json: bool) -> int:
    """Print a result: one JSON object, or aligned lines; rows of equal keys are a table."""
    if as_json:
        sys.stdout.write(json.dumps(value) + "\n")
        return 0
    width = max(map(len, value))
    for name, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], str):
            sys.stdout.write("".join(f"{line}\n" for line in (f"{name}:", *item)))
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            sys.stdout.write("".join(f"{line}\n" for line in (f"{name}:", *_table(item))))
        else:
            sys.stdout.write(f"{name:<{width}}  {item}\n")
    return 0


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lay rows of equal keys out as a table, numbers with four digits."""

    def cell(value: Any) -> str:
        values = value if isinstance(value, list) else [value]
        return " ".join(f"{each:.4f}" if isinstance(each, float) else str(each) for each in values)

    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


OVERVIEW = """\
Train one network across several devices without a backward pass between them.

usage: scpl COMMAND [OPTIONS]

commands:
  train     train a network from flags or a recipe
  compare   train the same network with several methods and compare them
  bench     measure how fast several methods train, in turns
  plan      measure where to cut a network, and how long each process would wait
  eval      test a trained run
  predict   classify images or texts with a trained run
  export    write a trained network for others to load
  recipes   list, show or copy the recipes that come with scpl
  doctor    show versions and devices, and what is wrong

examples:
  scpl train                                    # handwritten digits, within a minute
  scpl train --data fashion-mnist --data-dir ~/data --epochs 3
  scpl train recipe.toml --lr 3e-4              # flags override the recipe
  scpl compare --methods scpl,early-exit,bp
  scpl bench                                    # two processes against one, within two minutes
  scpl train --resume runs/digits-small-cnn-scpl

`scpl COMMAND --help` explains one command.
"""

EXAMPLES = {
    "train": """\
  scpl train quick/digits
  scpl train --data tickets.csv --text subject body --label queue --model transformer
  scpl train --data fashion-mnist --processes 2 --epochs 3
  scpl train --data photos/ --model package.module:function --model-args width=32
  scpl train --data tickets.csv --text body --label queue --model hf:path/to/bert
  scpl train mine.toml --method dgl --lr 3e-4""",
    "compare": """\
  scpl compare quick/digits --seeds 0,1,2
  scpl compare --methods scpl,early-exit,bp --processes 2 --equal time""",
    "bench": """\
  scpl bench
  scpl bench quick/digits
  scpl bench --model vgg8 --data cifar10 --synthetic --processes 2
  scpl bench --methods scpl,gpipe,ddp --processes 2 --steps 20 --json""",
    "plan": """\
  scpl plan quick/digits --processes 2
  scpl plan --model vgg8 --data cifar10 --processes 4 --stages 8
  scpl plan --model vgg8 --data cifar10 --machines 4 8 64 --link 1gbit --threads 1
  scpl plan --model vgg8 --data cifar10 --machines 3 --speeds 1 1 0.5 --link 1gbit,0.2ms""",
    "eval": """\
  scpl eval runs/digits-small-cnn-scpl
  scpl eval runs/digits-small-cnn-scpl --exit-threshold 0.9
  scpl eval runs/digits-small-cnn-scpl --exit-thresholds 0.5 0.7 0.9 1 --picture exits.png""",
    "predict": """\
  scpl predict runs/pets-small-cnn-scpl photo.jpg holiday/ --top 3
  scpl predict runs/tickets.csv-transformer-scpl "The printer is on fire"
  find holiday -name "*.jpg" | scpl predict runs/pets-small-cnn-scpl - --out holiday.csv""",
    "export": """\
  scpl export runs/digits-small-cnn-scpl --to digits.safetensors
  scpl export runs/digits-small-cnn-scpl --to digits.pt2 --format torch-export
  scpl export runs/tickets.csv-bert-scpl --to fine-tuned     # a folder for from_pretrained""",
}
"""Lines below the description of a command."""
