"""Small tables of texts in every format the package reads."""

import csv
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
TOPICS = {
    "hardware": "printer screen mouse cable keyboard power",
    "software": "login password crash update install account",
    "travel": "train hotel flight ticket visa taxi",
}


def tickets(n=60, classes=2, seed=0, longest=12):
    """Rows of texts that a small network can tell apart."""
    draws, names = random.Random(seed), list(TOPICS)[:classes]
    rows = []
    for number in range(n):
        name = names[number % classes]
        words = [*TOPICS[name].split(), "the", "my", "please"]
        body = " ".join(draws.choices(words, k=draws.randint(1, longest)))
        rows.append({"subject": draws.choice(words), "body": f"{body} {number}", "queue": name})
    return rows


def write_table(path: Path, rows, columns=None):
    """Write rows, which are dictionaries, in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or list(rows[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)
    elif path.suffix == ".arrow":
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=16)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8", newline="")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, columns, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


def save_to_disk(folder: Path, table, shards=1):
    """Save a split as ``datasets`` does, in some Arrow files."""
    folder.mkdir(parents=True)
    names, size = [], -(-table.num_rows // shards)
    for number in range(shards):
        names.append(f"data-{number:05}-of-{shards:05}.arrow")
        with pa.ipc.new_stream(folder / names[-1], table.schema) as stream:
            stream.write_table(table.slice(number * size, size), max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def write_set(folder: Path, text="text", train="train", test="test", n=40, classes=2, names=None):
    """Write a data set as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, seed in ((train, 0), (test, 1)):
        rows = tickets(n, classes=2, seed=seed)
        table = pa.table(
            {
                text: [row["body"] for row in rows],
                "label": [number % classes for number in range(n)],
            }
        )
        if names:
            feature = {"info": {"features": {"label": {"names": list(names)}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
        pq.write_table(table, folder / f"{kind}-00000-of-00001.parquet")
