"""Load a text data set: find, read, divide, tokenise; or take all of it from the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from scpl.data.cache import keep, recall
from scpl.data.identity import Identities, Identity, sizes_of
from scpl.data.notes import Faults
from scpl.data.spool import InMemory, SpooledTexts, check_disk, fits
from scpl.data.tables import check_columns, columns_of, size_of
from scpl.data.text.loader import Encoded
from scpl.data.text.splits import (
    Columns,
    Files,
    Hold,
    SplitSettings,
    Texts,
    choose_columns,
    find_files,
    labelled,
    numbered,
    read_splits,
    read_texts,
    targets_in,
)
from scpl.data.text.tokenizer import (
    KINDS,
    Tokenizer,
    from_json,
    share_of,
    train_tokenizer,
    version_of,
)
from scpl.errors import DataError, InputError
from scpl.outside import parse_json
from scpl.tasks import Classes

__all__ = ["TextData", "TextSettings", "load_test", "load_text"]

_FORMAT = 3  # raise it when the same files and settings give other numbers than before
_MIN_TOKENS = 200_000  # fewer are made in a second
_FIELDS = ("tokens", "starts", "labels")
_CHUNK = 1024  # texts that are made tokens at a time
_AS_LEARNT = (
    "Name columns as they are in the table that the network learnt from; texts without labels can "
    "only be predicted"
)
_OF_A_BYTE = 3  # bytes that short texts and their tokens take in memory for each of a table's


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How a text data set is read.

    Args:
        text: The text columns, joined by a space; by default the one with a usual name.
        label: The target columns; by default ``label``.
        splits: How the rows are divided, and what is learnt.
        tokens: ``"words"``, ``"paper-words"`` or ``"subwords"``.
        vocab_size: At most so many tokens are known, with padding and unknown.
        max_tokens: So many tokens of a text are read.
    """

    text: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    splits: SplitSettings = dataclasses.field(default_factory=SplitSettings)
    tokens: str = "words"
    vocab_size: int = 30_000
    max_tokens: int = 350

    def __post_init__(self) -> None:
        if self.tokens not in KINDS:
            raise InputError(f"`tokens` must be one of: {', '.join(KINDS)}", f"Got {self.tokens!r}")
        if self.max_tokens < 1:
            raise InputError("`max_tokens` must be at least 1", f"Got {self.max_tokens}")


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """A text data set, as numbers.

    Args:
        name: Name of the set, for reports.
        classes: Name of each class, label or number.
        columns: Where texts and targets stand.
        tokenizer: What made the numbers.
        train: Texts to learn from.
        valid: Texts held out of them.
        test: Texts to score on.
        identities: What the splits are, by name; rows of one file that are divided are told apart
            by their counts alone.
        notes: What the user should know of the data.
    """

    name: str
    classes: tuple[str, ...]
    columns: Columns
    tokenizer: Tokenizer
    train: Encoded
    valid: Encoded | None
    test: Encoded
    identities: Identities
    notes: tuple[str, ...] = ()


def load_text(
    name: str,
    settings: TextSettings,
    *,
    data_dir: Path | None = None,
    test_data: Path | None = None,
    tokenizer: Tokenizer | None = None,
    download: bool = True,
    in_memory: InMemory = "auto",
) -> TextData:
    """Load a text data set.

    Args:
        name: A key of ``TEXT_SETS``, a table, or a folder with tables.
        settings: Columns, splits and tokens.
        data_dir: Folder that holds data sets.
        test_data: A table of the user's own to test on.
        tokenizer: Use this one instead of making a vocabulary of the training texts.
        download: Whether the hub may be asked.
        in_memory: yes: hold all texts and tokens in memory; no: in files, of which parts are read;
            auto: as `fits` says. The numbers are the same.

    Raises:
        InputError: A setting is not usable, or an optional package is missing.
        DataError: The data is missing, empty, damaged or not labelled as it should be.
    """
    files = find_files(name, data_dir=data_dir, test_data=test_data, download=download)
    columns = choose_columns(files, settings.text, settings.label)
    files = labelled(files, columns, test_data and test_data.expanduser())
    before = _states(files.all)
    sources = _sources(files)
    content = {paths: _digest(paths) for paths in set(sources.values())}
    digests = {name: content[paths] for name, paths in sources.items()}
    about = [digests, files.name, dataclasses.asdict(columns)]
    key = _key(about, settings, tokenizer)
    data = _recalled(files.name, columns, digests, key, tokenizer)
    taken = _taken(files.all)
    held = fits(in_memory, taken)
    if data is None:
        hold = list if held else _in_files(files.all)
        data = _made(files, columns, settings, tokenizer, digests, hold)
        if _states(files.all) != before:
            raise DataError(
                "Data must not change while it is read",
                f"Got another state of {', '.join(map(str, files.all))}",
                "Try again when it is complete",
            )
        _keep(key, data)
    return data if held else dataclasses.replace(data, notes=(_note(taken), *data.notes))


def load_test(
    name: str,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    columns: Columns,
    max_tokens: int,
    *,
    task: str = Classes.kind,
    data_dir: Path | None = None,
    in_memory: InMemory = "auto",
) -> tuple[Encoded, list[str]]:
    """Load texts to test a trained network on: another table or data set than its own.

    Args:
        name: A table, of which all rows are taken; a folder with a table ``test``; or a data set
            known by name, of which the test split is.
        tokenizer: That of the network.
        classes: The classes that the network tells apart; or labels, or numbers.
        columns: Where texts and targets stand in a table.
        max_tokens: So many tokens of a text are read.
        task: What the network predicts.
        data_dir: Folder that holds data sets.
        in_memory: As for `load_text`.

    Returns:
        The texts, and what the user should know: what was left out or repaired, which classes
        they were taken for.

    Raises:
        DataError: The data is missing or damaged, or has a label that is none of the classes.
    """
    files = find_files(name, data_dir=data_dir)
    paths = files.test or (files.train if Path(name).expanduser().is_file() else ())
    if not paths:
        raise DataError("A folder to test on must hold a table named test", f"Got none in {name}")
    if files.known is not None:
        columns = choose_columns(files, (), ())
    for path in paths:
        check_columns(path, columns_of(path), (*columns.text, *columns.label), _AS_LEARNT)
    targets = targets_in(dataclasses.replace(files, train=paths), columns, task, classes)
    faults = Faults()
    taken = _taken(paths)
    held = fits(in_memory, taken)
    hold = list if held else _in_files(paths)
    texts = numbered(read_texts(paths, columns, targets, faults, hold), targets, classes, paths)
    notes = [_note(taken)] * (not held) + faults.notes()
    notes += [targets.by_place] * bool(targets.by_place)
    notes.append(targets.balance(texts.labels, classes, "test"))
    notes += targets.absent(texts.labels, classes, "test")
    return _encode(texts, tokenizer, max_tokens), notes


def _made(
    files: Files,
    columns: Columns,
    settings: TextSettings,
    tokenizer: Tokenizer | None,
    digests: Mapping[str, str],
    hold: Hold,
) -> TextData:
    splits = read_splits(files, columns, settings.splits, hold)
    if tokenizer is None:
        tokenizer = train_tokenizer(settings.tokens, splits.train.texts, settings.vocab_size)
    train = _encode(splits.train, tokenizer, settings.max_tokens)
    test = _encode(splits.test, tokenizer, settings.max_tokens)
    held_out = splits.valid
    valid = None if held_out is None else _encode(held_out, tokenizer, settings.max_tokens)
    strange = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    if tokenizer.unknown is not None:
        strange[tokenizer.unknown] = True
    unknown = share_of(test.tokens, strange)
    cut = float((train.lengths == settings.max_tokens).double().mean())
    told = (
        f"{tokenizer.vocab_size:,} {tokenizer.kind}; {100 * unknown:.1f} % of the test tokens are "
        f"unknown, {100 * cut:.1f} % of the training texts have {settings.max_tokens} tokens, the "
        "most that are read, or more"
    )
    notes = (*splits.notes, told)
    identities = _identities(digests, splits.classes, train=train, valid=valid, test=test)
    return TextData(
        files.name, splits.classes, columns, tokenizer, train, valid, test, identities, notes
    )


def _sources(files: Files) -> dict[str, tuple[Path, ...]]:
    """The files that each split comes from, by its name."""
    return {
        "train": files.train,
        "valid": files.valid or files.train,
        "test": files.test or files.train,
    }


def _identities(
    digests: Mapping[str, str], names: Sequence[str], **splits: Encoded | None
) -> Identities:
    return {
        name: Identity(digests[name], len(split), sizes_of(split.labels, names))
        for name, split in splits.items()
        if split is not None
    }


def _encode(texts: Texts, tokenizer: Tokenizer, max_tokens: int) -> Encoded:
    parts = (texts.texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK))
    rows = chain.from_iterable(tokenizer.encode(part, max_tokens) for part in parts)
    mapped = isinstance(texts.texts, SpooledTexts)
    return Encoded.of(rows, texts.labels, tokenizer.vocab_size, mapped=mapped)


def _taken(paths: Sequence[Path]) -> int:
    """About how many bytes texts and tokens take in memory."""
    return _OF_A_BYTE * sum(map(size_of, paths))


def _in_files(paths: Sequence[Path]) -> Hold:
    """Hold texts in files, for which there must be room."""
    check_disk(sum(map(size_of, paths)))
    return SpooledTexts


def _note(taken: int) -> str:
    return (
        "Tokens are read from a file when a mini-batch needs them: in memory texts and tokens "
        f"would take about {taken / 1e6:,.0f} MB (--in-memory)"
    )


def _states(paths: Sequence[Path]) -> list[tuple[int, int]]:
    return [(state.st_size, state.st_mtime_ns) for state in (path.stat() for path in paths)]


def _digest(paths: Sequence[Path]) -> str:
    """Digest of the content, so that a changed file is never taken for the old one."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _key(about: Sequence[object], settings: TextSettings, tokenizer: Tokenizer | None) -> str:
    """Digest of all that the numbers depend on."""
    made_by = [version_of(settings.tokens), tokenizer.to_json() if tokenizer else None]
    parts = [_FORMAT, *about, dataclasses.asdict(settings), *made_by]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _recalled(
    name: str,
    columns: Columns,
    digests: Mapping[str, str],
    key: str,
    tokenizer: Tokenizer | None,
) -> TextData | None:
    found = recall("texts", key)
    if found is None:
        return None
    tensors, about = found

    def split(name: str) -> Encoded:
        return Encoded(*(tensors[f"{name}.{field}"] for field in _FIELDS))

    classes, train, test = tuple(parse_json(about["classes"])), split("train"), split("test")
    valid = split("valid") if "valid.tokens" in tensors else None
    return TextData(
        name,
        classes,
        columns,
        tokenizer or from_json(about["tokenizer"], "the cache"),
        train,
        valid,
        test,
        _identities(digests, classes, train=train, valid=valid, test=test),
        tuple(parse_json(about["notes"])),
    )


def _keep(key: str, data: TextData) -> None:
    splits = {"train": data.train, "valid": data.valid, "test": data.test}
    tensors: dict[str, Tensor] = {
        f"{name}.{field}": getattr(split, field)
        for name, split in splits.items()
        if split is not None
        for field in _FIELDS
    }
    if sum(map(len, tensors.values())) < _MIN_TOKENS:
        return
    about = {
        "classes": json.dumps(data.classes),
        "notes": json.dumps(data.notes),
        "tokenizer": data.tokenizer.to_json(),
    }
    keep("texts", key, tensors, about)
