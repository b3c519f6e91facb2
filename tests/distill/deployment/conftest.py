"""An exported student, and images to show it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def exported(finished_run: Path) -> Path:
    return finished_run / "student"


@pytest.fixture
def images() -> Tensor:
    """(3, 3, 32, 32) in [0, 1]."""
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
