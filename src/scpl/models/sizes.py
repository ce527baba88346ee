"""What all networks here require of the sizes they are built for."""

from __future__ import annotations

from scpl.errors import InputError

__all__ = ["check_image_size", "check_positive", "scaled"]


def check_positive(network: str, **sizes: float) -> None:
    """Raise InputError, naming all that are not, unless every size is above zero."""
    wrong = [f"{name}={size}" for name, size in sizes.items() if not size > 0]
    if wrong:
        raise InputError(
            f"{network} needs sizes above zero", f"Got {', '.join(wrong)}", "Make them positive"
        )


def check_image_size(network: str, image_size: int, smallest: int) -> None:
    """Raise InputError unless images have at least ``smallest`` pixels a side."""
    if image_size < smallest:
        raise InputError(
            f"{network} needs images of at least {smallest} x {smallest} pixels",
            f"Got {image_size} x {image_size}",
            "Enlarge the images, or use the network 'mlp', which takes any size",
        )


def scaled(channels: int, width: float) -> int:
    """A number of channels times a width multiplier, rounded, at least 1."""
    return max(1, round(channels * width))
