"""Recipes: TOML files of training settings, the user's own or those that come with scpl."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

from scpl.errors import InputError, unknown_name
from scpl.outside import LARGEST_TOML, read_text

__all__ = ["find_recipe", "recipes", "shipped"]

_FOLDER = Path(str(resources.files("scpl"))) / "recipes"

HELP = """\
List, show or copy the recipes that come with scpl.

usage: scpl recipes ls [--json]
       scpl recipes show NAME
       scpl recipes cp NAME FILE

A recipe holds flags of `scpl train` as TOML: `batch_size = 64` is --batch-size 64. Flags override
it. It may also hold `methods`, `seeds`, `equal` and `target`, for `scpl compare`.

examples:
  scpl recipes ls
  scpl recipes show quick/digits
  scpl train quick/digits --epochs 5
  scpl compare quick/digits --seeds 0,1,2
  scpl recipes cp quick/fashion-mnist mine.toml    # then edit it, and: scpl train mine.toml
"""


def shipped() -> dict[str, Path]:
    """The recipes that come with scpl: name, as in ``quick/digits``, to file."""
    files = sorted(_FOLDER.rglob("*.toml"))
    return {file.relative_to(_FOLDER).with_suffix("").as_posix(): file for file in files}


def find_recipe(name: str) -> Path:
    """Find a recipe: an existing file, else one that comes with scpl.

    Args:
        name: Path of a file, or a name such as ``quick/digits``, with or without ``.toml``.

    Raises:
        InputError: if there is neither; it lists the names.
    """
    if os.path.isfile(name):  # unlike Path.is_file it takes any string, however long
        return Path(name)
    known = shipped()
    found = known.get(name.removesuffix(".toml"))
    if found is None:
        raise unknown_name("A recipe that is not an existing file", name, known)
    return found


def recipes(arguments: list[str]) -> str:
    """Run `scpl recipes`.

    Args:
        arguments: ``ls [--json]``, ``show NAME`` or ``cp NAME FILE``; nothing for help.

    Returns:
        What to print.

    Raises:
        InputError: for other arguments, an unknown recipe, or a file that exists.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        return HELP
    match arguments:
        case ["ls"]:
            known = shipped()
            width = max(map(len, known), default=0)
            return "".join(f"{name:<{width}}  {_describe(file)}\n" for name, file in known.items())
        case ["ls", "--json"]:
            return json.dumps({name: _describe(file) for name, file in shipped().items()}) + "\n"
        case ["show", name]:
            return _read(find_recipe(name))
        case ["cp", name, file]:
            return _copy(find_recipe(name), Path(file))
        case ["ls" | "show" | "cp", *_]:
            usage = "scpl recipes ls, scpl recipes show NAME or scpl recipes cp NAME FILE"
            raise InputError(f"The usage is {usage}", f"Got {' '.join(arguments)!r}")
        case _:
            raise unknown_name("What to do with recipes", arguments[0], ("ls", "show", "cp"))


def _describe(file: Path) -> str:
    """The first comment of a recipe says what it is."""
    return _read(file).partition("\n")[0].removeprefix("#").strip()


def _copy(source: Path, target: Path) -> str:
    if target.is_dir():
        target = target / source.name
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(_read(source))
    except FileExistsError as error:
        raise InputError(
            "A recipe must be copied to a new file", f"{target} exists", "Choose another name"
        ) from error
    except OSError as error:
        raise InputError(
            "The copy of a recipe must be writable", f"{target}: {error}", "Choose another name"
        ) from error
    return f"{target}: edit it, then run: scpl train {target}\n"


def _read(file: Path) -> str:
    try:
        return read_text(file, LARGEST_TOML)
    except (OSError, ValueError) as error:
        raise InputError("A recipe must be a readable text file", f"{file}: {error}") from error
