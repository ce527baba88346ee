"""Run folders around networks that nobody trained."""

import json

from safetensors.torch import save_file

from scpl import models
from scpl.app.config import TrainConfig, write_toml

WORDS = ["<pad>", "<unk>", "printer", "screen", "hotel", "taxi"]


def made_run(path, channels=3, size=16, num_classes=3, classes=None, **settings):
    """A run folder around an untrained network."""
    path.mkdir()
    network = models.build(
        "small-cnn", num_classes=num_classes, in_channels=channels, image_size=size
    )
    save_file(network.state_dict(), path / "model.safetensors")
    description = {
        "model": "small-cnn",
        "num_classes": num_classes,
        "in_channels": channels,
        "image_size": size,
        "mean": [0.4] * channels,
        "std": [0.3] * channels,
        "classes": list(classes or [f"class {i}" for i in range(num_classes)]),
    }
    (path / "model.json").write_text(json.dumps(description))
    (path / "config.toml").write_text(write_toml(TrainConfig.of(threads=1, **settings)))
    return network.eval(), description


def made_text_run(path, classes=("hardware", "travel"), columns=("text",)):
    """The same around a network for texts of the words above."""
    path.mkdir()
    network = models.build_text("lstm", num_classes=len(classes), vocab_size=len(WORDS), width=8)
    save_file(network.state_dict(), path / "model.safetensors")
    description = {
        "model": "lstm",
        "kind": "text",
        "num_classes": len(classes),
        "vocab_size": len(WORDS),
        "max_tokens": 9,
        "text_columns": list(columns),
        "label_columns": ["label"],
        "fingerprint": "",
        "sizes": {"width": 8},
        "classes": list(classes),
    }
    (path / "model.json").write_text(json.dumps(description))
    (path / "tokenizer.json").write_text(json.dumps({"kind": "words", "words": WORDS}))
    (path / "config.toml").write_text(write_toml(TrainConfig.of(threads=1, model="lstm")))
    return path
