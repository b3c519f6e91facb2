"""What to try where a figure of a step is not finite."""

from __future__ import annotations

from distill.config import RunConfig
from distill.precision import resolve_dtype, resolve_precision

LARGE = 100
"""Weight of a feature loss from which it is suspected."""


def remedy(config: RunConfig, *, taught: bool, kind: str, step: int) -> str:
    """The changes to try, in words, the likeliest first.

    Args:
        config: The recipe.
        taught: Whether the arm has a teacher.
        kind: Kind of device, `cuda` or `cpu`.
        step: The step, 0 for the first: nothing was learnt before it.
    """
    weight = config.train.feature_weight * max(pair.weight for pair in config.pairs)
    short = taught and config.teacher.dtype == "float16"  # which ends at 65504
    tries = {
        f"teacher.dtype={resolve_dtype('auto', kind)}": short,
        "a smaller train.lr": step > 0,
        "train.precision=no": resolve_precision(config.train.precision, kind) == "bf16",
        "a smaller train.feature_weight or pairs.N.weight": taught and weight > LARGE,
        "another loss, teacher or student": step == 0,
    }
    *first, last = (words for words, useful in tries.items() if useful)
    return f"{', '.join(first)}, or {last}" if first else last
