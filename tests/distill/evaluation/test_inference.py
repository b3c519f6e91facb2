"""Windows, flips and scales give what one look gives where they must, and averages elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.evaluation.inference import several_looks


def pixelwise(images: Tensor) -> Tensor:
    """Logits of two classes from each pixel alone."""
    return torch.stack([images[:, 0] - 0.5, images[:, 1]], dim=1)


def test_one_look_is_the_predictor_itself() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(several_looks(pixelwise, size=(8, 8))(images), pixelwise(images))


@pytest.mark.parametrize("window", [(8, 8), (7, 20), (5, 5)])
def test_windows_cover_an_image_once_averaged(window: tuple[int, int]) -> None:
    seen: list[tuple[int, ...]] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return pixelwise(images)

    images = torch.rand(1, 3, 11, 20)
    looks = several_looks(predict, size=window, window=window)(images)
    assert torch.allclose(looks, pixelwise(images), atol=1e-6)
    assert set(seen) == {window}


@pytest.mark.parametrize(("height", "count"), [(8, 1), (13, 2), (14, 3), (20, 4), (23, 4)])
def test_windows_are_as_few_as_overlap_by_a_third(height: int, count: int) -> None:
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return images[:, :2]

    several_looks(predict, size=(8, 8), window=(8, 8))(torch.rand(1, 3, height, 8))
    assert len(seen) == count


def test_windows_are_resized_to_what_the_predictor_takes() -> None:
    def predict(images: Tensor) -> Tensor:
        assert images.shape[-2:] == (16, 16)
        return pixelwise(images)

    images = torch.full((1, 3, 12, 30), 0.25)
    looks = several_looks(predict, size=(16, 16), window=(8, 8))(images)
    assert torch.allclose(looks, pixelwise(images))


def test_an_image_smaller_than_the_window_is_one_window() -> None:
    images = torch.full((1, 3, 4, 30), 0.25)
    looks = several_looks(pixelwise, size=(8, 8), window=(8, 40))(images)
    assert looks.shape == (1, 2, 4, 30)


def test_a_flipped_look_is_flipped_back() -> None:
    images = torch.rand(2, 3, 6, 9)
    looks = several_looks(pixelwise, size=(6, 9), flip=True)(images)
    assert torch.allclose(looks, pixelwise(images).softmax(1), atol=1e-6)

    def leftmost(images: Tensor) -> Tensor:  # (B, 2): a class an image
        return torch.stack([images[:, 0, 0, 0], images[:, 0, 0, -1]], dim=1)

    both = several_looks(leftmost, size=(6, 9), flip=True)(images)
    assert torch.allclose(both.softmax(1), torch.full_like(both, 0.5))

    # The two classes are called by their sides: in the mirror each is the other.
    sides = several_looks(leftmost, size=(6, 9), flip=True, mirrored=(1, 0))(images)
    assert torch.allclose(sides.softmax(1), leftmost(images).softmax(1))


def test_looks_at_classes_have_the_mean_probabilities_as_their_softmax() -> None:
    """A sure predictor stays sure, however often it looks."""
    sure = torch.tensor([[20.0] + [0.0] * 9])
    looks = several_looks(lambda images: sure, size=(8, 8), flip=True)(torch.rand(1, 3, 8, 8))
    assert torch.allclose(looks.softmax(1), sure.softmax(1), atol=1e-6)


def test_scales_are_averaged_at_the_finest() -> None:
    sizes: list[int] = []

    def predict(images: Tensor) -> Tensor:
        sizes.append(images.shape[-1])
        value = 0.0 if images.shape[-1] == 8 else 2.0
        return torch.stack(
            [torch.full_like(images[:, 0], value), torch.zeros_like(images[:, 0])], 1
        )

    looks = several_looks(predict, size=(8, 8), scales=(1.0, 1.5))(torch.rand(1, 3, 8, 8))
    assert sizes == [8, 12]
    assert looks.shape == (1, 2, 12, 12)
    expected = (0.5 + torch.tensor(2.0).sigmoid()) / 2
    assert torch.allclose(looks[0, 0], expected.expand(12, 12))
