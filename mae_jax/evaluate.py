"""What a run scores once more on its own data, or a classifier on any labelled data set.

    python -m mae_jax.evaluate --weights=WORKDIR

evaluates the newest checkpoint of a run of any task as the run itself does, with the same numbers:
on its evaluation split, in its compute type, on all devices of this machine. `--data_dir` tells
where the data are now, `--split` takes another split.

    python -m mae_jax.evaluate --weights=WEIGHTS --data=imagenet2012 --data_dir=TFDS_DIR

`--weights` is a workdir of fine-tuning or probing, or a classifier in any format that is read: our
exports, the official fine-tuned `.pth`, timm, Hugging Face. `--data` is a TFDS data set, or
`folder`. Top-1, top-5 and mean cross entropy over every record once, on all devices of this
machine. The official weights score 83.66 (B), 85.95 (L) and 86.93 (H) on ImageNet.

The paper's robustness benchmarks (table 13; its numbers are in `mae_jax/evaluators/robustness.py`):

    python -m mae_jax.evaluate --weights=WEIGHTS --robustness=a --data_dir=TFDS_DIR

`a`, `r`, `sketch` (ImageNet-A, -R, -Sketch) and `c` (ImageNet-C: 15 corruptions at 5 severities, 75
times the validation set, scored by the mean corruption error, mCE). TFDS makes the corrupted images
itself, with other random numbers than the published files. `--corruptions=fog,snow` runs some of
them, which gives no mCE.

`--output` is written after every data set; the same command continues it after an interruption, and
shows it again when all is done.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("evaluate"))

import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mae_jax import UserError, cli
from mae_jax import config as config_lib
from mae_jax.data.segmentation import SegmentEvalTransform, window_stride
from mae_jax.data.sources import Source, open_source
from mae_jax.data.transforms import EvalTransform
from mae_jax.distributed.mesh import make_mesh, place, replicate
from mae_jax.distributed.sharding import shardings_of
from mae_jax.evaluators import robustness as benchmarks
from mae_jax.evaluators.over_split import OverSplit, means
from mae_jax.evaluators.segmentation import (
    Windows,
    over_windows,
    told_of,
    total_confusion,
)
from mae_jax.interop.checkpoint import Checkpoint
from mae_jax.interop.class_names import require_same_classes
from mae_jax.main import prepare
from mae_jax.models.classifier import classification_sums
from mae_jax.models.inference import classify_function, window_function
from mae_jax.storage.checkpoints import read_newest
from mae_jax.storage.files import read_json, to_path, write_json
from mae_jax.train.state import TrainState

STATE_PARTS = ("step", "params", "ema", "frozen", "extra")  # of a `TrainState`: not the optimizer
HEADER = f"| weights | data | images | top-1 % | top-5 % | loss | mCE % |\n|{'---|' * 7}"


class _Heard:
    """In the place of a run's metrics: keeps what an evaluation tells."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Of the run's step `step`, under the names of metrics."""
        own = {name.removeprefix("eval/"): float(value) for name, value in scalars.items()}
        self.told |= {"step": step, **own}

    def write_classes(self, step: int, classes: Mapping[str, Any]) -> None:
        """What each class scored."""
        self.told["classes"] = classes


def evaluate_run(workdir: str, *, data_dir: str = "", split: str = "") -> dict[str, Any]:
    """What the newest checkpoint of a run scores: "step", "examples" and what its task tells.

    `data_dir`, `split`: in place of the run's `data.dir` and `data.eval_split`. Writes nothing but
    the features that a linear probe keeps. UserError: no run there, or other data than it had.
    """
    folder = to_path(workdir)
    if not (folder / "checkpoints").is_dir():
        raise UserError(
            f"--weights={workdir}: is no workdir of a run, whose own split could be evaluated; "
            "give --data or --robustness"
        )
    parts, record, notes = read_newest(folder / "checkpoints", STATE_PARTS)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    config = config_lib.from_json(record["config"])
    changes = {"data.dir": data_dir, "data.eval_split": split, "mesh.data": -1, "mesh.fsdp": 1}
    config.update_from_flattened_dict({k: v for k, v in changes.items() if v != ""})
    setup = prepare(config, folder)
    spec = setup.task.spec.to_json()
    if record.get("model", spec) != spec:
        asked = f"{setup.data.eval.name}, split {setup.data.eval.split}, asks for {spec}"
        raise UserError(f"--data_dir: {asked}, and the run trained {record['model']}")
    shardings = shardings_of(setup.abstract.replace(opt_state=None))
    state = place(TrainState(opt_state=None, **parts), shardings)
    step, heard = int(state.step), _Heard()
    inputs = setup.task.inputs(setup.data, state, folder)
    setup.task.evaluation(inputs, heard, shardings, config.eval.batches)(step, state)
    return heard.told


def pixel_scores(
    checkpoint: Checkpoint, data: str, data_dir: str, split: str, *, batch_size: int, dtype: str
) -> dict[str, Any]:
    """What a segmentation model scores on a split with label maps, read as those of its training:
    "miou", "macc", "aacc", "examples" and "classes", as a run tells them."""
    spec, mesh = checkpoint.spec, make_mesh()
    source = open_source(data, data_dir, split, segmentation=True)
    where = f"{source.name}, split {source.split},"
    if source.num_classes not in (None, spec.classes):
        raise UserError(f"{where} has {source.num_classes} classes, the model {spec.classes}")
    require_same_classes(spec.class_names, source.class_names, where)
    transform = SegmentEvalTransform(
        spec.image_size,
        spec.classes,
        spec.channels,
        ignore=spec.segment_ignore,
        zero_is_other=spec.segment_zero_is_other,
        stride=window_stride(spec.segment_stride, spec.image_size),
    )
    run = over_windows(window_function(spec, jnp.dtype(dtype)), mesh, batch_size)
    params = replicate(checkpoint.params(), mesh)
    matrix, count = total_confusion(run, params, Windows(source, transform))
    means_of_classes, classes = told_of(matrix, spec.class_names)
    return {**means_of_classes, "examples": count, "classes": classes}


class Scorer:
    """Scores data sets with one classifier; UserError where the weights have no head.

    `batch_size` is rounded up to a multiple of the devices of `mesh` (None: all), which share
    batches; `crop` is over the resized side, 0: 224/256 up to 224 px, else 1.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        batch_size: int = 64,
        crop: float = 0.0,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ):
        mesh = make_mesh() if mesh is None else mesh
        self._spec = d = checkpoint.spec
        classify = classify_function(d, jnp.dtype(dtype))
        self._transform = EvalTransform(d.image_size, d.channels, crop_ratio=crop or None)
        self._params = replicate(checkpoint.params(decoder=False), mesh)

        def score(inputs: tuple[Any, jax.Array], batch: dict, _: jax.Array) -> dict:
            params, subset = inputs
            logits = classify(params, batch["image"])[:, subset]  # [B, S]
            labels = jnp.searchsorted(subset, batch["label"])  # [B], places in the subset
            return classification_sums(logits, labels, batch["weight"])

        self._run = OverSplit(score, mesh, batch_size)

    def check(self, source: Source) -> str:
        """Raises UserError where labels are missing or not the classifier's; a note, or nothing."""
        where = f"{source.name}, split {source.split},"
        if source.num_classes is None or source[0].label < 0:
            raise UserError(
                f"{where} has no labels: choose a labelled data set and split; a folder needs one "
                "sub-folder a class"
            )
        if source.num_classes != self._spec.classes:
            raise UserError(
                f"{where} has {source.num_classes} classes, the classifier has "
                f"{self._spec.classes}: evaluate on the data set it was trained for"
            )
        return require_same_classes(self._spec.class_names, source.class_names, where)

    def __call__(self, source: Source, *, subset: bool = False) -> dict[str, float]:
        """Mean "top1", "top5" and "loss" over all "examples", and the number of "classes". `source`
        passes `check`; with `subset`, only classes that occur in the set can be predicted."""
        classes = self._spec.classes
        chosen = np.arange(classes, dtype=np.int32)
        if subset:
            chosen = benchmarks.occurring_classes(source, classes)
        inputs, options = (self._params, chosen), {"label": source.name, "classes": classes}
        scores, count = means(self._run.over(inputs, source, self._transform, **options))
        if not math.isfinite(scores["loss"]):
            raise UserError(f"{source.name}: the loss is {scores['loss']}; try float32")
        return {**scores, "examples": count, "classes": len(chosen)}


def evaluate(
    weights: str,
    benchmark: benchmarks.Benchmark,
    data_dir: str,
    *,
    crop: float = 0.0,
    dtype: str = "float32",
    batch_size: int = 64,
    output: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores the data sets of a benchmark; see the module's docstring, `Scorer`, `open_checkpoint`.

    `crop` 0 takes the benchmark's. Returned, and written to the JSON file `output` unless empty,
    are "weights", "settings", "sets" {name: scores}, their means, "mce" where all corruptions were
    run, and "markdown", a row below `HEADER`. Accuracies are fractions.
    """
    if len(benchmark.data) > 1 and data_dir:
        benchmarks.require_present(benchmark.data, data_dir)
    open_source(benchmark.data[0], data_dir, benchmark.split)  # is it there? before work is done
    checkpoint = cli.open_weights(weights, overrides)
    if checkpoint.spec.segments:
        how = {"batch_size": batch_size, "dtype": dtype}
        told = pixel_scores(checkpoint, benchmark.data[0], data_dir, benchmark.split, **how)
        if output:
            write_json(output, told)
        return {**told, "markdown": told_as_table(told), "markdown_header": ""}
    crop = crop or benchmark.crop
    scorer = Scorer(checkpoint, batch_size=batch_size, crop=crop, dtype=dtype)
    settings = {
        **dataclasses.asdict(benchmark),
        "data": list(benchmark.data),
        "data_dir": data_dir and str(to_path(data_dir)),
        "crop": crop,
        "dtype": dtype,
        "weights": checkpoint.digest(),
        "model": str(checkpoint.spec),
    }
    before = _read_unfinished(output, settings)
    notes = list(dict.fromkeys([*checkpoint.notes, *before.get("notes", ())]))
    sets = before.get("sets", {})
    result = {"weights": checkpoint.source, "notes": notes, "settings": settings, "sets": sets}

    def write() -> None:
        if output:
            write_json(output, result)

    write()  # a file that cannot be written is noticed now
    for name in benchmark.data:
        if name in sets:
            continue
        source = open_source(name, data_dir, benchmark.split)
        note = scorer.check(source)
        if note and note not in notes:
            notes.append(note)
            print(f"note: {note}", file=sys.stderr)
        sets[name] = scorer(source, subset=benchmark.subset)
        write()
    result |= _summary(checkpoint.source, benchmark, sets)
    write()
    return result


def _read_unfinished(output: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the file holds of this evaluation already; empty where there is none."""
    if not output or not to_path(output).exists():
        return {}
    if to_path(output).is_dir():
        raise UserError(f"--output={output}: is a folder; give a file")
    old = read_json(output)
    there = old.get("settings", {})
    if differing := [name for name in settings if there.get(name) != settings[name]]:
        raise UserError(
            f"--output={output}: the file holds another evaluation (other {', '.join(differing)}); "
            "delete it, or choose another"
        )
    count = f"{len(old['sets'])} of {len(settings['data'])}"
    print(f"{output} holds {count} data set(s) already", file=sys.stderr)
    return old


def _summary(
    weights: str, benchmark: benchmarks.Benchmark, sets: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Means over data sets, the corruption errors of ImageNet-C, and all of it as a row."""
    top1, top5, loss = (
        statistics.fmean(scores[field] for scores in sets.values())
        for field in ("top1", "top5", "loss")
    )
    examples = sum(scores["examples"] for scores in sets.values())
    summary: dict[str, Any] = {"top1": top1, "top5": top5, "loss": loss, "examples": examples}
    errors = {
        name: [1 - sets[data]["top1"] for data in benchmarks.corrupted(name)]
        for name in benchmarks.ALEXNET_ERRORS
        if set(benchmarks.corrupted(name)) <= sets.keys()
    }
    shown, mce = f"{benchmark.data[0]}, {benchmark.split}", "-"
    if errors:
        summary["corruption_errors"] = benchmarks.corruption_errors(errors)
        shown = f"imagenet2012_corrupted ({', '.join(errors)})"
    if errors.keys() == benchmarks.ALEXNET_ERRORS.keys():
        summary["mce"] = statistics.fmean(summary["corruption_errors"].values())
        shown, mce = "imagenet2012_corrupted", f"{summary['mce']:.1f}"
    scores = f"{100 * top1:.2f} | {100 * top5:.2f} | {loss:.4f} | {mce}"
    row = f"| {weights} | {shown} | {examples:,} | {scores} |"
    return {**summary, "markdown_header": HEADER, "markdown": row}


def choose_benchmark(
    data: str, split: str, robustness: str, corruptions: str
) -> benchmarks.Benchmark:
    """What the command line asks for; UserError for options that contradict each other."""
    if data and robustness:
        raise UserError("give one of --data and --robustness")
    if corruptions and robustness != "c":
        raise UserError("--corruptions belongs to --robustness=c")
    if robustness and split:
        raise UserError("--split belongs to --data; a benchmark has its own")
    if data:
        return benchmarks.Benchmark((data,), split or "validation")
    if not corruptions:
        return benchmarks.BENCHMARKS[robustness]
    names = list(dict.fromkeys(corruptions.split(",")))
    if unknown := [name for name in names if name not in benchmarks.ALEXNET_ERRORS]:
        known = ", ".join(benchmarks.ALEXNET_ERRORS)
        raise UserError(f"--corruptions: there is no {', '.join(unknown)}; choose from {known}")
    data_sets = sum(map(benchmarks.corrupted, names), ())
    return dataclasses.replace(benchmarks.BENCHMARKS["c"], data=data_sets)


def told_as_table(result: Mapping[str, Any]) -> str:
    """What `evaluate_run` returns, in Markdown; classes below the rest."""
    plain = {name: value for name, value in result.items() if name != "classes"}
    lines = ["| " + " | ".join(plain) + " |", "|" + "---|" * len(plain)]
    lines.append("| " + " | ".join(f"{value:.6g}" for value in plain.values()) + " |")
    if classes := result.get("classes"):
        names = list(next(iter(classes.values())))
        lines += ["", f"| class | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
        for name, scores in classes.items():
            cells = ("-" if scores[k] is None else f"{100 * scores[k]:.2f}" for k in names)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("evaluate", __doc__)
    parser.add_argument("--weights", required=True, help="workdir, file or folder")
    parser.add_argument("--data", default="", help="TFDS name, folder or demo")
    parser.add_argument("--data_dir", default="", help="TFDS data dir, or the folder of images")
    parser.add_argument("--split", default="", help="of --data (default: validation)")
    parser.add_argument(
        "--robustness", default="", choices=benchmarks.BENCHMARKS, help="instead of --data"
    )
    parser.add_argument("--corruptions", default="", help="some of c's, as fog,snow; gives no mCE")
    crop = "crop over resized side (default: 224/256 up to 224 px; above, and for c, 1)"
    parser.add_argument("--crop", type=float, default=0.0, help=crop)
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at once, all devices")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", default="", help="JSON file to write")
    cli.add_overrides(parser)
    args = parser.parse_args(argv)
    if not (args.data or args.robustness):
        result = evaluate_run(args.weights, data_dir=args.data_dir, split=args.split)
        print(told_as_table(result))
        if args.output:
            write_json(args.output, result)
            print(f"wrote {args.output}")
        return
    result = evaluate(
        args.weights,
        choose_benchmark(args.data, args.split, args.robustness, args.corruptions),
        args.data_dir,
        crop=args.crop,
        dtype=args.dtype,
        batch_size=args.batch_size,
        output=args.output,
        overrides=cli.overrides(args),
    )
    print(f"{result['markdown_header']}\n{result['markdown']}".strip())
    if errors := result.get("corruption_errors"):
        print("corruption errors: " + ", ".join(f"{name} {e:.1f}" for name, e in errors.items()))
    if args.output:
        print(f"wrote {args.output}")
