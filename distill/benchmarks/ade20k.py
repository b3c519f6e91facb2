"""`ade20k`: scenes in 150 classes (Zhou et al. 2017), 20,210 / 2,000 images."""

from __future__ import annotations

from functools import partial

from distill.benchmarks import IGNORE_INDEX
from distill.benchmarks.files import image_files, pair_all
from distill.benchmarks.masks import MaskedImages, read_mask
from distill.benchmarks.published import Layout, Published, comma_separated

# The first name of each entry of the release's objectInfo150.txt.
NAMES = comma_separated("""
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
    house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
    railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
    screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag
""")
LAYOUT = Layout(
    name="ade20k",
    tree="ADEChallengeData2016/{images,annotations}/{training,validation}/*",
    source="the scene parsing benchmark's page at groups.csail.mit.edu/vision/datasets/ADE20K",
    folder="ADEChallengeData2016",
    sizes={"train": 20_210, "val": 2_000},
)
FOLDERS = {"train": "training", "val": "validation"}
# The release counts from 1; its 0 is everything else and not scored ("reduce_zero_label").
CLASSES = {0: IGNORE_INDEX} | {number + 1: number for number in range(len(NAMES))}


def ade20k(root: str | None) -> Published:
    """The SceneParsing release of 2016: masks with one channel.

    Args:
        root: Folder of `ADEChallengeData2016/`, or that folder.
    """
    with LAYOUT.at(root) as base:
        splits = {
            split: MaskedImages(
                pair_all(
                    image_files(base / "images" / folder),
                    image_files(base / "annotations" / folder),
                ),
                partial(read_mask, classes=CLASSES),
            )
            for split, folder in FOLDERS.items()
        }
    return LAYOUT.benchmark(
        splits,
        task="segmentation",
        class_names=NAMES,
        withheld=("test",),
    )
