"""The embedded scenes: exact masks, one scene for one (seed, index), a class that is a form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler

from distill.benchmarks import shapes
from distill.benchmarks.forms import FORMS
from distill.benchmarks.shapes import Shapes, draw, draw_scene
from distill.errors import UserError

CLASS = {name: number for number, name in enumerate(Shapes.class_names)}


class Script:
    """Stands in for the random generator: the given forms, at the centre.

    Every single number drawn is `draw`: a radius of 0.2 + 0.12 draw of the image's side, tilted by
    40 (draw - 0.5) degrees.
    """

    def __init__(self, forms: Sequence[str], draw: float) -> None:
        self.forms, self.draw = [list(FORMS).index(form) for form in forms], draw

    def integers(self, low: int, high: int | None = None) -> int:
        if high is not None:
            return len(self.forms)
        return self.forms.pop(0) if low == len(FORMS) else 0

    def random(self, shape: Any = None, dtype: Any = None) -> Any:
        return self.draw if shape is None else np.full(shape, 0.5, dtype or np.float64)

    def standard_normal(self, shape: Any, dtype: Any) -> NDArray[np.float32]:
        return np.zeros(shape, dtype)


def scripted(monkeypatch: pytest.MonkeyPatch, *forms: str, draw: float = 0.5) -> NDArray[np.uint8]:
    """The mask of a scene of these forms, painted one over the other, at 100 px."""
    monkeypatch.setattr(np.random, "default_rng", lambda key: Script(forms, draw))
    return draw_scene(0, "train", 0, 100).mask


ROWS, COLUMNS = np.mgrid[0:100, 0:100] + 0.5 - 50  # of the pixel centres, from the scene's


def test_a_square_covers_the_pixels_whose_centres_lie_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Half a side of 0.8 x 26 px: from 29.2 to 70.8, so the centres 29.5 to 70.5.
    expected = np.zeros((100, 100), dtype=np.uint8)
    expected[29:71, 29:71] = CLASS["square"]
    assert np.array_equal(scripted(monkeypatch, "square"), expected)


def test_an_object_is_tilted_about_its_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    # By all of 20 degrees, at the largest radius of 32 px; (x, y) of a corner turns with it.
    turn = np.deg2rad(20.0)
    along = np.cos(turn) * COLUMNS + np.sin(turn) * ROWS
    across = np.cos(turn) * ROWS - np.sin(turn) * COLUMNS
    inside = np.maximum(np.abs(along), np.abs(across)) < 0.8 * 32
    expected = np.where(inside, CLASS["square"], 0)
    assert np.array_equal(scripted(monkeypatch, "square", draw=1.0), expected)


def test_a_disc_covers_the_pixels_whose_centres_lie_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.where(np.hypot(ROWS, COLUMNS) < 0.9 * 26, CLASS["disc"], 0)
    assert np.array_equal(scripted(monkeypatch, "disc"), expected)


def test_the_later_object_covers_the_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = scripted(monkeypatch, "square", "cross")
    assert mask[50, 50] == CLASS["cross"]
    assert mask[36, 36] == CLASS["square"]
    assert mask[50, 26] == CLASS["cross"]  # an arm that reaches beyond the square
    assert mask[20, 20] == CLASS["background"]


@pytest.mark.parametrize(
    ("form", "inside", "outside"),
    [
        ("disc", [(0, 0), (0.62, 0.62)], [(0.65, 0.65), (0, 0.91)]),
        ("ring", [(0.72, 0), (0, -0.99)], [(0, 0), (0.43, 0), (1.01, 0)]),
        ("square", [(0.79, 0.79), (-0.79, 0.5)], [(0.81, 0), (0, -0.81)]),
        ("triangle", [(0, 1.09), (0.94, -0.54), (0, 0)], [(0, -0.56), (0.5, 0.6), (0, 1.11)]),
        ("cross", [(0.99, 0.31), (-0.31, -0.99), (0, 0)], [(0.5, 0.5), (1.01, 0)]),
        ("star", [(0, 1.09), (0, -0.44), (1.04, 0.34)], [(0, 1.11), (0, -0.46), (0.7, 0.7)]),
    ],
)
def test_a_form_is_what_its_name_says(
    form: str, inside: list[tuple[float, float]], outside: list[tuple[float, float]]
) -> None:
    """At points worked out by hand; a triangle points up, a star has a tip there."""
    for points, sign in ((inside, -1), (outside, 1)):
        for x, y in points:
            assert np.sign(FORMS[form](np.array(x), np.array(y))) == sign, (form, x, y)


def test_object_and_background_mix_at_the_outline_only(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = iter([0.2, 0.8])  # of the background, of the square
    monkeypatch.setattr(shapes, "_texture", lambda *_: np.full((100, 100, 3), next(grey)))
    monkeypatch.setattr(np.random, "default_rng", lambda key: Script(["square"], 0.5))
    image, mask = draw_scene(0, "train", 0, 100)
    assert image[:, :, 0][mask > 0].min() >= 0.5 >= image[:, :, 0][mask == 0].max()
    assert np.allclose(image[30:70, 30:70], 0.8)
    image[28:72, 28:72] = 0.2
    assert np.allclose(image, 0.2)


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    first = Shapes(size=32, seed=3).dataset("train")
    again = Shapes(size=32, seed=3).dataset("train")
    image, mask = first[7]
    first[2]
    assert torch.equal(image, again[7][0])
    assert torch.equal(mask, again[7][1])
    assert not torch.equal(image, first[8][0])
    assert not torch.equal(image, Shapes(size=32, seed=4).dataset("train")[7][0])


def test_splits_share_no_scene() -> None:
    benchmark = Shapes(size=32, train=40, val=40, test=40)
    scenes = {
        bytes(benchmark.dataset(split)[index][0].numpy())
        for split in ("train", "val", "test")
        for index in range(40)
    }
    assert len(scenes) == 120


def test_a_larger_split_begins_with_the_smaller() -> None:
    few, many = (Shapes(size=32, train=n).dataset("train") for n in (5, 50))
    assert all(torch.equal(few[index][0], many[index][0]) for index in range(5))


def test_items_are_as_the_protocol_says() -> None:
    dataset = Shapes(size=48, val=3).dataset("val")
    image, mask = dataset[0]
    assert (image.shape, image.dtype) == ((3, 48, 48), torch.uint8)
    assert (mask.shape, mask.dtype) == ((48, 48), torch.uint8)
    assert len(dataset) == 3
    with pytest.raises(IndexError):
        dataset[3]


def test_the_same_index_is_the_same_scene_at_every_size() -> None:
    agree = []
    for index in range(20):
        small, large = draw_scene(0, "train", index, 32), draw_scene(0, "train", index, 64)
        corners = [large.mask[i::2, j::2] for i in (0, 1) for j in (0, 1)]
        certain = np.all([corner == corners[0] for corner in corners], axis=0)
        assert certain.mean() > 0.7
        agree.append((small.mask == corners[0])[certain].mean())
        halved = large.image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.corrcoef(small.image.ravel(), halved.ravel())[0, 1] > 0.7
    assert np.mean(agree) > 0.99


def test_every_class_occurs_and_nothing_else() -> None:
    masks = torch.stack([Shapes(size=32).dataset("train")[index][1] for index in range(40)])
    assert set(masks.flatten().tolist()) == set(range(7))


@pytest.mark.parametrize("size", [31, 129, 0, -64])
def test_a_size_outside_32_to_128_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"data.options.size: .*32 to 128 px, got {size}"):
        Shapes(size=size)


@pytest.mark.parametrize("size", [32, 128])
def test_sizes_from_32_to_128_are_drawn(size: int) -> None:
    assert Shapes(size=size).dataset("train")[0][0].shape == (3, size, size)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.options\.val: must be at least 1 scene"):
        Shapes(val=0)


def test_an_unknown_split_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no split 'tets'; did you mean 'test'"):
        Shapes().dataset("tets")


def objects() -> Any:
    """Of each visible form in some scenes: its class, mean colour, and how it fills its box."""
    for index in range(250):
        image, mask = draw_scene(0, "train", index, 48)
        for form in range(1, 7):
            inside = mask == form
            if inside.sum() < 30:
                continue
            rows, columns = np.nonzero(inside)
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            yield form, image[inside].mean(axis=0), [inside.sum() / box, inside.sum()]


def test_the_class_is_the_form_and_not_the_colour() -> None:
    classes, colours, forms = (np.array(column) for column in zip(*objects(), strict=True))

    def accuracy(features: NDArray[Any]) -> float:
        features = StandardScaler().fit_transform(features)
        return float(cross_val_score(LogisticRegression(), features, classes, cv=5).mean())

    assert len(classes) > 500
    assert accuracy(colours) < 0.23  # chance is 1 in 6, the largest class a little more
    assert accuracy(forms) > 0.27  # the probe does learn where there is something to learn


def test_scenes_are_those_that_they_have_always_been() -> None:
    """A student's figures are of these very images; the numbers are of the first version."""
    image, mask = Shapes(size=64, seed=7).dataset("test")[7]
    assert image.float().mean((1, 2)).tolist() == pytest.approx([129.25, 169.36, 163.87], abs=0.01)
    assert torch.bincount(mask.flatten().long(), minlength=7).tolist() == [
        3004,
        982,
        0,
        0,
        110,
        0,
        0,
    ]


def test_depths_are_of_the_same_scenes_and_the_background_is_farthest() -> None:
    benchmark = Shapes(size=48, val=12)
    seen = set()
    for index in range(12):
        image, mask = benchmark.dataset("val")[index]
        again, depth = benchmark.depths("val")[index]
        assert torch.equal(image, again)
        assert (depth.shape, depth.dtype) == ((48, 48), torch.float32)
        assert torch.equal(depth == 4.0, mask == 0)
        near, far = benchmark.depth_range
        assert near < depth.min() == 1.0 <= depth.max() == 4.0 < far
        seen |= set(depth.unique().tolist())
    assert seen == {1.0, 2.0, 3.0, 4.0}
    with pytest.raises(IndexError):
        benchmark.depths("val")[12]


def test_pairs_show_corners_of_one_form_where_the_masks_have_them() -> None:
    benchmark = Shapes(size=128, test=40)
    pairs, images = benchmark.pairs("test"), benchmark.dataset("test")
    categories = [pairs[index].category for index in range(8)]
    assert categories == ["square", "triangle", "cross", "star"] * 2
    meets = []
    for index in range(8):
        pair = pairs[index]
        assert pair.names[0] != pair.names[1]
        assert len(pair.source_points) == len(pair.target_points) >= 3
        sides = ((pair.names[0], pair.source, pair.source_points),)
        for name, image, points in (*sides, (pair.names[1], pair.target, pair.target_points)):
            scene, mask = images[int(name.removeprefix("test/"))]
            assert torch.equal(scene, image)
            padded = torch.nn.functional.pad(mask, (2, 2, 2, 2), value=255)
            for x, y in points.int().tolist():  # the form and something else meet here
                around = padded[y : y + 5, x : x + 5]
                assert (around == CLASS[pair.category]).any()
                meets.append(bool((around != CLASS[pair.category]).any()))
        left, top, right, bottom = pair.box.tolist()
        inside = (pair.target_points >= torch.tensor([left, top])) & (
            pair.target_points <= torch.tensor([right, bottom])
        )
        assert inside.all()
    assert np.mean(meets) > 0.9  # a few corners lie over another object of the form


def test_pairs_are_a_function_of_seed_split_and_index_and_differ() -> None:
    first, again = (Shapes(size=32, test=200).pairs("test") for _ in range(2))
    names = [first[index].names for index in range(40)]
    assert names[::-1] == [again[index].names for index in reversed(range(40))]
    assert len(set(names)) >= 38
    assert Shapes(size=32, test=200, seed=1).pairs("test")[0].names != names[0]


def test_corners_of_a_pair_correspond() -> None:
    """In units of its own object each is as far from the centre as the other."""
    pairs = Shapes(size=64, test=60).pairs("test")
    for index in range(8):
        pair, upright = pairs[index], []
        sides = zip(pair.names, (pair.source_points, pair.target_points), strict=True)
        for name, points in sides:
            drawing = draw(0, "test", int(name.removeprefix("test/")), 64)
            fits = [
                np.linalg.norm(points.numpy() / 64 - placed.centre, axis=1) / placed.radius
                for placed in drawing.objects
                if placed.form == pair.category
            ]
            upright.append(fits)
        assert any(np.allclose(one, other, atol=1e-4) for one in upright[0] for other in upright[1])


def test_too_few_scenes_for_a_pair_are_named() -> None:
    with pytest.raises(
        UserError, match=r"data\.options\.val: of 1 scenes, fewer than two show a square"
    ):
        Shapes(val=1).pairs("val")[0]
