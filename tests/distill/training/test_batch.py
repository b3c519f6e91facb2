import pytest
import torch

from distill.matching.distiller import Losses, merge
from distill.training.batch import Batch


def numbered(labelled: int, unlabelled: int, tagged: bool) -> Batch:
    """Images that are their own number."""
    images = torch.arange(float(labelled + unlabelled)).reshape(-1, 1, 1, 1)
    tags = images.long().reshape(-1, 1).expand(-1, 3)
    return Batch(
        images[:labelled],
        torch.arange(labelled),
        images[labelled:] if unlabelled else None,
        tags if tagged else None,
        torch.arange(labelled),
    )


@pytest.mark.parametrize("unlabelled", [0, 6])
@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_part_has_its_share_and_the_tags_stay_with_their_images(
    unlabelled: int, tagged: bool, parts: int
) -> None:
    cut = list(numbered(4, unlabelled, tagged).micro_batches(parts))
    assert len(cut) == parts
    for part in cut:
        assert len(part.labelled) == 4 // parts
        assert torch.equal(part.labelled.flatten().long(), part.targets)
        assert part.positions is not None
        assert torch.equal(part.positions, part.targets)
        assert (part.unlabelled is None) == (unlabelled == 0)
        assert len(part.images) == (4 + unlabelled) // parts
        if part.tags is not None:
            assert torch.equal(part.tags[:, 0], part.images.flatten().long())
        assert (part.tags is not None) == tagged
    seen = torch.cat([part.images.flatten() for part in cut])
    assert seen.sort().values.tolist() == list(range(4 + unlabelled))


def losses(first: int, total: float, floor: bool) -> Losses:
    """Of one labelled and one unlabelled image, numbered from `first`."""
    rows = torch.tensor([first, first + 1])
    return Losses(
        *torch.full((4,), total),
        rewards={"teacher_task": rows[:1].float(), "label_free": 10 * rows.float()},
        context=rows[:, None].float(),
        bins=rows,
        floor=torch.stack([rows, 10 * rows]).float() if floor else torch.zeros(0),
    )


def test_merged_losses_are_means_and_the_rows_of_all_parts() -> None:
    merged = merge([losses(0, 1.0, True), losses(2, 3.0, True)])
    assert [x.item() for x in merged[:4]] == [2.0] * 4
    assert merged.rewards["teacher_task"].tolist() == [0, 2]
    assert merged.rewards["label_free"].tolist() == [0, 10, 20, 30]
    assert merged.bins.tolist() == [0, 1, 2, 3]
    assert merged.context.tolist() == [[0], [1], [2], [3]]
    assert merged.floor.tolist() == [[0, 1, 2, 3], [0, 10, 20, 30]]
    assert merge([losses(0, 1.0, False), losses(2, 3.0, False)]).floor.shape == (0,)
