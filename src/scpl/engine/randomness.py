"""Random state that belongs to a stage, not to a process.

Dropout draws from the process-wide generators of torch. If stages shared them, the numbers a stage
draws would depend on which other stages live in its process. So each stage keeps its own state and
lends it to the process only while it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["RandomState"]


class RandomState:
    """The state of torch's default generators as one stage sees them.

    Args:
        seed: Where the sequence starts.
        device: The device the stage computes on; its generator is kept beside the CPU's.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._lent = False
        self._cpu = torch.Generator().manual_seed(seed).get_state()
        self._accelerator: Tensor | None = None
        if device.type == "cuda":
            self._accelerator = torch.Generator(device).manual_seed(seed).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Lend this state to the process; afterwards the process has its own back.

        Inside another ``active()`` of the same state this does nothing: a copy of the generator
        has 5 KiB, which is felt where steps are short.
        """
        if self._lent:
            yield
            return
        self._lent = True
        outer = torch.get_rng_state()
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            outer_accelerator = torch.cuda.get_rng_state(self._device)
            torch.cuda.set_rng_state(self._accelerator, self._device)
        try:
            yield
        finally:
            self._lent = False
            self._cpu = torch.get_rng_state()
            torch.set_rng_state(outer)
            if self._accelerator is not None:
                self._accelerator = torch.cuda.get_rng_state(self._device)
                torch.cuda.set_rng_state(outer_accelerator, self._device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as byte tensors."""
        state = {"cpu": self._cpu}
        if self._accelerator is not None:
            state["accelerator"] = self._accelerator
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state; one without an accelerator keeps the seeded one."""
        self._cpu = state["cpu"]
        if self._accelerator is not None and "accelerator" in state:
            self._accelerator = state["accelerator"]
