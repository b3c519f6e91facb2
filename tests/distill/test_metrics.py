"""Scores by hand and against two other libraries."""

import math

import pytest
import torch
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from distill.metrics import ConfusionMatrix, classification_scores, segmentation_scores


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
    top1, accuracy = classification_scores(matrix.counts)
    assert top1 == pytest.approx(2 / 3)
    assert accuracy[:2] == pytest.approx((0.5, 1.0))
    assert math.isnan(accuracy[2])


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
    with pytest.raises(ValueError, match="predictions"):
        ConfusionMatrix(2).update(torch.zeros(1, 4, 4).long(), torch.zeros(1, 8, 8).long())
