"""`cifar100`: 32 px photographs of a hundred classes (Krizhevsky 2009), read by torchvision."""

from __future__ import annotations

from torchvision import datasets

from distill.benchmarks.cifar10 import CIFAR
from distill.benchmarks.published import Layout, comma_separated

NAMES = comma_separated("""
    apple, aquarium_fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge,
    bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud,
    cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox,
    girl, hamster, house, kangaroo, keyboard, lamp, lawn_mower, leopard, lion, lizard, lobster, man,
    maple_tree, motorcycle, mountain, mouse, mushroom, oak_tree, orange, orchid, otter, palm_tree,
    pear, pickup_truck, pine_tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray,
    road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel,
    streetcar, sunflower, sweet_pepper, table, tank, telephone, television, tiger, tractor, train,
    trout, tulip, turtle, wardrobe, whale, willow_tree, wolf, woman, worm
""")
LAYOUT = Layout(
    name="cifar100",
    tree="cifar-100-python/ with train, test and meta",
    source="www.cs.toronto.edu/~kriz/cifar.html (cifar-100-python.tar.gz)",
)


def cifar100(root: str | None, *, val: int = 5_000, split_seed: int = 0) -> CIFAR:
    """CIFAR-100 with its fine labels.

    Args:
        root: Folder that holds `cifar-100-python/`.
        val: Number of training images held out for val.
        split_seed: Chooses them.
    """
    return CIFAR(datasets.CIFAR100, LAYOUT, NAMES, root, val, split_seed)
