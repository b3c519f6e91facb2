"""Scores by hand and against two other libraries."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import confusion_matrix, jaccard_score
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from distill.metrics import (
    BoundaryMatrix,
    ConfusionMatrix,
    boundaries,
    boundary_iou,
    classification_scores,
    figure_text,
    more_is_better,
    segmentation_scores,
)


def random_masks(seed: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions, and targets with void; the last class occurs in neither."""
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, classes - 1, (3, 9, 11), generator=generator)
    targets = torch.randint(0, classes - 1, (3, 9, 11), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = 255
    return predictions, targets


def test_scores_of_a_matrix_counted_by_hand() -> None:
    matrix = ConfusionMatrix(3)
    targets = torch.tensor([[[0, 0, 0, 1], [1, 255, 0, 255]]])
    predictions = torch.tensor([[[0, 0, 1, 1], [1, 0, 0, 2]]])
    matrix.update(predictions, targets)
    assert matrix.counts.tolist() == [[3, 1, 0], [0, 2, 0], [0, 0, 0]]
    scores = segmentation_scores(matrix.counts)
    assert scores.iou[:2] == pytest.approx((3 / 4, 2 / 3))
    assert math.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert scores.mean_accuracy == pytest.approx((3 / 4 + 1) / 2)
    assert scores.pixel_accuracy == pytest.approx(5 / 6)


def test_class_that_is_only_predicted_counts_as_zero() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 2]), torch.tensor([0, 0]))
    scores = segmentation_scores(matrix.counts)
    assert scores.iou[2] == 0.0
    assert scores.miou == pytest.approx(0.25)
    assert scores.mean_accuracy == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(4))
def test_scores_agree_with_torchmetrics_and_scikit_learn(seed: int) -> None:
    classes = 6
    predictions, targets = random_masks(seed, classes)
    matrix = ConfusionMatrix(classes)
    matrix.update(predictions, targets)
    seen = targets != 255
    expected = confusion_matrix(targets[seen], predictions[seen], labels=range(classes))
    assert matrix.counts.tolist() == expected.tolist()
    scores = segmentation_scores(matrix.counts)
    jaccard = MulticlassJaccardIndex(classes, average="macro", ignore_index=255)
    assert scores.miou == pytest.approx(jaccard(predictions, targets).item(), abs=1e-6)
    micro = MulticlassAccuracy(classes, average="micro", ignore_index=255)
    assert scores.pixel_accuracy == pytest.approx(micro(predictions, targets).item(), abs=1e-6)


def test_counts_of_parts_add_up_to_the_counts_of_the_whole() -> None:
    predictions, targets = random_masks(0, 5)
    whole = ConfusionMatrix(5)
    whole.update(predictions, targets)
    parts = [ConfusionMatrix(5) for _ in range(3)]
    for part, one, other in zip(parts, predictions, targets, strict=True):
        part.update(one, other)
    assert torch.equal(sum(part.counts for part in parts), whole.counts)  # type: ignore[arg-type]
    assert whole.counts.dtype == torch.int64


def test_uint8_masks_do_not_overflow() -> None:
    matrix = ConfusionMatrix(20)
    matrix.update(torch.tensor([19], dtype=torch.uint8), torch.tensor([19], dtype=torch.uint8))
    assert matrix.counts[19, 19] == 1


def test_top1_and_accuracy_of_each_class_by_hand() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]))
    top1, mean_accuracy, accuracy = classification_scores(matrix.counts)
    assert mean_accuracy == pytest.approx(0.75)
    assert top1 == pytest.approx(2 / 3)
    assert accuracy[:2] == pytest.approx((0.5, 1.0))
    assert math.isnan(accuracy[2])


def test_a_negative_ignore_index_leaves_every_class_in() -> None:
    """ImageNet's labels are all known: its last class counts as the others do."""
    matrix = ConfusionMatrix(2, -1)
    matrix.update(torch.tensor([1, 1, 0]), torch.tensor([1, 1, 0]))
    assert matrix.counts.tolist() == [[1, 0], [0, 2]]
    assert classification_scores(matrix.counts).accuracy == (1.0, 1.0)


def test_only_void_scores_nan_and_not_zero() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([1]), torch.tensor([255]))
    assert math.isnan(segmentation_scores(matrix.counts).miou)


@pytest.mark.parametrize(("prediction", "target", "name"), [(2, 0, "prediction 2"), (0, -1, "-1")])
def test_a_value_that_is_no_class_is_refused_not_miscounted(
    prediction: int, target: int, name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        ConfusionMatrix(2).update(torch.tensor([prediction]), torch.tensor([target]))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        ConfusionMatrix(2).update(torch.zeros(1, 4, 4).long(), torch.zeros(1, 8, 8).long())


def test_frequency_weighted_iou_by_hand() -> None:
    scores = segmentation_scores(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]))
    assert scores.frequency_weighted_iou == pytest.approx(4 / 6 * 3 / 4 + 2 / 6 * 2 / 3)


@pytest.mark.parametrize("shape", [(23, 31), (120, 90), (5, 200)])
def test_boundaries_are_those_of_the_papers_erosion(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    coarse = torch.randint(0, 4, (2, 1, 4, 5), generator=generator).float()
    first, second = F.interpolate(coarse, shape)[:, 0].to(torch.uint8)
    steps = max(1, round(0.02 * math.hypot(*shape)))
    found = boundaries(first, second).numpy()
    for bit, mask in ((1, first), (2, second)):
        expected = np.zeros(shape, dtype=bool)
        for value in range(4):
            inside = mask.numpy() == value
            kept = ndimage.binary_erosion(inside, np.ones((3, 3)), iterations=steps, border_value=0)
            expected |= inside & ~kept
        assert np.array_equal(found & bit != 0, expected)
        assert 0 < expected.mean() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_boundary_iou_agrees_with_erosion_class_by_class(seed: int) -> None:
    classes, shape = 4, (60, 80)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes - 1, (2, 1, 6, 8), generator=generator).float()
    predictions, targets = F.interpolate(coarse, shape)[:, 0].long()
    targets[:10, 20:30] = 255
    matrix = BoundaryMatrix(classes)
    matrix.update(predictions, targets)
    known = targets.numpy() != 255
    predictions[targets == 255] = 255  # what is predicted in void is nobody's concern
    for value, found in enumerate(boundary_iou(matrix.counts).tolist()):
        edges = []
        for mask in (predictions.numpy(), targets.numpy()):
            inside = mask == value
            kept = ndimage.binary_erosion(inside, np.ones((3, 3)), iterations=2, border_value=0)
            edges.append(inside & ~kept & known)
        both, either = (edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()
        if either:
            assert found == pytest.approx(both / either, abs=1e-6)
        else:
            assert math.isnan(found)


def test_a_perfect_prediction_scores_1_beside_void_too() -> None:
    """A square in a ring of void, and a hole of void: what is predicted there does not count."""
    prediction = torch.zeros(60, 80, dtype=torch.uint8)
    prediction[20:40, 20:60] = 1
    targets = prediction.clone()
    targets[17:43, 17:63] = 255
    targets[20:40, 20:60] = 1
    targets[28:33, 30:40] = 255
    matrix = BoundaryMatrix(2)
    matrix.update(prediction, targets)
    assert boundary_iou(matrix.counts).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("classes", "ignored"), [(11, 255), (40, 255), (150, 255), (5, 3), (4, -1)]
)
def test_boundary_counts_hold_the_confusion_matrix(classes: int, ignored: int) -> None:
    """Few, more and many classes are counted in integers of other widths."""
    generator = torch.Generator().manual_seed(classes)
    predictions, targets = torch.randint(0, classes, (2, 40, 50), generator=generator)
    if ignored == 255:
        targets[:9, :20] = 255
    plain, edges = ConfusionMatrix(classes, ignored), BoundaryMatrix(classes, ignored)
    for _ in range(2):
        plain.counts.zero_()
        plain.update(predictions, targets)
        alone = edges.update(predictions.to(torch.uint8), targets.to(torch.uint8))
        assert torch.equal(alone, plain.counts)
    assert torch.equal(edges.counts.sum(2), 2 * plain.counts)


@pytest.mark.parametrize(
    ("prediction", "target", "name"),
    [(2, 0, "prediction 2"), (-1, 0, "prediction -1"), (0, 2, "target 2"), (0, 300, "target 300")],
)
def test_a_stray_value_is_not_counted_in_another_classes_boundary(
    prediction: int, target: int, name: str
) -> None:
    matrix = BoundaryMatrix(2)
    masks = torch.zeros(2, 6, 6, dtype=torch.int64)
    masks[0, 2, 2], masks[1, 3, 3] = prediction, target
    with pytest.raises(ValueError, match=f"{name} is not a class from 0 to 1"):
        matrix.update(masks[0], masks[1])
    assert not matrix.counts.any()


def test_boundary_iou_by_hand() -> None:
    """A 6x6 square in 12x12, predicted one pixel to the right: rings of width 1 (d is 1)."""
    targets = torch.zeros(12, 12, dtype=torch.uint8)
    targets[3:9, 3:9] = 1
    matrix = BoundaryMatrix(2)
    matrix.update(targets.roll(1, 1).long(), targets)
    # Two rings of 20 pixels share their top and bottom rows, 5 pixels each.
    assert boundary_iou(matrix.counts)[1].item() == pytest.approx(10 / 30)
    matrix.update(targets.long(), targets)
    assert boundary_iou(matrix.counts)[1].item() == pytest.approx((10 + 20) / (30 + 20))


def test_iou_of_each_class_agrees_with_scikit_learn() -> None:
    predictions, targets = random_masks(9, 5)
    matrix = ConfusionMatrix(5)
    matrix.update(predictions, targets)
    seen = targets != 255
    expected = jaccard_score(
        targets[seen], predictions[seen], labels=range(4), average=None, zero_division=0
    )
    assert segmentation_scores(matrix.counts).iou[:4] == pytest.approx(list(expected), abs=1e-6)


def test_errors_are_better_when_lower_and_shares_are_given_in_points():
    names = ("miou", "nme", "rmse")
    assert [more_is_better(name, 0.25) for name in names] == [0.25, -0.25, -0.25]
    assert [figure_text(name, 0.25) for name in names] == ["25.0", "25.0", "0.250"]
