"""`imagenet`: ImageNet-1k (Russakovsky et al. 2015), 1,281,167 / 50,000 images."""

from __future__ import annotations

from timm.data import ImageNetInfo

from distill.benchmarks.image_folder import sorted_images, unique_names
from distill.benchmarks.published import Layout, Published

LAYOUT = Layout(
    name="imagenet",
    tree="{train,val}/WNID/*.JPEG (the 1,000 folders n01440764 to n15075141)",
    source="image-net.org (with registration), ILSVRC2012",
    sizes={"train": 1_281_167, "val": 50_000},
)


def imagenet(root: str | None) -> Published:
    """The 1,000 classes in the order of their WordNet ids, as every published score counts them.

    Args:
        root: Folder of `train/` and `val/`, the images of both in one folder per class.
    """
    info = ImageNetInfo()
    numbers = {wnid: number for number, wnid in enumerate(info.label_names())}
    with LAYOUT.at(root) as base:
        splits = {split: sorted_images(base, split, numbers) for split in LAYOUT.sizes}
    return LAYOUT.benchmark(
        splits,
        task="classification",
        class_names=unique_names(info.label_descriptions(as_dict=True)),
        withheld=("test",),
    )
