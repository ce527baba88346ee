"""Runs on texts: their loaders, and what `scpl eval` and `scpl predict` do with them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from scpl import models
from scpl.app.commands import EvalConfig, PredictConfig
from scpl.app.config import TrainConfig
from scpl.app.inputs.base import (
    Loaders,
    TextInputs,
    balanced_notes,
    check_tested_on,
    check_there,
    drawn_from,
    fitted,
)
from scpl.app.inputs.pending import (
    STDIN,
    Kept,
    Named,
    Pending,
    Say,
    check_kept,
    check_rows,
    kept,
    open_stdin,
)
from scpl.app.settings import Samples
from scpl.data import text
from scpl.data.notes import Faults
from scpl.errors import DataError, InputError
from scpl.models.pretrained import SENTENCE_LIMIT, inputs_of_texts
from scpl.outside import parse_json, read_text, shown
from scpl.runs import RunFolder
from scpl.seeding import derive_seed
from scpl.tasks import TASKS

__all__ = [
    "COLUMNS",
    "SAMPLES",
    "PretrainedInputs",
    "loaders",
    "network_sizes",
    "pending",
    "pretrained_inputs",
    "test_loader",
]

SAMPLES: Samples = "texts"
COLUMNS: Mapping[str, Any] = {"source": "", "row": 1}
"""What names a text in the output of `scpl predict`, with an example."""

TOKENIZER = "tokenizer.json"
TOKENIZER_LIMIT = "model_max_length of its tokenizer"
_SIZES = {"hidden": "width", "layers": "depth", "dropout": "dropout", "heads": "heads"}


def loaders(config: TrainConfig) -> Loaders:
    """Load a data set of texts and make its loaders.

    Raises:
        DataError: if it is missing, damaged, or not labelled as it should be.
        InputError: if the network is for images.
    """
    chosen, seed = config.data, config.run.seed
    own = pretrained_inputs(config)
    sizes = {} if own else network_sizes(config)  # before any reading
    most = own.max_tokens if own else config.chosen.max_tokens
    source = text.load_text(
        chosen.data,
        _settings_of(config, most),
        data_dir=chosen.data_dir,
        test_data=chosen.test_data,
        tokenizer=own.tokenizer if own else None,
        in_memory=chosen.in_memory,
    )
    notes, vectors = [*(own.notes if own else ()), *source.notes], None
    if chosen.vectors is not None and config.run.resume is None:
        words = source.tokenizer.words
        vectors = text.read_vectors(chosen.vectors, words)
        notes.append(f"{chosen.vectors}: {vectors.coverage(words, source.train.tokens)}")
    columns, padding = source.columns, own.padding if own else text.WITH_ZEROS
    files = own.tokenizer.files if own else {TOKENIZER: source.tokenizer.to_json()}
    inputs = TextInputs(
        source.tokenizer.vocab_size, most, columns.text, columns.label, sizes, padding,
        tuple(files),
    )  # fmt: skip

    learnt = source.train.labels
    task = fitted(TASKS[chosen.task], chosen, learnt, len(source.classes))
    notes += balanced_notes(chosen, task, source.classes)
    batches: dict[str, Any] = {"batch_size": config.chosen.batch_size, "padding": padding}
    strata = drawn_from(chosen, task, learnt)

    def initial() -> dict[str, Any]:
        if vectors is None:
            return {}
        drawn = derive_seed(seed, "vectors")
        return {"vectors": vectors.matrix(inputs.vocab_size, drawn)}

    return Loaders(
        source.name,
        source.classes,
        inputs,
        text.TextLoader(source.train, shuffle=True, seed=seed, strata=strata, **batches),
        text.TextLoader(source.valid, **batches) if source.valid else None,
        text.TextLoader(source.test, decode=source.tokenizer.decode, **batches),
        tuple(notes),
        files,
        initial,
        task,
        source.identities,
    )


@dataclass(frozen=True)
class PretrainedInputs:
    """How a network of ``transformers`` wants its texts.

    Attributes:
        tokenizer: Its own.
        padding: How texts become a batch for it.
        max_tokens: So many tokens of a text are read.
        notes: What the user should know.
    """

    tokenizer: text.PretrainedTokenizer
    padding: text.Padding
    max_tokens: int
    notes: tuple[str, ...]


def pretrained_inputs(config: TrainConfig) -> PretrainedInputs | None:
    """Open the tokenizer of a network of ``transformers``; None for any other network.

    Raises:
        InputError: if it has none, or is no network for texts.
    """
    if models.origin_of(config.network.model) != "hf":
        return None
    name = config.network.model.partition(":")[2]
    taken, limits = inputs_of_texts(name)
    tokenizer = text.PretrainedTokenizer.open(name)
    if tokenizer.most is not None:
        limits[TOKENIZER_LIMIT] = tokenizer.most
    if config.data.max_tokens is not None:  # the user may know better than to stay below
        limits.pop(SENTENCE_LIMIT, None)
    limits["default"] = config.chosen.max_tokens
    reason = min(limits, key=lambda name: limits[name])
    most, notes = limits[reason], tokenizer.notes
    if most != config.data.max_tokens:
        notes += (f"{most} tokens of a text are read ({reason}; --max-tokens)",)
    return PretrainedInputs(tokenizer, tokenizer.padding(taken), most, notes)


def _settings_of(config: TrainConfig, max_tokens: int) -> text.TextSettings:
    """What of a configuration says how a data set is read."""
    chosen = config.data
    splits = text.SplitSettings(
        test_share=chosen.test_share,
        validation=chosen.validation,
        limit_train=chosen.limit_train,
        limit_test=chosen.limit_test,
        seed=derive_seed(config.run.seed, "texts"),
        task=chosen.task,
    )
    return text.TextSettings(
        text=chosen.text,
        label=chosen.label,
        splits=splits,
        tokens=chosen.tokens,
        vocab_size=chosen.vocab_size,
        max_tokens=max_tokens,
    )


def network_sizes(config: TrainConfig) -> dict[str, Any]:
    """Sizes of the network that the configuration gives; the others are the network's own.

    Raises:
        InputError: if the network does not take texts, or the word vectors are not for words.
    """
    network, vectors = config.network, config.data.vectors
    if models.origin_of(network.model) != "ours":
        return {}
    known = models.text_sizes(network.model)
    sizes = {
        size: getattr(network, name)
        for name, size in _SIZES.items()
        if getattr(network, name) is not None
    }
    if network.hand_over:
        sizes["hand_over"] = True
    if vectors is not None:
        if config.data.tokens == "subwords":
            raise InputError(
                "--vectors must go with words as tokens",
                "Got --tokens subwords",
                "Drop one of the two",
            )
        width = text.width_of(vectors)
        # What lies behind the embedding has a width of its own in some networks.
        sizes.setdefault("embedding_size" if "embedding_size" in known else "width", width)
    return sizes


def test_loader(
    config: EvalConfig, trained: TrainConfig, folder: RunFolder, description: Mapping[str, Any]
) -> text.TextLoader:
    """The test texts, in the numbers of the run's own tokenizer."""
    inputs, classes = TextInputs.of(description), tuple(description["classes"])
    batch_size = config.batch_size or trained.chosen.batch_size
    tokenizer = _tokenizer(folder, inputs)

    def made(split: text.Encoded) -> text.TextLoader:
        return text.TextLoader(
            split, batch_size=batch_size, padding=inputs.padding, decode=tokenizer.decode
        )

    if config.data is not None:
        columns = text.Columns(inputs.text_columns, inputs.label_columns)
        data_dir = config.data_dir or trained.data.data_dir
        found, notes = text.load_test(
            config.data, tokenizer, classes, columns, inputs.max_tokens,
            task=trained.data.task, data_dir=data_dir, in_memory=trained.data.in_memory,
        )  # fmt: skip
        sys.stderr.write("".join(f"{note}\n" for note in notes))
        return made(found)
    check_there(trained)
    source = text.load_text(
        trained.data.data,
        _settings_of(trained, inputs.max_tokens),
        data_dir=config.data_dir or trained.data.data_dir,
        test_data=trained.data.test_data,
        tokenizer=tokenizer,
        in_memory=trained.data.in_memory,
    )
    check_tested_on(description, source.identities, source.classes, trained.data.data, "texts")
    return made(source.test)


def pending(config: PredictConfig, folder: RunFolder, description: Mapping[str, Any]) -> Pending:
    """Find the texts that are to be predicted of.

    An input that is a file is a table, - is standard input, and any other is a text itself.

    Raises:
        DataError: if a file is missing or lacks a column.
        InputError: if there is none.
    """
    if not config.inputs:
        raise InputError("There must be at least one text to predict of", "Got none")
    return _Texts(config, folder, TextInputs.of(description))


_Text: TypeAlias = tuple[str, int, str, Kept]
"""Its source, its number in it, itself, and what is kept of its row."""


class _Texts(Pending):
    def __init__(self, config: PredictConfig, folder: RunFolder, network: TextInputs) -> None:
        self._columns = config.text or network.text_columns
        self._network, self._size, self._stdin = network, config.batch_size, config.stdin
        self._tokenizer, self._faults = _tokenizer(folder, network), Faults()
        names = map(str, config.inputs)
        self._keep = config.keep
        wanted = (*self._columns, *self._keep)
        self._sources = [n if n == STDIN else _source(n, wanted) for n in names]
        lines = config.stdin == "lines"
        check_kept(
            self._keep, [s for s in self._sources if isinstance(s, str) and (lines or s != STDIN)]
        )
        self.waits = STDIN in self._sources
        counts = [None if s == STDIN else 1 if isinstance(s, str) else text.count_rows(s)
                  for s in self._sources]  # fmt: skip
        known = [count for count in counts if count is not None]
        self.total = sum(known) if len(known) == len(counts) else None

    def batches(self, say: Say) -> Iterator[Named]:
        found = (each for source in self._sources for each in self._texts(source, say))
        while batch := list(islice(found, self._size)):
            names = [{"source": source, "row": row, **kept} for source, row, _, kept in batch]
            contents = [content for _, _, content, _ in batch]
            rows = self._tokenizer.encode(contents, self._network.max_tokens)
            yield names, self._network.padding.rows(rows)

    def check(self, say: Say) -> None:
        for note in self._faults.notes():
            say(note)
        check_rows(self._faults)

    def _texts(self, source: Path | str, say: Say) -> Iterator[_Text]:
        """Yield the texts of a source."""
        if isinstance(source, Path):
            yield from self._rows(source, shown(source))
        elif source != STDIN:
            yield shown(source), 1, shown(source), {}
        elif self._stdin == "lines":
            yield from self._lines(say)
        else:
            with TemporaryDirectory() as folder, open_stdin("a table") as stream:
                copy = Path(folder, f"stdin.{self._stdin}")  # tables are read twice
                with copy.open("wb") as file:
                    copyfileobj(stream, file)
                yield from self._rows(copy, STDIN)

    def _rows(self, table: Path, name: str) -> Iterator[_Text]:
        many = len(self._columns)
        for number, cells in text.rows_of(table, (*self._columns, *self._keep), self._faults):
            content = text.text_of(cells[:many], self._columns, f"{table} row {number}")
            yield name, number, content, kept(self._keep, cells[many:])

    def _lines(self, say: Say) -> Iterator[_Text]:
        with open_stdin("texts") as stream:
            lines = text.lines_of(stream, "standard input", self._faults)
            for number, line in enumerate(lines, start=1):
                if number == 1 and _begins_table(line, self._columns):
                    say(
                        f"The first line of standard input names {', '.join(self._columns)}: if it "
                        "is a table, say so with --stdin csv, tsv or jsonl"
                    )
                content = line.rstrip("\r\n")[: text.LONGEST_TEXT]
                yield content, number, content, {}


def _source(name: str, columns: Sequence[str]) -> Path | str:
    """Tell a table from a text."""
    path = Path(name)
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a text may be too long for a name, or hold a NUL
        there = False
    # A name without spaces that ends like a table's is not meant as a text.
    if there or (text.is_table(path) and not any(letter.isspace() for letter in name)):
        text.check_columns(path, text.columns_of(path), columns)
        return path
    return name


def _begins_table(line: str, columns: Sequence[str]) -> bool:
    """Whether a line is a header, or a JSON object, that names all the columns."""
    names = {cell.strip().strip('"') for cell in re.split(r"[,;|\t]", line)}
    with suppress(ValueError):
        names.update(parse_json(line) if line.startswith("{") else ())
    return names.issuperset(columns)


def _tokenizer(folder: RunFolder, inputs: TextInputs) -> text.Tokenizer:
    if inputs.padding.parts:
        return text.PretrainedTokenizer.open(str(folder.path))
    path = folder.path / TOKENIZER
    try:
        content = read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(
            "a run on texts must keep its tokenizer", f"{path}: {error}", "Copy it from the run"
        ) from error
    return text.from_json(content, str(path))
