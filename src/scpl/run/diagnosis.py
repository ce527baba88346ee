"""Why a stage does not learn: what its objective observed over an epoch, turned into advice."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["advise"]

_FLAT = -0.02
"""A contrastive loss that has not fallen this far below its chance level has taught nothing."""
_BARELY = 1.1
"""So has a cross-entropy whose classifier is right less often than this times guessing."""
_COLLAPSED = 0.1
_LONELY = 0.5


def advise(stage: int, observed: Mapping[str, float], num_classes: int) -> str | None:
    """Say why a stage has learned nothing in an epoch, and what to do.

    Args:
        stage: Its index.
        observed: Means over the epoch, by name; see `Objective.observed`.
        num_classes: Number of classes.

    Returns:
        One sentence for the log, or None if the stage learns, or nothing is known of it.
    """
    above = observed.get("above_chance")
    accuracy = observed.get("accuracy")
    learns = (above is not None and above < _FLAT) or (
        accuracy is not None and accuracy > _BARELY / num_classes
    )
    if learns or (above is None and accuracy is None):
        return None
    found = [f"contrast {above:+.3f} from chance level"] if above is not None else []
    found += [f"accuracy {100 * accuracy:.1f} %"] if accuracy is not None else []
    return f"Stage {stage} has learned nothing yet ({', '.join(found)}): {_cause(observed)}"


def _cause(observed: Mapping[str, float]) -> str:
    without, spread = observed.get("without_positives", 0.0), observed.get("spread", 1.0)
    if without > _LONELY:
        return (
            f"{100 * without:.0f} % of the anchors have no other sample of their class in the "
            "mini-batch; raise --batch-size or use --views 2"
        )
    if spread < _COLLAPSED:
        return (
            f"its projections have collapsed to one direction (spread {spread:.2f}); lower --lr "
            "or set --clip-norm"
        )
    if "accuracy" not in observed:  # contrast alone
        return "raise --lr, or add a local classifier with --cross-entropy 0.8"
    if "above_chance" in observed:
        return "raise --lr, or let its objective see more with --head-depth 2"
    return "raise --lr, or cut the network so that this stage has more layers (--cuts)"
