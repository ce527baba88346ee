"""Fine-tune a text classifier of transformers, in stages that learn from local objectives.

python examples/fine_tune_scpl.py MODEL TRAIN.csv TEST.csv OUT
torchrun --nproc-per-node 2 examples/fine_tune_scpl.py MODEL TRAIN.csv TEST.csv OUT

MODEL is a folder (or a name on the hub) that transformers loads; a table has the columns text and
label. Beside it, fine_tune.py does the same with plain PyTorch.
"""

import csv
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import scpl

folder, train_file, test_file, out = sys.argv[1:]
torch.manual_seed(0)
train, test = (
    list(csv.DictReader(Path(name).read_text().splitlines())) for name in (train_file, test_file)
)
labels = sorted({row["label"] for row in train})
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))


def collate(rows: list) -> dict:
    texts = [row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    batch["labels"] = torch.tensor([labels.index(row["label"]) for row in rows])
    return batch


train_loader = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
test_loader = DataLoader(test, batch_size=64, collate_fn=collate)
parts = scpl.split(model, num_stages=2, example=collate(train[:4]))
pipeline = scpl.Pipeline(parts, scpl.SCPL(), lambda params: torch.optim.AdamW(params, lr=5e-5))

for epoch in range(3):
    pipeline.train(train_loader)
    correct = pipeline.evaluate(test_loader).result().accuracy * len(test)
    print(f"epoch {epoch + 1}: {correct / len(test):.1%} of {len(test)} texts")

model = pipeline.export()
pipeline.close()
model.save_pretrained(out)
tokenizer.save_pretrained(out)
