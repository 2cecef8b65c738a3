"""What supervised runs scored, as a Markdown table.

    python -m mae_jax.results WORKDIR...

Every run of fine-tuning, training from scratch or linear probing leaves a `results.json` in its
workdir. Runs that differ in nothing but the seed become one row, with mean and sample standard
deviation of their accuracies, the mean loss and the median speed.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("results"))

import json
import pathlib
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from mae_jax import UserError, cli
from mae_jax.config import FREE_FIELDS, flatten, image_size
from mae_jax.storage.files import read_json, write_json
from mae_jax.train.metrics import evaluation_at, read_metrics

COLUMNS = (
    *("task", "model", "from", "trained blocks", "data", "epochs", "steps", "batch"),
    *("top-1 %", "top-5 %", "loss", "images/s", "seed"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"

# Of the fields that a run may change when it continues, these two say what was measured.
_NOT_COMPARED = set(FREE_FIELDS) - {"data.dir", "eval.batches"}


def write_results(
    workdir: str | pathlib.Path,
    config: ConfigDict,
    *,
    train_examples: int,
    steps: int,
    parameters: int,
) -> dict[str, Any]:
    """Writes `results.json` of a finished supervised run, and returns what it holds.

    To be called in one process, after the metrics are written. Accuracies are fractions.

    Args:
      workdir: holds the run's `metrics.jsonl`.
      train_examples: size of the training split.
      steps: optimizer steps of the whole run.
      parameters: number of the model's parameters, frozen ones included.

    Raises:
      ValueError: no evaluation of the last step in the metrics.
    """
    path = pathlib.Path(workdir)
    final = evaluation_at(path, steps)
    if final is None:
        raise ValueError(f"{path / 'metrics.jsonl'} has no eval/top1 of the last step, {steps}")
    rates = [x.get("train/images_per_second") for x in read_metrics(path / "metrics.jsonl")]
    rates = [rate for rate in rates if rate is not None]
    result = {
        "task": config.task,
        "variant": config.model.variant,
        "patch_size": config.model.patch_size,
        "image_size": list(image_size(config)),
        "init_from": str(config.init_from),
        "trainable_blocks": config.trainable_blocks,
        "epochs": config.epochs if not config.steps else steps * config.batch_size / train_examples,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "data": config.data.name,
        "steps": steps,
        "top1": final["eval/top1"],
        "top5": final.get("eval/top5"),
        "loss": final.get("eval/loss"),
        "examples": int(final["eval/examples"]),
        "images_per_second": statistics.median(rates) if rates else None,
        "parameters": parameters,
        "config": config.to_dict(),
        "markdown_header": HEADER,
    }
    result["markdown"] = markdown_row([result])
    write_json(path / "results.json", result)
    return result


def read_results(workdir: str | pathlib.Path) -> dict[str, Any]:
    """The results of one run.

    Raises:
      UserError: there are none, or a file that `write_results` did not write.
    """
    path = pathlib.Path(workdir) / "results.json"
    result = read_json(path)
    if "config" not in result:
        raise UserError(f"{path}: not a file this project writes")
    return result


def markdown_row(runs: list[dict[str, Any]]) -> str:
    """One line of the table, of one run or of several that differ by their seed."""
    rates = [run["images_per_second"] for run in runs if run["images_per_second"] is not None]
    losses = [run["loss"] for run in runs]
    cells = (
        *_description(runs[0]),
        _percent([run["top1"] for run in runs]),
        _percent([run["top5"] for run in runs]),
        "-" if None in losses else f"{statistics.fmean(losses):.4f}",
        f"{statistics.median(rates):,.0f}" if rates else "-",
        ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs)),
    )
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of many runs; rows in the order in which they first appear.

    Rows that look alike but are of different configs are told apart in notes below the table.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(json.dumps(_identity(result), sort_keys=True), []).append(result)
    heads = [runs[0] for runs in groups.values()]
    notes = []
    for number, head in enumerate(heads, start=1):
        own = _identity(head)
        alike = [_identity(other) for other in heads if _description(other) == _description(head)]
        differing = [field for field in own if any(a.get(field) != own[field] for a in alike)]
        if differing:
            notes.append(f"Row {number}: " + ", ".join(f"{f}={own[f]}" for f in differing))
    rows = [markdown_row(runs) for runs in groups.values()]
    return "\n".join([HEADER, *rows, *([""] if notes else []), *notes])


def _identity(result: dict[str, Any]) -> dict[str, Any]:
    """The fields that must be equal for two runs to be the same but for their seed."""
    fields = flatten(result["config"])
    return {f: fields[f] for f in sorted(fields) if f != "seed" and f not in _NOT_COMPARED}


def _description(result: dict[str, Any]) -> tuple[str, ...]:
    """The cells that say what was run."""
    if result["task"] == "linear_probe":
        blocks = "0"
    elif result["trainable_blocks"] == -1:
        blocks = "all"
    else:
        blocks = f"{result['trainable_blocks']:g}"
    return (
        result["task"],
        _model(result["config"]),
        result["init_from"] or "scratch",
        blocks,
        result["data"],
        f"{result['epochs']:.4g}",
        str(result["steps"]),
        str(result["batch_size"]),
    )


def _model(config: dict[str, Any]) -> str:
    model = config["model"]
    size = model["image_size"]
    size = [size] if isinstance(size, int) else size
    own = [f"{name} {model[name]}" for name in ("width", "depth", "heads") if model[name]]
    return (
        f"ViT-{model['variant'].capitalize()}/{model['patch_size']}, "
        f"{'x'.join(str(side) for side in size)} px" + (f" ({', '.join(own)})" if own else "")
    )


def _percent(values: list[float | None]) -> str:
    """`83.57 ± 0.09 (4)` of fractions; one alone without deviation."""
    if None in values:
        return "-"
    mean = f"{100 * statistics.fmean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.2f} ({len(values)})"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("results", __doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a finished run")
    args = parser.parse_args(argv)
    workdirs = dict.fromkeys(pathlib.Path(w).expanduser().resolve() for w in args.workdirs)
    print(table(_finished(workdirs)))


def _finished(workdirs: Iterable[pathlib.Path]) -> list[dict[str, Any]]:
    """The results that are there; what is left out is named, so that `runs/*` may be asked for."""
    found = []
    for workdir in workdirs:
        if (workdir / "results.json").exists():
            found.append(read_results(workdir))
        else:
            note = "no results.json, which a run of finetune, scratch or linear_probe ends with"
            print(f"left out: {workdir}: {note}", file=sys.stderr)
    if not found:
        raise UserError("none of these workdirs holds the results of a finished supervised run")
    return found
