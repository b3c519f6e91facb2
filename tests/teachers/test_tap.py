"""What a tap keeps stays what the layer answered."""

from __future__ import annotations

import torch
from torch import nn

from teachers.tap import Tap


def test_a_layer_in_place_does_not_write_over_the_map_before_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        expected = network[0](x)
        first, last = Tap(network, ["0", "2"], "2")(lambda: network(x))
        assert expected.min() < 0  # what the activation would have taken away
        assert torch.equal(first, expected)
        assert torch.equal(last, network(x))


def test_what_follows_the_last_layer_in_place_does_not_write_over_it_either() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        expected = network[0](x)
        (kept,) = Tap(network, ["0"], "0")(lambda: network(x), early_exit=False)
        assert torch.equal(kept, expected)
