"""Tiny networks of ``transformers`` in folders, as its users have them."""

import json

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from text_files import TOPICS

POSITIONS = 24  # tokens that the network for texts has room for


def write_bert(folder, *, weights=True):
    """A BERT that was trained to fill gaps, with a tokenizer of a few words."""
    folder.mkdir(parents=True)
    words = sorted({*" ".join(TOPICS.values()).split(), "the", "my", "please"})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    digits = [f"{sign}{digit}" for sign in ("", "##") for digit in range(10)]
    vocabulary = folder.with_name(f"{folder.name}-vocab.txt")
    vocabulary.write_text("\n".join([*special, *words, *digits]) + "\n")
    tokenizer = BertTokenizer(str(vocabulary))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (BertForMaskedLM(config) if weights else config).save_pretrained(folder)
    return folder


def write_vit(folder, classes=5):
    """A ViT for colour images of 16 x 16 pixels, with the file of its image processor."""
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=classes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
        "do_normalize": True, "rescale_factor": 1 / 255, "size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.3],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
