"""Picture files: the one lister, the one reader, and folders of them as training data."""

import collections
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from mae_jax import UserError
from mae_jax.data.record import DecodeError, Record, files_identity, select, split_error

# Case does not matter. Pillow reads all of them; .npy is ours, for other channel counts.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".avif", ".jp2", ".j2k", ".npy"),
)
VALIDATION_EVERY = 50  # without split folders, every 50th picture is kept for validation
SPLIT_NAMES = {  # of folders, in any case; the longer and shorter ones as other data sets have them
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
}


def list_pictures(folder: str | os.PathLike, field: str) -> list[str]:
    """Paths of all pictures below `folder`, relative to it; `field` names it in errors.

    Sorted, folders after the files beside them. Links are followed, hidden names are not; other
    suffixes are counted in the log. Raises UserError: no such folder, or no picture in it.
    """
    root = existing_folder(folder, field)
    names: list[str] = []
    left_out = collections.Counter()
    above = {root: {os.path.realpath(root)}}  # a link may lead back up
    for place, folders, files in os.walk(root, followlinks=True):
        visible = sorted(f for f in folders if not f.startswith("."))
        real = {f: os.path.realpath(os.path.join(place, f)) for f in visible}
        folders[:] = [f for f in visible if real[f] not in above[place]]
        above |= {os.path.join(place, f): above[place] | {real[f]} for f in folders}
        inside = os.path.relpath(place, root)
        for file in sorted(f for f in files if not f.startswith(".")):
            if file.lower().endswith(EXTENSIONS):
                names.append(os.path.normpath(os.path.join(inside, file)))
            else:
                left_out[pathlib.PurePath(file).suffix.lower() or "without suffix"] += 1
    if left_out:
        what = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
        logging.warning("%s: left out %d files that are not read: %s", root, left_out.total(), what)
    if not names:
        raise UserError(f"{field}: no picture below {root} (looked for {' '.join(EXTENSIONS)})")
    return names


def existing_folder(folder: str | os.PathLike, field: str) -> str:
    """Its whole path; raises UserError, which begins with `field`: there is no such folder."""
    root = os.path.abspath(os.path.expanduser(folder))
    if not os.path.isdir(root):
        raise UserError(f"{field}: there is no folder {root}")
    return root


class PictureFiles:
    """Picture files as a source: names [n] below `root` (``.npy``: uint8 [H, W, C]), labels [n].

    Records are named ``folder/SPLIT#INDEX (PATH)``, or by their paths alone where `split` is empty.
    """

    name = "folder"

    def __init__(
        self,
        root: str | os.PathLike,
        names: Sequence[str],
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        split: str = "",
    ):
        self.split = split
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else None
        self._root = os.path.abspath(os.path.expanduser(root))
        # One string and its cuts hold 1.28 M names, so that workers get them in milliseconds.
        encoded = [os.fsencode(name) for name in names]
        self._names = b"".join(encoded)
        self._cuts = np.cumsum([0, *map(len, encoded)])  # [n + 1]
        self._labels = np.full(len(names), -1, np.int32) if labels is None else labels

    def __len__(self) -> int:
        return len(self._labels)

    def _path(self, index: int) -> str:
        name = os.fsdecode(self._names[self._cuts[index] : self._cuts[index + 1]])
        return os.path.join(self._root, name)

    def identity(self) -> str:
        """Of all picture files, and the classes they count as."""
        paths = [self._path(index) for index in range(len(self))]
        return files_identity(paths) + str(self.class_names)

    def __getitem__(self, index: int) -> Record:
        path = self._path(index)
        name = f"{self.name}/{self.split}#{index} ({path})" if self.split else path
        try:
            if path.lower().endswith(".npy"):
                image = np.load(path, allow_pickle=False)
            else:
                image = pathlib.Path(path).read_bytes()
        except (OSError, ValueError, EOFError) as e:
            raise DecodeError(f"{name}: cannot be read: {e}") from e
        return Record(image, int(self._labels[index]), name, id=index, upright=True)


def open_folder(data_dir: str, split: str) -> PictureFiles:
    """Pictures in ``data_dir/<split>/<class>/``, or unlabelled in ``data_dir/<split>/``.

    ``training`` may stand for ``train`` and ``val`` for ``validation``, in any case. Without split
    folders ``data_dir`` itself holds the pictures (or class folders), and every 50th in sorted
    order is `validation`. Classes are the sub-folders in sorted order. Raises UserError: no such
    folder, no picture, unknown split, or unclear classes.
    """
    root = existing_folder(data_dir, "data.dir")
    folders = split_folders(root)  # {"train": "train", "validation": "val"}
    if not folders:
        names, labels, class_names = _list_classes(root)
        order, lengths = held_out(len(names), root)
        names, labels = [names[i] for i in order], labels[order]
    else:
        wanted = wanted_folders(root, folders, split)
        names, labels, lengths = [], np.empty(0, np.int32), {}
        for part in wanted:
            folder = os.path.join(root, folders[part])
            found, labels_found, classes = _list_classes(folder, empty_is_error=part == "train")
            if part == wanted[0]:
                class_names = classes
            elif classes != class_names:
                odd = sorted(set(classes or ()) ^ set(class_names or ()))[:5]
                first = folders[wanted[0]]
                raise UserError(f"data.dir: {folder} has other classes than {first}/: {odd}")
            names += [os.path.join(folders[part], name) for name in found]
            labels = np.concatenate([labels, labels_found])
            lengths[part] = len(found)
    chosen = select(split, lengths)
    return PictureFiles(root, [names[i] for i in chosen], labels[chosen], class_names, split)


def held_out(count: int, root: str) -> tuple[np.ndarray, dict[str, int]]:
    """Pictures of a folder without splits: their order, training first, and the splits' lengths."""
    validation = np.arange(count) % VALIDATION_EVERY == 0
    lengths = {"train": int((~validation).sum()), "validation": int(validation.sum())}
    what = "%s has no train or validation folder: every %dth of its pictures is validation %s"
    logging.info(what, root, VALIDATION_EVERY, lengths)
    return np.argsort(validation, kind="stable"), lengths


def wanted_folders(root: str, folders: Mapping[str, str], split: str) -> list[str]:
    """Which splits, of `split_folders(root)`, TFDS notation names; raises UserError: none."""
    wanted = [s for s in folders if re.search(rf"(?<!\w){re.escape(s)}(?!\w)", split)]
    if not wanted:
        remedy = " (nor val/): make one, or set data.eval_split to a part of another split"
        why = f"{root} has no such folder" + remedy * ("validation" in split)
        raise split_error(split, dict.fromkeys(folders), why)
    return wanted


def split_folders(root: str) -> dict[str, str]:
    """Split -> name of its folder; empty when ``root`` is not divided into splits."""
    found: dict[str, str] = {}
    for folder in subfolders(root):
        split = SPLIT_NAMES.get(folder.lower(), folder)
        if split in found:
            both = f"both {found[split]}/ and {folder}/, and both mean {split}"
            raise UserError(f"data.dir: {root} has {both}; rename or remove one")
        found[split] = folder
    return found if {"train", "validation"} & found.keys() else {}


def _list_classes(
    folder: str, empty_is_error: bool = True
) -> tuple[list[str], np.ndarray, list[str] | None]:
    """Pictures below `folder`, their labels [n] int32 (-1: none), and names of the classes."""
    names = list_pictures(folder, "data.dir")
    places = [os.path.dirname(name) for name in names]
    if deep := [name for name in names if name.count(os.sep) > 1]:
        remedy = f"a class is one folder directly in {folder}, its pictures directly in that"
        raise UserError(f"data.dir: {os.path.join(folder, deep[0])} lies too deep: {remedy}")
    if "" in places:
        if labelled := set(places) - {""}:
            what = f"pictures both loose (e.g. {names[0]}) and in folders (e.g. {min(labelled)})"
            raise UserError(f"data.dir: {folder} holds {what}; move them to one or the other")
        return names, np.full(len(names), -1, np.int32), None
    class_names = subfolders(folder)
    if empty := sorted(set(class_names) - set(places)):
        where = f"{len(empty)} of {len(class_names)} class folders in {folder}, e.g. {empty[0]}/"
        if empty_is_error:
            raise UserError(f"data.dir: no picture in {where}; fill or remove it")
        logging.warning("data.dir: no picture in %s, which counts as a class all the same", where)
    label = {name: i for i, name in enumerate(class_names)}
    return names, np.asarray([label[place] for place in places], np.int32), class_names


def subfolders(folder: str) -> list[str]:
    """Names of the folders in a folder, in order; hidden ones are none."""
    return sorted(place.name for place in pathlib.Path(folder).glob("[!.]*/"))
