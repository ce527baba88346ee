"""Train a network of your own on tensors of your own; one process or several, the same numbers.

python examples/own_network.py
torchrun --nproc-per-node 2 examples/own_network.py

An argument names a file to which the trained weights are written.
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scpl


class Residual(nn.Module):
    """A block with a skip connection: a cut goes around it, never through it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[N, width]`` to the same shape."""
        return features + self.layers(features)


class Network(nn.Module):
    """It can be cut, because ``forward`` calls its children one after the other."""

    def __init__(self, columns: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(columns, width), nn.ReLU())
        self.block1 = Residual(width)
        self.block2 = Residual(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``[N, columns]`` to logits ``[N, classes]``."""
        return self.classifier(self.block2(self.block1(self.stem(rows))))


def make_rows(count: int) -> TensorDataset:
    """Rows of 8 numbers; the signs of two products of columns make one of four classes."""
    rows = torch.randn(count, 8)
    target = (rows[:, 0] * rows[:, 1] > 0) + 2 * (rows[:, 2] * rows[:, 3] > 0)
    return TensorDataset(rows, target)


def main() -> None:
    torch.set_num_threads(1)  # as torchrun does; thread counts decide the last bit of a sum
    torch.manual_seed(0)  # every rank builds the same network; only the first one reads data
    train, test = make_rows(8192), make_rows(1024)
    train_loader = DataLoader(train, batch_size=128, shuffle=True)
    test_loader = DataLoader(test, batch_size=512)

    model = Network(columns=8, classes=4)
    parts = scpl.split(model, before=["block1", "block2"], example=train.tensors[0][:2])
    # Alone, or one of the ranks that torchrun started: the environment says which.
    with scpl.Pipeline(
        parts,
        scpl.SCPL(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    ) as pipeline:
        for epoch in range(5):
            reports = list(pipeline.steps(train_loader))
            scores = pipeline.evaluate(test_loader).peek()  # None, but on the last rank
            if scores is not None:
                losses = [sum(terms.values()) for terms in reports[-1].values()]
                shown = " | ".join(f"{loss:.3f}" for loss in losses)
                print(f"epoch {epoch + 1}  loss {shown}  accuracy {scores.accuracy:.1%}")
        trained = pipeline.export()  # on every rank: a plain Network, with its own keys

    if len(sys.argv) > 1 and pipeline.mesh.is_last:
        torch.save(trained.state_dict(), sys.argv[1])


if __name__ == "__main__":
    main()
