"""mIoU of a split: windows on the devices, pictures put together from them on the host.

As mmsegmentation's "slide" inference: logits of windows are enlarged to the windows' pixels,
summed, divided by how many windows show a pixel, and resized to the picture as it is in its file;
all bilinear with half-pixel centres. One confusion matrix counts the pixels of all pictures there.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mae_jax import UserError
from mae_jax.data.record import ArraySpec, DecodeError, Record, Source
from mae_jax.data.segmentation import IGNORED, SegmentEvalTransform, View, picture_size
from mae_jax.evaluators.over_split import OverSplit
from mae_jax.train.metrics import MetricsWriter
from mae_jax.train.state import TrainState
from mae_jax.train.task import Segmenting


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How many pixels of class i, `IGNORED` ones left out, are taken for class j: int64 [K, K].

    `labels`, `predictions`: class numbers [...] of equal shapes.
    """
    real = labels != IGNORED
    pairs = labels[real].astype(np.int64) * classes + predictions[real]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scores(matrix: np.ndarray) -> dict[str, Any]:
    """What is told of a confusion matrix [K, K], as fractions.

    "iou" [K]: TP / (TP + FP + FN) of every class, NaN of one that neither occurs nor is predicted;
    "acc" [K]: share of its pixels that are right, NaN where it has none; "miou" and "macc": means
    over the classes that are not NaN; "aacc": share of all pixels that are right.
    """
    right, is_class, taken_for = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    if not is_class.sum():
        raise UserError("no labelled pixel in the split: there is nothing to evaluate")
    with np.errstate(invalid="ignore"):  # 0 / 0
        iou, acc = right / (is_class + taken_for - right), right / is_class
    means = {"miou": np.nanmean(iou), "macc": np.nanmean(acc), "aacc": right.sum() / matrix.sum()}
    return {name: float(x) for name, x in means.items()} | {"iou": iou, "acc": acc}


Corner = tuple[int, int]  # top, left


def told_of(
    matrix: np.ndarray, class_names: Sequence[str] | None
) -> tuple[dict[str, float], dict[str, dict[str, float | None]]]:
    """The means of `scores`, and "iou" and "acc" of each class by its name (None: its number); a
    class has None for NaN: JSON has none."""
    found = scores(matrix)
    values = {
        score: [None if math.isnan(x) else x for x in found[score].tolist()]
        for score in ("iou", "acc")
    }
    names = class_names or [str(k) for k in range(len(matrix))]
    classes = {name: {k: x[i] for k, x in values.items()} for i, name in enumerate(names)}
    return {name: found[name] for name in ("miou", "macc", "aacc")}, classes


@dataclasses.dataclass(frozen=True)
class _Window(Record):
    """The record of a picture, and which window of which view of it is asked for."""

    view: View | None = None
    corner: Corner = (0, 0)


class Windows:
    """The windows of a source's pictures, picture by picture, as a source for `WindowTransform`.

    Reads the head of every picture's file. ``most``: windows; pictures of which some lie beyond are
    left out, but for the first picture; None: all.
    ``sizes`` [P, 2]: heights and widths of the pictures. ``first`` [P + 1]: window each begins at.
    """

    num_classes, class_names = None, None

    def __init__(self, source: Source, transform: SegmentEvalTransform, most: int | None = None):
        self.name, self.split = source.name, source.split
        self.source, self.transform = source, transform
        pictures = len(source) if most is None else min(most, len(source))

        def size(index: int) -> tuple[int, int]:
            try:
                return picture_size(source[index])
            except DecodeError:  # told, or skipped, where the picture is decoded
                return 1, 1

        with concurrent.futures.ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:
            sizes = list(threads.map(size, range(pictures)))
        counts = {size: len(self._shown(*size)) for size in {*sizes}}  # they come again and again
        first = np.cumsum([0, *(counts[size] for size in sizes)])
        if most is not None:
            pictures = max(1, int(np.searchsorted(first, most, side="right")) - 1)
        self.sizes, self.first = np.array(sizes[:pictures]), first[: pictures + 1]

    def _shown(self, height: int, width: int) -> list[tuple[View, Corner]]:
        views = self.transform.views(height, width)
        return [(view, corner) for view in views for corner in self.transform.corners(view)]

    def of(self, picture: int) -> list[tuple[View, Corner]]:
        """View and corner of every window of a picture."""
        return self._shown(*self.sizes[picture].tolist())

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> Record:
        picture = int(np.searchsorted(self.first, index, side="right")) - 1
        view, corner = self.of(picture)[index - self.first[picture]]
        return _Window(**vars(self.source[picture]), view=view, corner=corner)

    def identity(self) -> str:
        """That of the pictures."""
        return self.source.identity()


@dataclasses.dataclass(frozen=True)
class WindowTransform:
    """Cuts windows, {"image", "size"}, of the records of `Windows`."""

    transform: SegmentEvalTransform

    @property
    def schema(self) -> dict[str, ArraySpec]:
        return {name: self.transform.schema[name] for name in ("image", "size")}

    def __call__(self, record: _Window, rng: object = None) -> dict[str, np.ndarray]:
        return self.transform.window(record, record.view, record.corner)


def classes_of(
    windows: Sequence[tuple[View, Corner]],
    logits: Sequence[np.ndarray],
    shape: tuple[int, int],
    size: tuple[int, int],
) -> np.ndarray:
    """The class number of every pixel of a picture, uint8 [H, W].

    Goes class by class, so that it holds few planes [H, W] however many classes there are.

    Args:
      windows: view and corner of every window of the picture.
      logits: of every window, float32 [K, s, s'].
      shape: height and width of a window, pixels.
      size: H, W of the picture.
    """
    views: dict[View, list] = {}
    for (view, corner), of_window in zip(windows, logits, strict=True):
        views.setdefault(view, []).append((corner, of_window))
    counts = {
        view: _stitched(view, [(corner, np.ones(shape, np.float32)) for corner, _ in parts])
        for view, parts in views.items()
    }

    def planes(k: int) -> Iterator[np.ndarray]:
        """The logit of class k in every view, float32 [H, W]."""
        for view, parts in views.items():
            enlarged = [(corner, _resized(of_window[k], shape)) for corner, of_window in parts]
            plane = _stitched(view, enlarged) / counts[view]
            plane = np.ascontiguousarray(plane[:, ::-1]) if view.mirrored else plane
            yield _resized(plane, size)

    classes = len(logits[0])
    if len(views) > 1:  # their probabilities are averaged: exp(plane - norm)
        norms = [np.full(size, -np.inf, np.float32) for _ in views]
        for k in range(classes):
            for norm, plane in zip(norms, planes(k), strict=True):
                np.logaddexp(norm, plane, out=norm)
    best, found = np.full(size, -np.inf, np.float32), np.zeros(size, np.uint8)
    for k in range(classes):
        if len(views) > 1:
            plane = sum(np.exp(x - norm) for x, norm in zip(planes(k), norms, strict=True))
        else:
            (plane,) = planes(k)
        better = plane > best
        np.copyto(best, plane, where=better)
        found[better] = k
    return found


def _resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, not antialiased, half-pixel centres: PyTorch's with align_corners=False."""
    return cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR)


def _stitched(view: View, parts: Sequence[tuple[Corner, np.ndarray]]) -> np.ndarray:
    """The sum [h, w] of windows at their corners; what lies outside the view is cut off."""
    total = np.zeros((view.height, view.width), np.float32)
    for (top, left), plane in parts:
        place = total[top : top + plane.shape[0], left : left + plane.shape[1]]
        place += plane[: place.shape[0], : place.shape[1]]
    return total


def over_windows(
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array],
    mesh: Mesh,
    batch_size: int,
    shardings: Any = None,
) -> OverSplit:
    """What `total_confusion` runs: `apply` to `batch_size` windows at a time.

    `apply`: (params, images uint8 [b, S, S', C], sizes int32 [b, 2] of what each shows) -> logits
    [b, s, s', K]. `shardings`: of params, as `OverSplit` has it.
    """

    def function(params: Any, batch: Mapping, number: jax.Array) -> dict[str, jax.Array]:
        logits = apply(params, batch["image"], batch["size"])
        planes = jnp.moveaxis(logits, -1, 1).astype(jnp.float32)  # as the host takes them
        return {"logits": planes, "weight": batch["weight"]}

    return OverSplit(function, mesh, batch_size, shardings)


def total_confusion(
    run: OverSplit, params: Any, windows: Windows, **loading: Any
) -> tuple[np.ndarray, int]:
    """The confusion matrix [K, K] of all pixels of all pictures, and how many pictures those are.

    Equal in every process: each puts its share of the pictures together. `loading`: of
    `pipeline.eval_batches`; with bad_records="skip" pictures that cannot be decoded do not count.
    Raises DecodeError, LabelError: of a record.
    """
    processes, process = jax.process_count(), jax.process_index()
    threads = loading.get("threads") or os.cpu_count() or 1
    skips = loading.get("bad_records") == "skip"
    total, pictures = np.zeros((windows.transform.classes,) * 2, np.int64), 0
    count = functools.partial(_count_picture, windows, skips=skips)
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    transform = WindowTransform(windows.transform)
    results = run.over(params, windows, transform, label="evaluation, windows", **loading)
    rows = (row for x in results for row in zip(x["logits"], x["weight"], strict=True))
    stitchers = concurrent.futures.ThreadPoolExecutor(threads, "mae-jax-stitch")
    with stitchers, contextlib.closing(results):
        for picture in range(len(windows.sizes)):
            own = [next(rows) for _ in windows.of(picture)]
            if picture % processes == process and all(weight for _, weight in own):
                pending.append(stitchers.submit(count, picture, [logits for logits, _ in own]))
            is_last = picture + 1 == len(windows.sizes)
            while len(pending) > (0 if is_last else 2 * threads):  # they hold their logits
                matrix = pending.popleft().result()
                if matrix is not None:
                    total, pictures = total + matrix, pictures + 1
        collections.deque(rows, maxlen=0)  # what fills up the last batch
    if processes > 1:
        total, pictures = _summed(total), int(_summed(np.array(pictures)))
    return total, pictures


def _count_picture(
    windows: Windows, picture: int, logits: Sequence[np.ndarray], *, skips: bool
) -> np.ndarray | None:
    """The confusion matrix [K, K] of one picture; None where its label map cannot be decoded."""
    transform, size = windows.transform, tuple(windows.sizes[picture].tolist())
    try:
        labels = transform.labels(windows.source[picture], size)
    except DecodeError as e:
        if skips:
            logging.warning("skipped: %s", e)
            return None
        remedy = "Mend or remove it, or leave such records out: data.bad_records=skip"
        raise DecodeError(f"{e}. {remedy}") from e
    found = classes_of(windows.of(picture), logits, transform.size, size)
    return confusion(labels, found, transform.classes)


def _summed(numbers: np.ndarray) -> np.ndarray:
    """Integers below 2^51 summed over all processes; devices hold 32 bits."""
    halves = np.stack([numbers >> 20, numbers & (2**20 - 1)]).astype(np.int32)
    high, low = multihost_utils.process_allgather(halves).astype(np.int64).sum(axis=0)
    return (high << 20) + low


class SegmentationEvaluation:
    """mIoU over the evaluation split of `inputs`, whose `eval_transform` is `SegmentEvalTransform`.

    max_batches: of windows, of the first pictures; 0: all. ``matrix``: the last confusion matrix
    [K, K], int64; None before the first evaluation.
    """

    def __init__(
        self, task: Segmenting, inputs: Any, writer: MetricsWriter, shardings: Any, max_batches: int
    ):
        self._inputs, self._writer = inputs, writer
        self._run = over_windows(task.windows_logits, task.mesh, task.eval_batch_size, shardings)
        self._most = max_batches * self._run.batch_size or None
        self._windows: Windows | None = None
        self.matrix: np.ndarray | None = None

    def compile(self, state: TrainState) -> list[jax.stages.Compiled]:
        """Its program, for an abstract state, ahead of the first call."""
        schema = WindowTransform(self._inputs.eval_transform).schema
        schema = {**schema, "weight": ArraySpec((), np.float32)}
        return [self._run.compile(state, schema)]

    def __call__(self, step: int, state: TrainState) -> None:
        """Evaluates `state` and writes `eval/...` metrics of `step`."""
        inputs = self._inputs
        if self._windows is None:
            self._windows = Windows(inputs.eval, inputs.eval_transform, self._most)
        self.matrix, count = total_confusion(self._run, state, self._windows, **inputs.loading)
        metrics, classes = told_of(self.matrix, inputs.eval.class_names)
        scalars = {f"eval/{name}": value for name, value in metrics.items()}
        self._writer.write(step, {**scalars, "eval/examples": count})
        self._writer.write_classes(step, classes)
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logging.info("step %d: eval %s  (%d images)", step, text, count)
