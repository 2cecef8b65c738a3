"""Folders of pictures and, beside them, of label maps: ADE20K's layout and any like it."""

import csv
import dataclasses
import os
import pathlib

from mae_jax import UserError
from mae_jax.data.folder import (
    PictureFiles,
    existing_folder,
    held_out,
    list_pictures,
    split_folders,
    subfolders,
    wanted_folders,
)
from mae_jax.data.record import Record, select, split_error

# In any case; exactly one of each must be there.
IMAGE_FOLDERS = ("images", "image", "img", "jpegimages")
MASK_FOLDERS = ("annotations", "masks", "mask", "labels", "segmentationclass")
# What the name of a mask may have beyond its picture's: a.jpg and a_mask.png.
MASK_SUFFIXES = ("_mask", "_masks", "_label", "_labels", "_segmentation", "_seg", "_gt")


class SegmentationFiles:
    """Picture files and the files of their label maps, pair by pair, as a source.

    ``images``: the pictures alone, a source as well, of which no label map is read.
    """

    name = "segmentation_folder"

    def __init__(self, images: PictureFiles, masks: PictureFiles, class_names: list[str] | None):
        images.name = self.name
        self.images, self._masks, self.split = images, masks, images.split
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else None

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> str:
        """Of all files, and the names of the classes."""
        return self.images.identity() + self._masks.identity() + str(self.class_names)

    def __getitem__(self, index: int) -> Record:
        record, mask = self.images[index], self._masks[index]
        name = f"{record.name[:-1]}, label map {mask.name})"
        return dataclasses.replace(record, segmentation=mask.image, name=name)


def open_segmentation_folder(data_dir: str, split: str) -> SegmentationFiles:
    """Pictures and label maps in two folders of ``data_dir``: ADE20K's layout, or one like it.

    The pictures lie in ``images/`` (or one of `IMAGE_FOLDERS`), the maps in ``annotations/`` (or
    one of `MASK_FOLDERS`), both divided into the same split folders (``train`` or ``training``,
    ``validation`` or ``val``) or neither: then every 50th pair in sorted order is `validation`. A
    picture and its map lie in folders of the same names below that, and have the same name but for
    the suffix and, in the map's, one of `MASK_SUFFIXES`. Classes are told by ``classes.txt`` in
    ``data_dir``, one name a line, or by ADE20K's ``objectInfo150.txt``; else ``num_classes`` is
    None. Raises UserError: a folder or a file of a pair is missing, or it is not clear which.
    """
    root = existing_folder(data_dir, "data.dir")
    places = [_the_folder(root, IMAGE_FOLDERS, "pictures"), _the_folder(root, MASK_FOLDERS, "maps")]
    splits = [split_folders(place) for place in places]
    if not any(splits):
        pairs = _pairs(*places)
        order, lengths = held_out(len(pairs), root)
        pairs = [pairs[i] for i in order]
    else:
        pairs, lengths = [], {}
        for part in wanted_folders(places[0], splits[0], split):
            if part not in splits[1]:
                why = f"{places[0]} has {splits[0][part]}/, and {places[1]} no such folder"
                raise split_error(split, dict.fromkeys(splits[1]), why)
            found = _pairs(*(os.path.join(p, s[part]) for p, s in zip(places, splits, strict=True)))
            pairs += found
            lengths[part] = len(found)
    images, masks = zip(*(pairs[i] for i in select(split, lengths)), strict=True)
    images, masks = PictureFiles(root, images, split=split), PictureFiles(root, masks)
    return SegmentationFiles(images, masks, _class_names(pathlib.Path(root)))


def _the_folder(root: str, names: tuple[str, ...], what: str) -> str:
    """The one folder below `root` of one of the names."""
    found = [folder for folder in subfolders(root) if folder.lower() in names]
    if len(found) != 1:
        have = f"both {found[0]}/ and {found[1]}/" if found else f"no folder of {what}"
        remedy = f"have one of {', '.join(f'{name}/' for name in names)}"
        raise UserError(f"data.dir: {root} has {have}; {remedy}")
    return os.path.join(root, found[0])


def _pairs(images: str, masks: str) -> list[tuple[str, str]]:
    """Paths of the pictures below a folder, in order, each with its label map's below the other."""
    picture_of, mask_of = {}, {}  # by path below the folder, without suffix
    for name in list_pictures(images, "data.dir"):
        _put(picture_of, os.path.splitext(name)[0], os.path.join(images, name))
    for name in list_pictures(masks, "data.dir"):
        stem = os.path.splitext(name)[0]
        if stem not in picture_of:
            shorter = [stem.removesuffix(suffix) for suffix in MASK_SUFFIXES]
            stem = next((short for short in shorter if short in picture_of), stem)
        _put(mask_of, stem, os.path.join(masks, name))
    for here, there, folder, what in (
        (picture_of, mask_of, masks, "label map"),
        (mask_of, picture_of, images, "picture"),
    ):
        if alone := [path for stem, path in here.items() if stem not in there]:
            more = f" and {len(alone) - 1} others" * (len(alone) > 1)
            remedy = f"add it below {folder}, under the same name, or remove the file"
            raise UserError(f"data.dir: {alone[0]}{more} has no {what}: {remedy}")
    return [(path, mask_of[stem]) for stem, path in picture_of.items()]


def _put(paths: dict[str, str], stem: str, path: str) -> None:
    if stem in paths:
        what = f"{paths[stem]} and {path} would belong to the same pair"
        raise UserError(f"data.dir: {what}; rename or remove one")
    paths[stem] = path


def _class_names(root: pathlib.Path) -> list[str] | None:
    """Names of the classes, in the order of their numbers; None where no file tells them."""
    plain, ade20k = root / "classes.txt", root / "objectInfo150.txt"
    if plain.is_file():
        path, names = plain, plain.read_text().rstrip().splitlines()
    elif ade20k.is_file():
        with ade20k.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        path, names = ade20k, [row.get("Name") or "" for row in rows]
    else:
        return None
    names = [name.strip() for name in names]
    if not names or "" in names:
        what = f"{path} has no name in entry {(names or ['']).index('') + 1}"
        raise UserError(f"data.dir: {what}; give one class a line")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"data.dir: {path} has the class {twice[0]!r} twice; rename one")
    return names
