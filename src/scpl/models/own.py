"""Networks that do not come with scpl: made by a function of the user, or by timm.

A factory is named ``package.module:function``. It is called with what it asks for by name.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from scpl.errors import InputError
from scpl.outside import parse_json

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_timm", "call_factory", "read_arguments"]

_FORM = "A network of your own must be named package.module:function"
_ASKS = "It must return a torch.nn.Module"


def read_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; a value is JSON (32, 0.1, true, [1, 2]), else a string.

    Raises:
        InputError: for anything else, or a key that stands there twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.isidentifier() or key in found:
            raise InputError(
                "`model_args` must be different names with their values, as in width=32",
                f"Got {pair!r}{' a second time' if key in found else ''}",
            )
        try:
            found[key] = parse_json(text)
        except ValueError:
            found[key] = text
    return found


def call_factory(name: str, arguments: Mapping[str, Any], offers: Mapping[str, Any]) -> nn.Module:
    """Call the user's factory; the current directory is on the path, as with ``python -m``.

    Args:
        name: ``package.module:function``; a class will do.
        arguments: What the user gives it.
        offers: What of the data it may ask for by name; ``num_classes`` is also passed to one that
            takes any keyword.

    Raises:
        InputError: if there is no such module or function, it cannot take the arguments, it fails,
            or it returns no network.
    """
    from torch import nn

    factory = _find(name)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        signature = inspect.Signature([inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)])
    asked = signature.parameters
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in asked.values())
    given = {k: v for k, v in offers.items() if k in asked or (any_keyword and k == "num_classes")}
    try:
        signature.bind(**given, **{k: v for k, v in arguments.items() if k not in given})
    except TypeError as error:
        known = ", ".join(offers)
        raise InputError(
            f"{name} must take its arguments by name; {known} are passed to one that asks for them",
            f"{name}{signature}: {error}",
            "Give the others with `model_args`, as in width=32",
        ) from error
    try:
        network = factory(**{**given, **arguments})
    except Exception as error:
        raise InputError(
            f"{name} must make the network",
            f"It raised {type(error).__name__}: {error}{_place(error)}",
            f"Try it in Python: {name.partition(':')[2]}({_written({**given, **arguments})})",
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{name} must make the network",
            f"It returned {type(network).__name__}",
            _ASKS,
        )
    return network


def build_timm(name: str, arguments: Mapping[str, Any], offers: Mapping[str, Any]) -> nn.Module:
    """Make a network of timm by its name there; weights are drawn unless ``pretrained=true``.

    Raises:
        InputError: if timm cannot be imported, or cannot make it.
    """
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise InputError(
            f"timm:{name} needs the package 'timm'",
            f"It cannot be imported: {error}",
            "Install it, or choose another --model",
        ) from error
    wanted = {"num_classes": offers["num_classes"], "in_chans": offers["in_channels"], **arguments}
    try:
        network: nn.Module = timm.create_model(name, **wanted)
    except Exception as error:
        close = difflib.get_close_matches(name, timm.list_models(), 1)
        raise InputError(
            f"timm must be able to make {name!r}",
            f"It raised {type(error).__name__}: {_first_line(error)}",
            f"Did you mean {close[0]!r}?" if close and close[0] != name else "",
        ) from error
    return network


def _find(name: str) -> Any:
    path, _, wanted = name.partition(":")
    if not path or not wanted.isidentifier() or not all(map(str.isidentifier, path.split("."))):
        raise InputError(_FORM, f"Got {name!r}", "For a file nets.py here: nets:build")
    module = _import(path)
    found = getattr(module, wanted, None)
    if callable(found):
        return found
    own = [key for key, value in vars(module).items() if callable(value) and key[:1] != "_"]
    close = difflib.get_close_matches(wanted, own, 1)
    what = "has nothing of that name" if found is None else f"{wanted!r} is no function there"
    raise InputError(
        f"{path} must have a function or class {wanted!r}",
        f"{module.__file__ or path} {what}",
        f"Did you mean {close[0]!r}?" if close else _FORM,
    )


def _import(path: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(path)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}.")
        if missing:
            raise InputError(
                f"There must be a module {path}",
                f"Python finds no {getattr(error, 'name', path)!r} in {here} or where packages are",
                "Run the command in the folder that holds it, or install it",
            ) from error
        raise InputError(
            f"The module {path} must be importable",
            f"It raised {type(error).__name__}: {_first_line(error)}{_place(error)}",
            f"Try it in Python: import {path}",
        ) from error


def _place(error: BaseException) -> str:
    """Where the user's code failed; without it he would have to search."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, "<frozen", os.sep + "site-packages" + os.sep, importlib.__file__ or "")
    own = [frame for frame in frames if not any(part in frame.filename for part in ours)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _written(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
