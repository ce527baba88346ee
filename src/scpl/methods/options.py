"""The options of a method, read from the source of its class without importing it.

Importing a method imports torch, which takes seconds; a command line that lists options must answer
at once.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from scpl.methods import METHODS

__all__ = ["Option", "constant_of", "help_of", "options_of"]

_PLAIN: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        field: The field of the method's class.
        type: int, float, bool, str or a ``Literal`` of these.
        default: Its default.
        help: The text below the field.
    """

    field: str
    type: Any
    default: Any
    help: str

    @property
    def name(self) -> str:
        """The field without ``num_``, which is for counts in code."""
        return self.field.removeprefix("num_")


@dataclass(frozen=True)
class _Field:
    """An annotated name in the body of a class, as it stands in the source."""

    annotation: ast.expr
    value: ast.expr
    text: str


def options_of(method: str) -> tuple[Option, ...]:
    """Read the options of a method: the fields of plain types of its class and its base classes.

    Of a type such as ``Literal["conv", "mlp"] | Head`` the literal is the option. Fields of
    other types are for users of the library alone.

    Args:
        method: A name in `METHODS`.

    Raises:
        KeyError: if it is not known.
    """
    return tuple(
        Option(name, kind, ast.literal_eval(each.value), each.text)
        for name, each in _fields(*METHODS.homes[method].split(":")).items()
        if (kind := _type_of(each.annotation)) is not None
    )


def constant_of(method: str, name: str) -> Any:
    """Read a constant of a method's class, such as ``layout``.

    Raises:
        KeyError: if there is none, or the method is not known.
    """
    return ast.literal_eval(_fields(*METHODS.homes[method].split(":"))[name].value)


def help_of(kind: type) -> dict[str, str]:
    """Read the texts below the fields of a class, by field."""
    return {name: each.text for name, each in _fields(kind.__module__, kind.__name__).items()}


@lru_cache
def _fields(module: str, name: str) -> dict[str, _Field]:
    """The fields of a class by name, those of its base classes first."""
    found: dict[str, _Field] = {}
    for node in _source(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _fields(node.module, alias.name)
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in reversed(node.bases):
                if isinstance(base, ast.Name) and base.id != "ABC":
                    found |= _fields(module, base.id)
            found |= _own_fields(node)
    return found


@lru_cache
def _source(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ast.Module([], [])  # not written in Python: nothing to read
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _own_fields(node: ast.ClassDef) -> dict[str, _Field]:
    found = {}
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.value is not None
        ):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            found[statement.target.id] = _Field(statement.annotation, statement.value, text)
    return found


def _type_of(node: ast.expr) -> Any:
    """The plain type that an annotation names; None if it names none."""
    if isinstance(node, ast.BinOp):
        return _type_of(node.left) or _type_of(node.right)
    if isinstance(node, ast.Name):
        return _PLAIN.get(node.id)
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Literal"
    ):
        return Literal[ast.literal_eval(node.slice)]
    return None
