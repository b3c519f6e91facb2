"""Segmentation heads: sizes, and the linear head against its textbook form."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from students.heads import FullyConvolutionalHead, LinearHead, PyramidHead, resize_logits
from students.student import Student


def two_maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, s, 2 * s, generator=generator) for c, s in ((3, 8), (5, 4))]


def test_linear_head_equals_one_convolution_on_the_resized_and_concatenated_maps():
    torch.manual_seed(0)
    head = LinearHead([3, 5], classes=4)
    head(two_maps())  # running statistics other than 0 and 1
    head.eval()
    fine, coarse = two_maps()
    normalised = [block[0](x) for block, x in zip(head.classifiers, (fine, coarse), strict=True)]
    stretched = F.interpolate(normalised[1], (8, 16), mode="bilinear", align_corners=False)
    weight = torch.cat([block[1].weight for block in head.classifiers], dim=1)
    expected = F.conv2d(
        torch.cat([normalised[0], stretched], 1), weight, head.classifiers[0][1].bias
    )
    torch.testing.assert_close(head([fine, coarse]), expected)


def test_pyramid_head_predicts_at_the_finest_map_and_hears_every_map():
    torch.manual_seed(0)
    head = PyramidHead([3, 5], classes=4, width=8)
    maps = [x.requires_grad_() for x in two_maps()]
    logits = head(maps)
    logits.square().sum().backward()
    assert logits.shape == (2, 4, 8, 16)
    assert all(x.grad.abs().sum() > 0 for x in maps)


def test_fcn_head_predicts_from_the_last_map_alone():
    torch.manual_seed(0)
    student = Student(
        "test_resnet", classes=4, dense=True, image_size=(64, 32), head="fcn",
        kwargs={"output_stride": 8},
    )  # fmt: skip
    assert student(torch.rand(2, 3, 64, 32))[0].shape == (2, 4, 8, 4)
    head = FullyConvolutionalHead([3, 8], classes=4).eval()
    fine, coarse = torch.randn(2, 3, 8, 8), torch.randn(2, 8, 4, 4)
    assert head([fine, coarse]).shape == (2, 4, 4, 4)
    assert torch.equal(head([fine, coarse]), head([fine + 1, coarse]))
    assert not torch.equal(head([fine, coarse]), head([fine, coarse + 1]))


def test_logits_are_resized_to_float32_of_the_masks_size():
    logits = torch.tensor([[[[0.0, 4.0]]]], dtype=torch.bfloat16)
    resized = resize_logits(logits, (1, 4))
    assert resized.dtype == torch.float32
    assert resized.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
