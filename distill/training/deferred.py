"""Figures of a step, fetched later, so that the program does not wait for a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distill.errors import UserError


class AsyncCopy:
    """A tensor being copied to the CPU; reading it waits only for that copy."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._done = tensor.detach(), None
        if not tensor.is_cuda:
            self._host = self._host.cpu()
        else:
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    @property
    def arrived(self) -> bool:
        """Whether reading is possible without waiting; always true on the CPU."""
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


class DeferredFigures:
    """The scalars of a step, by name, on their way to the CPU.

    Args:
        step: the step that they belong to, for the message.
        values: scalars, all on one device.
    """

    def __init__(self, step: int, **values: Tensor) -> None:
        self.step, self._names = step, tuple(values)
        self._copy = AsyncCopy(torch.stack([value.detach().float() for value in values.values()]))

    @property
    def arrived(self) -> bool:
        """Whether reading is possible without waiting; always true on the CPU."""
        return self._copy.arrived

    def read(self) -> dict[str, float]:
        """The figures by name."""
        return dict(zip(self._names, self._copy.read().tolist(), strict=True))

    def read_finite(self, remedy: Callable[[int], str], where: str = "") -> dict[str, float]:
        """The figures by name. Raises UserError with the step's remedy if one is not finite."""
        figures = self.read()
        for name, value in figures.items():
            if not math.isfinite(value):
                raise not_finite(self.step, name.replace("_", " "), remedy(self.step), where)
        return figures


def not_finite(step: int, what: str, remedy: str, where: str = "") -> UserError:
    """The error about a value that is not finite at a step, with its remedy."""
    return UserError(
        f"{where}the {what} is not finite at step {step}; start a new run (name=...) with {remedy}"
    )
