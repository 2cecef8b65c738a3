"""The embedded default, a toy that needs no download: crops of eight photographs.

Whom to thank for them. In scikit-image: astronaut (NASA, public domain), chelsea the cat (Stefan
van der Walt, CC0), coffee (Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0), rocket (SpaceX,
public domain), retina (Mikael Häggström, CC0), tissue (immunohistochemistry, Center for Microscopy
and Molecular Imaging, no known copyright restrictions). In scikit-learn, both CC-BY 2.0 from
flickr.com: pagoda (china.jpg, danielbuechele) and flower (flower.jpg, vultilion).
"""

import functools
import importlib.util
import pathlib

import numpy as np
from PIL import Image

from mae_jax import UserError
from mae_jax.data.record import Record, select

# name, package, file in it, side kept for validation: that still shows something of its subject
PHOTOGRAPHS = (
    ("astronaut", "skimage", "data/astronaut.png", "right"),
    ("cat", "skimage", "data/chelsea.png", "right"),
    ("coffee", "skimage", "data/coffee.png", "right"),
    ("rocket", "skimage", "data/rocket.jpg", "right"),
    ("retina", "skimage", "data/retina.jpg", "right"),
    ("tissue", "skimage", "data/ihc.png", "right"),
    ("pagoda", "sklearn", "datasets/images/china.jpg", "left"),
    ("flower", "sklearn", "datasets/images/flower.jpg", "left"),
)
SPLITS = {"train": 4096, "validation": 256}  # number of crops
VALIDATION_WIDTH = 0.4  # share of a photograph's width that training never sees
LONGEST_SIDE = 640  # px; larger photographs are reduced, so that all show about the same detail
SMALLEST_CROP = 128  # px


class DemoSource:
    """Square crops, uint8 [side, side, 3], whose label is the photograph they were cut from.

    Crop i of a split is always the same one: of photograph i % 8, its side uniform between 128 px
    and the height or width of the split's part of that photograph, its place uniform.
    """

    name = "demo"
    num_classes = len(PHOTOGRAPHS)

    def __init__(self, split: str):
        self.split = split
        self.class_names = [name for name, *_ in PHOTOGRAPHS]
        self._indices = select(split, SPLITS)  # [n], validation counts on from train
        _parts("train")  # an absent package is reported now, not by the first record

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        number = int(self._indices[index])
        part = "train" if number < SPLITS["train"] else "validation"
        label = number % len(PHOTOGRAPHS)
        photograph = _parts(part)[label]
        height, width, _ = photograph.shape
        rng = np.random.Generator(np.random.Philox(key=number))
        side = int(rng.integers(SMALLEST_CROP, min(height, width), endpoint=True))
        top = int(rng.integers(0, height - side, endpoint=True))
        left = int(rng.integers(0, width - side, endpoint=True))
        crop = photograph[top : top + side, left : left + side]
        name = f"demo/{self.split}#{index} ({self.class_names[label]})"
        return Record(crop, label, name, id=index)

    def identity(self) -> str:
        return f"{self.split} {self._indices.tolist()}"


@functools.cache  # decoding the photographs takes 0.2 s, once per process
def _parts(split: str) -> list[np.ndarray]:
    """The part of every photograph that belongs to a split: list of uint8 [H, W, 3]."""
    parts = []
    for _, package, file, validation_side in PHOTOGRAPHS:
        with Image.open(_path(package, file)) as opened:
            image = opened.convert("RGB")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        cut = round(pixels.shape[1] * VALIDATION_WIDTH)
        if validation_side == "right":
            train, validation = pixels[:, :-cut], pixels[:, -cut:]
        else:
            train, validation = pixels[:, cut:], pixels[:, :cut]
        parts.append(train if split == "train" else validation)
    return parts


def _path(package: str, file: str) -> pathlib.Path:
    # Finding the package without importing it: that would take seconds in every worker process.
    spec = importlib.util.find_spec(package)
    path = None if spec is None else pathlib.Path(spec.submodule_search_locations[0]) / file
    if path is None or not path.is_file():
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise UserError(
            f"data.name='demo' uses {file} of {distribution}, which is not installed here (or "
            "lacks it): pip install 'mae_jax[demo]', or choose another data.name"
        )
    return path
