import math

import pytest
import torch

from distill.errors import UserError
from distill.training.deferred import DeferredFigures

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU: none here")


def test_figures_are_those_of_their_step() -> None:
    loss = torch.tensor(1.5, requires_grad=True)
    late = DeferredFigures(3, loss=loss, gradient=torch.tensor(2.0))
    with torch.no_grad():
        loss.zero_()
    assert late.arrived
    assert late.read() == {"loss": 1.5, "gradient": 2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named_with_its_step(value: float) -> None:
    late = DeferredFigures(7, task_loss=torch.tensor(1.0), feature_loss=torch.tensor(value))
    with pytest.raises(UserError) as error:
        late.read_finite(lambda step: "a smaller lr", where="scratch: ")
    assert str(error.value) == (
        "scratch: the feature loss is not finite at step 7; start a new run (name=...) "
        "with a smaller lr"
    )


@NEEDS_GPU
def test_a_gpu_is_not_waited_for() -> None:
    DeferredFigures(0, loss=torch.zeros((), device="cuda"))  # the first pinned memory is waited for
    slow = torch.ones(8192, 8192, device="cuda")
    for _ in range(20):
        slow = slow @ slow / 8192
    late = DeferredFigures(0, loss=slow.mean())
    assert not late.arrived
    assert late.read() == {"loss": pytest.approx(1.0)}
