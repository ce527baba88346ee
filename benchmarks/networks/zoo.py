"""Networks that were not written for scpl, tiny: code as users have it, families of transformers.

Each entry makes a network and says how to make a batch for it, of any number of rows, and of any
length where the network takes sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 3
TOKENS = 60


@dataclass(frozen=True)
class Entry:
    """A network.

    Attributes:
        build: Makes it.
        batch: Makes inputs of some rows and length, as the network takes them.
        output: Which output holds the logits, where that must be said.
        refused: What the refusal says, if it cannot be cut in every way.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    output: str | int | None = None
    refused: str = ""


def images(side: int = 16, channels: int = 3) -> Callable[[int, int], Tensor]:
    return lambda rows, length: torch.randn(rows, channels, side, side)


def vectors(width: int) -> Callable[[int, int], Tensor]:
    return lambda rows, length: torch.randn(rows, width)


def sequences(width: int) -> Callable[[int, int], Tensor]:
    return lambda rows, length: torch.randn(rows, length, width)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, TOKENS, (rows, length))


def texts(*names: str, pad: int = 0) -> Callable[[int, int], dict[str, Tensor]]:
    """Texts of several lengths, padded at the end."""

    def batch(rows: int, length: int) -> dict[str, Tensor]:
        lengths = torch.randint(1, length + 1, (rows, 1))
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        ids = tokens(rows, length).masked_fill(mask == 0, pad)
        made = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in names:
            made["token_type_ids"] = torch.randint(0, 2, (rows, length))
        return made

    return batch


def pixels(side: int = 16) -> Callable[[int, int], dict[str, Tensor]]:
    return lambda rows, length: {"pixel_values": torch.randn(rows, 3, side, side)}


# --- code as users write it


class Mixer(nn.Module):
    """An MLP-Mixer with a ModuleList."""

    class Block(nn.Module):
        def __init__(self, width: int, places: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mix = nn.Sequential(nn.Linear(places, 8), nn.GELU(), nn.Linear(8, places))
            self.feed = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.feed(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList([Mixer.Block(16, 16) for _ in range(4)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Skip(nn.Module):
    """A value that skips over every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        b = torch.relu(self.b(a))
        c = torch.relu(self.c(b))
        return self.head(torch.relu(self.d(c)) + a)


class Flattened(nn.Module):
    """``torch.flatten`` in forward, as torchvision's networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(32, 16),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(16, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class TwoInputs(nn.Module):
    """An image and numbers about it; logits and an estimate beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 16)
        )
        self.read = nn.Linear(5, 16)
        self.join = nn.Linear(32, 16)
        self.mix = nn.Linear(16, 16)
        self.head, self.estimate = nn.Linear(16, CLASSES), nn.Linear(16, 1)

    def forward(self, image: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.look(image), torch.tanh(self.read(numbers))], dim=1)
        mixed = torch.relu(self.mix(torch.relu(self.join(both))))
        return self.head(mixed), self.estimate(mixed)


class Recurrent(nn.Module):
    """Two GRUs on token ids; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16)
        self.first = nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.second = nn.GRU(32, 16, batch_first=True)
        self.third = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.first(self.embedding(ids))
        x, _ = self.second(x)
        _, (state, _) = self.third(x)
        return self.head(state[-1])


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask that is computed from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16, padding_idx=0)
        self.register_buffer("positions", torch.randn(1, 64, 16), persistent=False)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        x = self.embedding(ids) + self.positions[:, : ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(2).float()
        return self.head((x * kept).sum(1) / kept.sum(1).clamp(min=1))


class LengthFirst(nn.Module):
    """A Transformer whose batch is the second dimension inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32) for _ in range(4)])
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0))


class UNet(nn.Module):
    """Skips over two cuts, and a sum over the maps at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, 8), self._block(8, 16)
        self.middle = self._block(16, 16)
        self.up1, self.up2 = self._block(32, 8), self._block(16, 8)
        self.head = nn.Linear(8, CLASSES)

    @staticmethod
    def _block(channels: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = self.middle(functional.max_pool2d(b, 2))
        d = self.up1(torch.cat([functional.interpolate(c, scale_factor=2.0), b], 1))
        e = self.up2(torch.cat([functional.interpolate(d, scale_factor=2.0), a], 1))
        return self.head(e.mean((2, 3)))


class TimmLike(nn.Module):
    """A vision transformer as timm writes it: class token, positions on the root, layer scale."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
            self.gamma = nn.Parameter(torch.zeros(width))
            self.drop_rate = 0.2

        def forward(self, x: Tensor) -> Tensor:
            rows, places, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(rows, places, 3, 2, width // 2)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.gamma * self.proj(y.transpose(1, 2).reshape(rows, places, width))
            return x + self.drop_path(self.mlp(self.norm2(x)))

        def drop_path(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            kept = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - self.drop_rate)
            return x * kept / (1 - self.drop_rate)

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 16))
        self.blocks = nn.Sequential(*(TimmLike.Block(16) for _ in range(4)))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


class Dense(nn.Module):
    """Each layer sees all earlier ones (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(8 * i, 8, 3, padding=1) for i in range(1, 5)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8 * i) for i in range(1, 5)])
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            found.append(layer(torch.relu(norm(torch.cat(found, 1)))))
        return self.head(torch.cat(found, 1).mean((2, 3)))


class UsedTwice(nn.Module):
    """One layer runs twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(8, 16), nn.Linear(16, 16)
        self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.again(torch.relu(self.again(x)))) + 1
        return self.head(torch.relu(self.third(torch.relu(self.second(x)))))


class Normed(nn.Module):
    """Old and new weight norm and spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.a = torch.nn.utils.weight_norm(nn.Linear(8, 16))
        self.b = torch.nn.utils.spectral_norm(nn.Linear(16, 16))
        self.c = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.d = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = functional.relu(layer(x)) + 0.1
        return self.head(x)


class Lazy(nn.Module):
    """Layers that learn their sizes from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.LazyLinear(16) for _ in range(4))
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = torch.tanh(layer(x)) * 2
        return self.head(x)


class FunctionalDropout(nn.Module):
    """Dropout, a gate and a position that begin at zero: in forward, not in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.d = nn.Linear(16, 16)
        self.drop_rate = 0.5
        self.gate, self.shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x)) + self.shift
        b = functional.dropout(torch.relu(self.b(a)), self.drop_rate, self.training)
        c = torch.relu(self.c(b)) + self.gate * a
        return self.head(torch.relu(self.d(c)))


class TiedOverStages(nn.Module):
    """Two layers with one weight: no cut may separate them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.d.weight = self.a.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = torch.relu(layer(x)) + 0.1
        return self.head(x)


class DataDependent(nn.Module):
    """Its way depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.b(x) if x.sum() > 0 else x)


def nested() -> nn.Module:
    def block(width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU())

    return nn.Sequential(
        block(8, 16),
        nn.Sequential(block(16, 16), block(16, 16)),
        block(16, 16),
        nn.Linear(16, CLASSES),
    )


def pretrained_like(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A classifier of transformers from a tiny configuration."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **sizes)
        task = "Image" if hasattr(transformers, f"{kind}ForImageClassification") else "Sequence"
        return getattr(transformers, f"{kind}For{task}Classification")(config)

    return build


BERT = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": TOKENS, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
VIT = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip

USERS: dict[str, Entry] = {
    "nested Sequential": Entry(nested, vectors(8)),
    "torch.flatten in forward": Entry(Flattened, images()),
    "MLP-Mixer, ModuleList": Entry(Mixer, images()),
    "skip over every cut": Entry(Skip, vectors(8)),
    "two inputs, two outputs": Entry(
        TwoInputs,
        lambda rows, length: (torch.randn(rows, 3, 16, 16), torch.randn(rows, 5)),
        output=0,
    ),
    "GRU and LSTM": Entry(Recurrent, tokens),
    "nn.TransformerEncoder, mask from tokens": Entry(
        Encoder, lambda rows, length: texts()(rows, length)["input_ids"]
    ),
    "Transformer, length first": Entry(LengthFirst, tokens),
    "U-Net": Entry(UNet, images()),
    "timm-like ViT, stochastic depth": Entry(TimmLike, images()),
    "DenseNet-like": Entry(Dense, images()),
    "layer used twice": Entry(UsedTwice, vectors(8)),
    "weight and spectral norm, old and new": Entry(Normed, vectors(8)),
    "lazy layers": Entry(Lazy, vectors(8)),
    "functional dropout, gates at zero": Entry(FunctionalDropout, vectors(8)),
    "weights tied over stages": Entry(
        TiedOverStages, vectors(8), refused="must belong to one stage"
    ),
    "data-dependent branch": Entry(DataDependent, vectors(8), refused="torch.export must be able"),
}

VIT_BY_RATIO = {name: size for name, size in VIT.items() if name != "intermediate_size"}

TRANSFORMERS: dict[str, Entry] = {
    "BERT": Entry(pretrained_like("Bert", **BERT), texts("token_type_ids")),
    "RoBERTa": Entry(pretrained_like("Roberta", **BERT, pad_token_id=0), texts()),
    "ELECTRA": Entry(pretrained_like("Electra", **BERT, embedding_size=16), texts()),
    "DistilBERT": Entry(
        pretrained_like(
            "DistilBert", dim=16, n_layers=4, n_heads=2, hidden_dim=32, vocab_size=TOKENS
        ),
        texts(),
    ),
    "DeBERTa-v2": Entry(
        pretrained_like("DebertaV2", **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        texts(),
    ),
    "MPNet": Entry(pretrained_like("MPNet", **BERT), texts()),
    "ModernBERT": Entry(
        pretrained_like("ModernBert", **BERT, pad_token_id=0, cls_token_id=1, sep_token_id=2),
        texts(),
    ),
    "ALBERT": Entry(
        pretrained_like("Albert", **BERT, embedding_size=16),
        texts(),
        refused="must belong to one stage",
    ),
    "GPT-2": Entry(
        pretrained_like(
            "GPT2",
            n_embd=16,
            n_layer=4,
            n_head=2,
            vocab_size=TOKENS,
            n_positions=64,
            pad_token_id=0,
        ),
        texts(),
    ),
    "OPT": Entry(
        pretrained_like(
            "OPT",
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            ffn_dim=32,
            vocab_size=TOKENS,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            pad_token_id=0,
        ),
        texts(),
    ),
    "Llama": Entry(pretrained_like("Llama", **LLAMA), texts()),
    "Qwen2": Entry(pretrained_like("Qwen2", **LLAMA), texts()),
    "Gemma": Entry(pretrained_like("Gemma", **LLAMA, head_dim=8), texts()),
    "ViT": Entry(pretrained_like("ViT", **VIT), pixels()),
    "DeiT": Entry(pretrained_like("DeiT", **VIT), pixels()),
    "DINOv2": Entry(pretrained_like("Dinov2", **VIT_BY_RATIO), pixels()),
    "BEiT": Entry(pretrained_like("Beit", **VIT), pixels()),
    "Swin": Entry(
        pretrained_like(
            "Swin",
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
        ),
        pixels(32),
    ),
    "ResNet": Entry(
        pretrained_like(
            "ResNet",
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
        ),
        pixels(32),
    ),
    "RegNet": Entry(
        pretrained_like(
            "RegNet",
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 16],
            depths=[1, 1, 1, 1],
            groups_width=8,
        ),
        pixels(32),
    ),
    "ConvNeXt": Entry(
        pretrained_like(
            "ConvNext", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 2, 1], drop_path_rate=0.2
        ),
        pixels(32),
    ),
    "MobileNetV2": Entry(
        pretrained_like("MobileNetV2", depth_multiplier=0.25, image_size=32), pixels(32)
    ),
    "SegFormer": Entry(
        pretrained_like(
            "Segformer",
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        ),
        pixels(32),
    ),
    "PoolFormer": Entry(
        pretrained_like("PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]), pixels(32)
    ),
}

ZOO: dict[str, Entry] = USERS | TRANSFORMERS
