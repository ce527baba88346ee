"""A local method of your own, in one file: every stage predicts, and matches similarities.

python examples/own_method.py

Each stage minimises (1 - beta) times the cross-entropy of a local classifier plus beta times how
far the similarities of its features are from those of the labels; after "Training Neural Networks
with Local Error Signals" (Noekland and Eidnes 2019), in short form.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scpl
from scpl import heads, models
from scpl.data import images as data
from scpl.methods import Site


def similarities(rows: Tensor) -> Tensor:
    """Cosine similarities ``[N, N]`` of centred rows."""
    unit = F.normalize(rows - rows.mean(dim=1, keepdim=True))
    return unit @ unit.T


class PredictAndMatch(scpl.Objective):
    """What one stage minimises. No gradient leaves the stage: its input comes detached."""

    def __init__(self, head: nn.Module, classifier: nn.Module, classes: int, beta: float) -> None:
        super().__init__()
        self.head, self.classifier, self.classes, self.beta = head, classifier, classes, beta

    def forward(self, features: Tensor, target: Tensor, carry: Any) -> dict[str, Tensor]:
        """The stage minimises the sum of these terms; reports show each by its name."""
        prediction = F.cross_entropy(self.predict(features), target)
        labels = F.one_hot(target, self.classes).float()
        projections = self.whole(self.head(features))
        matching = F.mse_loss(similarities(projections), similarities(labels))
        return {"prediction": (1 - self.beta) * prediction, "matching": self.beta * matching}

    def predict(self, features: Tensor) -> Tensor:
        """Logits of this stage; those of the last stage are the network's.

        What is `whole` is of all samples, though replicas of a stage may share these out.
        """
        return self.whole(self.classifier(features))


@dataclass(frozen=True)
class PredSim(scpl.Method):
    """Says which objective each stage gets; nothing else of scpl has to know of it."""

    name: ClassVar[str] = "predsim"

    beta: float = 0.9

    def objective(self, site: Site) -> scpl.Objective:
        """Build the objective of one stage."""
        # The network's own classifier stands at its end; other stages get one of their own.
        classifier = site.readout or site.head(heads.PooledMLP(64, site.num_classes))
        head = site.head(heads.PooledMLP(64, 64))
        return PredictAndMatch(head, classifier, site.num_classes, self.beta)


def main() -> None:
    torch.manual_seed(0)
    digits = data.load("digits", image_size=16)
    plain = data.Augmentation("none", digits.mean, digits.std)
    train = data.Loader(digits.train, plain, batch_size=64, shuffle=True)
    test = data.Loader(digits.test, plain, batch_size=256)

    model = models.build("small-cnn", num_classes=10, in_channels=1, image_size=16)
    parts = scpl.split(model, models.paper_cuts("small-cnn"), example=next(iter(test))[0][:2])
    with scpl.Pipeline(
        parts,
        PredSim(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    ) as pipeline:
        for epoch in range(5):
            pipeline.train(train)
            scores = pipeline.evaluate(test).peek()
            if scores is not None:
                stages = " | ".join(f"{accuracy:.1%}" for accuracy in scores.stage_accuracy)
                print(f"epoch {epoch + 1}  accuracy of each stage {stages}")


if __name__ == "__main__":
    main()
