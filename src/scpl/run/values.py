"""Recipes as files: TOML, and values checked against the types of the configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from scpl.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["convert", "read_toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: if it is missing, unreadable or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            "A recipe must be an existing TOML file", f"Got {path}", "See `scpl recipes ls`"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("A recipe must be readable TOML", f"{path}: {error}") from error


def convert(value: Any, hint: Any, what: str) -> Any:
    """Check a recipe's value against the type of its field.

    Args:
        value: As it stands in the recipe.
        hint: The type of the field.
        what: Key and file, for messages.

    Raises:
        InputError: if the value is of another type.
    """
    options = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in options or isinstance(value, bool):
            raise InputError(
                f"{what} must be one of {', '.join(map(str, options))}", f"Got {value!r}"
            )
        return value
    if type(None) in options:
        return convert(value, next(o for o in options if o is not type(None)), what)
    if get_origin(hint) is tuple:
        kind = options[0]
        if not isinstance(value, (list, tuple)) or not all(type(v) is kind for v in value):
            raise InputError(f"{what} must be a list of {kind.__name__}", f"Got {value!r}")
        return tuple(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    raise InputError(f"{what} must be of type {getattr(hint, '__name__', hint)}", f"Got {value!r}")
