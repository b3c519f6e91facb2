"""Figures of a step, fetched late: the program runs ahead of a GPU instead of waiting for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.errors import UserError


class Late:
    """Scalars on their way from the device; reading them waits for no more than their own copy.

    Args:
        step: the step that they belong to, for the message.
        values: scalars, all on one device.
    """

    def __init__(self, step: int, **values: Tensor) -> None:
        self.step, self._names = step, tuple(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._copied: torch.cuda.Event | None = None
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        else:
            self._host = stacked

    @property
    def arrived(self) -> bool:
        """Whether reading would not wait; on the CPU always."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def read(self) -> dict[str, float]:
        """The figures by name."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._names, self._host.tolist(), strict=True))

    def read_finite(self, remedy: str, where: str = "") -> dict[str, float]:
        """The same; a UserError that names the first which is not finite, and its step."""
        figures = self.read()
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{where}the {name.replace('_', ' ')} is not finite at step {self.step}; "
                    f"the last checkpoint is intact; try {remedy}"
                )
        return figures
