"""`coco_stuff`: COCO-Stuff 164k, 171 classes (Caesar et al. 2018), 118,287 / 5,000 images."""

from __future__ import annotations

from functools import partial

from distill.benchmarks import IGNORE_INDEX
from distill.benchmarks.files import image_files, pair_all
from distill.benchmarks.masks import MaskedImages, read_mask
from distill.benchmarks.published import Layout, Published, comma_separated

# In the order of their ids, 1 to 182, which go on over the ids of things that were never labelled.
THINGS = comma_separated("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
""")
STUFF = comma_separated("""
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
    ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff,
    dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower,
    fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves,
    light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
    plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
    salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete,
    wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
    window-other, wood
""")
NEVER_LABELLED = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
LAYOUT = Layout(
    name="coco_stuff",
    tree="{train2017,val2017}/*.jpg and stuffthingmaps/{train2017,val2017}/*.png",
    source=(
        "cocodataset.org (train2017.zip, val2017.zip) and the cocostuff page at "
        "github.com/nightrome/cocostuff (stuffthingmaps_trainval2017.zip)"
    ),
    sizes={"train": 118_287, "val": 5_000},
)
# A mask holds the id less 1.
IDS = [number for number in range(1, 183) if number not in NEVER_LABELLED]
CLASSES = {number - 1: index for index, number in enumerate(IDS)} | {IGNORE_INDEX: IGNORE_INDEX}


def coco_stuff(root: str | None) -> Published:
    """Things and stuff of COCO 2017; masks with one channel, where 255 has no label.

    Args:
        root: Folder of `train2017/`, `val2017/` and `stuffthingmaps/`.
    """
    with LAYOUT.at(root) as base:
        splits = {
            split: MaskedImages(
                pair_all(
                    image_files(base / f"{split}2017"),
                    image_files(base / "stuffthingmaps" / f"{split}2017"),
                ),
                partial(read_mask, classes=CLASSES),
            )
            for split in LAYOUT.sizes
        }
    return LAYOUT.benchmark(
        splits, task="segmentation", class_names=(*THINGS, *STUFF), withheld=("test",)
    )
