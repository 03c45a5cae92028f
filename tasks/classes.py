"""The class of every image: its label's, or what the target model says; the layer and the concepts of the classes.

In: labels of the probing dataset, the target model's class names. Out: the index of the class by label; the index by
image, and which images there are of each class; which layer's units are the classes, and what each is called.
"""

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from tasks.cleaning import class_concept
from tasks.images import ImageList
from tasks.store import Folder

NO_CLASS = -1


def class_of_label(labels: set[str], class_names: list[str] | None, num_classes: int) -> dict[str, int]:
    """Index of the class that each label names; labels that name none, or more than one, are left out.

    A label is a class name, a first synonym of one ('tench' of 'tench, Tinca tinca'), or, where the model has 1,000
    outputs, an ImageNet-1k wnid. Numbers are not taken: whose numbers they are is not known.
    """
    found: dict[str, int] = {}
    names = (class_names or [])[:num_classes]
    for keys in ([class_concept(name) for name in names], names):  # a whole name goes before a synonym
        once = {key for key, count in Counter(keys).items() if count == 1}
        found |= {key: index for index, key in enumerate(keys) if key in once}
    known = {label: found.get(label, found.get(class_concept(label))) for label in labels}
    if num_classes == 1000 and any(re.fullmatch(r"n\d{8}", label) for label in labels):
        from timm.data.imagenet_info import ImageNetInfo

        wnids = {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}
        known |= {label: wnids[label] for label in labels if label in wnids}
    return {label: index for label, index in sorted(known.items()) if index is not None}


def final_layer(layers: Iterable[str], class_names: list[str]) -> str | None:
    """The layer whose units are the classes, the last of that width; `layers` has the layer of every unit."""
    found = [layer for layer, units in Counter(layers).items() if units == len(class_names)]
    return found[-1] if found else None


def class_concepts(vocabulary: Folder, class_names: list[str]) -> list[str | None]:
    """The concept that each class name was merged into; None where the vocabulary has no such concept."""
    rows = vocabulary.read_all("concepts", columns=["concept", "synonyms"]).to_pylist()
    concept = {name.lower(): row["concept"] for row in rows for name in (row["concept"], *(row["synonyms"] or []))}
    return [concept.get(class_concept(name).lower()) for name in class_names]


def labelled(images: ImageList, index_of: dict[str, int]) -> np.ndarray:
    """int64, class of each image by its label, NO_CLASS where it has none."""
    return np.array([index_of.get(label, NO_CLASS) for label in images.column("label")], np.int64)


class Classes:
    """What the stage screen found: the class of each image of the select and validate splits, and what was predicted.

    Both int64 by image number, NO_CLASS for all other images.
    """

    def __init__(self, screen: Folder, images: ImageList) -> None:
        table: pa.Table = screen.read_all("classes")
        numbers = table["image"].to_numpy()
        self.images, self.own, self.predicted = images, *(np.full(len(images), NO_CLASS) for _ in range(2))
        self.own[numbers] = table["class_index"].fill_null(NO_CLASS).to_numpy()
        self.predicted[numbers] = table["predicted"].to_numpy()

    def of(self, split: str) -> np.ndarray:
        """int64, numbers of the split's images that have a class."""
        return np.flatnonzero((self.images.split == split) & (self.own != NO_CLASS))

    def count(self, split: str, num_classes: int, right: bool = False) -> np.ndarray:
        """int64 [classes], the split's images of each class; only those that the model gets right if asked."""
        numbers = self.of(split)
        if right:
            numbers = numbers[self.own[numbers] == self.predicted[numbers]]
        return np.bincount(self.own[numbers], minlength=num_classes)
