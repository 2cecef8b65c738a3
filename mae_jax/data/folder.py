"""A folder of images: class sub-folders or flat, with or without split folders."""

import os
import pathlib
import re

import numpy as np
from absl import logging

from mae_jax import UserError
from mae_jax.data.record import DecodeError, Record, files_identity, select, split_error

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".npy")  # case does not matter
VALIDATION_EVERY = 50  # without split folders, every 50th picture is kept for validation


class FolderSource:
    """Pictures below ``data_dir/<split>/<class>/``, or flat in ``data_dir/<split>/``.

    A split folder may be called ``val`` for ``validation``. Without any split folder ``data_dir``
    itself holds the pictures (or class folders), and every 50th in sorted order is `validation`.
    Classes are the sub-folders in sorted order; pictures deeper than that are not looked for.
    ``.npy`` files hold uint8 [H, W, C], for channel counts picture formats cannot hold.
    """

    name = "folder"

    def __init__(self, data_dir: str, split: str):
        """Lists the files.

        Raises:
          FileNotFoundError: ``data_dir`` does not exist or holds no picture.
          ValueError: unknown split, or pictures lying both loose and in class folders.
        """
        self.split = split
        root = os.path.abspath(os.path.expanduser(data_dir))
        if not os.path.isdir(root):
            raise UserError(f"data.dir: there is no folder {root}")
        self._dirs: list[str] = []  # folders with pictures; a record is a folder and a file name
        folders = _split_folders(root)
        if folders:
            wanted = [s for s in folders if re.search(rf"(?<!\w){re.escape(s)}(?!\w)", split)]
            if not wanted:
                raise split_error(split, {s: 0 for s in folders}, "no such folder in " + root)
            self.class_names = _class_names([folders[s] for s in wanted])
            listed = {s: self._list(folders[s]) for s in wanted}
            lengths = {s: len(names) for s, (names, _, _) in listed.items()}
            names = [n for part, _, _ in listed.values() for n in part]
            where = np.concatenate([w for _, w, _ in listed.values()])
            labels = np.concatenate([c for _, _, c in listed.values()])
        else:
            self.class_names = _class_names([root])
            names, where, labels = self._list(root)
            held_out = np.arange(len(names)) % VALIDATION_EVERY == 0
            order = np.concatenate([np.flatnonzero(~held_out), np.flatnonzero(held_out)])
            names, where, labels = [names[i] for i in order], where[order], labels[order]
            lengths = {"train": int((~held_out).sum()), "validation": int(held_out.sum())}
            logging.info(
                "%s has no train or validation folder: every %dth of its pictures is validation "
                "(%d), the rest train (%d)",
                *(root, VALIDATION_EVERY, lengths["validation"], lengths["train"]),
            )
        chosen = select(split, lengths)
        self.num_classes = len(self.class_names) if self.class_names else None
        # One string and its cuts instead of a list: 1.28 M paths then pickle in milliseconds.
        encoded = [os.fsencode(names[i]) for i in chosen]
        self._names = b"".join(encoded)
        self._cuts = np.cumsum([0, *map(len, encoded)])  # [n + 1]
        self._where = where[chosen]  # [n], index into _dirs
        self._labels = labels[chosen]  # [n]

    def _list(self, folder: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """File names, folder index and label of every picture of one split."""
        names: list[str] = []
        where, labels = [], []
        classes = {name: i for i, name in enumerate(self.class_names or [])}
        for sub in [None, *sorted(_subfolders(folder))]:
            here = folder if sub is None else os.path.join(folder, sub)
            found = sorted(_pictures(here))
            if not found:
                continue
            if sub is not None and labels and labels[0] == -1:
                raise ValueError(
                    f"data.dir: {folder} holds pictures both loose (e.g. {names[0]}) and in "
                    f"sub-folders (e.g. {sub}); move them to one or the other"
                )
            self._dirs.append(here)
            names += found
            where += [len(self._dirs) - 1] * len(found)
            labels += [-1 if sub is None else classes[sub]] * len(found)
        if not names:
            raise UserError(
                f"data.dir: no picture in {folder} nor in its sub-folders "
                f"(looked for {' '.join(EXTENSIONS)})"
            )
        return names, np.asarray(where, np.int32), np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def identity(self) -> str:
        """Of all picture files, and the classes they count as."""
        return files_identity(map(self._path, range(len(self)))) + str(self.class_names)

    def _path(self, index: int) -> str:
        file = os.fsdecode(self._names[self._cuts[index] : self._cuts[index + 1]])
        return os.path.join(self._dirs[self._where[index]], file)

    def __getitem__(self, index: int) -> Record:
        path = self._path(index)
        name = f"folder/{self.split}#{index} ({path})"
        if path.lower().endswith(".npy"):
            image = _load_array(path, name)
        else:
            image = pathlib.Path(path).read_bytes()
        return Record(image, int(self._labels[index]), name)


def _split_folders(root: str) -> dict[str, str]:
    """Split name -> folder; empty when ``root`` is not divided into splits."""
    subs = sorted(_subfolders(root))
    if not {"train", "validation", "val"} & set(subs):
        return {}
    return {("validation" if s == "val" else s): os.path.join(root, s) for s in subs}


def _class_names(folders: list[str]) -> list[str] | None:
    """Sub-folders of the first split folder that has any: the classes every split must share."""
    for folder in folders:
        if classes := sorted(_subfolders(folder)):
            for other in folders:
                if extra := set(_subfolders(other)) - set(classes):
                    raise ValueError(
                        f"data.dir: {other} has classes that {folder} lacks: {sorted(extra)[:5]}"
                    )
            return classes
    return None


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]


def _pictures(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            e.name
            for e in entries
            if not e.name.startswith(".") and e.name.lower().endswith(EXTENSIONS) and e.is_file()
        ]


def _load_array(path: str, name: str) -> np.ndarray:
    try:
        image = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise DecodeError(f"{name}: not a readable .npy file: {e}") from e
    if image.ndim != 3 or image.dtype != np.uint8:
        raise DecodeError(
            f"{name}: a .npy picture must be uint8 [H, W, C], this is {image.dtype} "
            f"{list(image.shape)}"
        )
    return image
