"""What supervised runs scored, as a Markdown table; and where the time of any run went.

    python -m mae_jax.results WORKDIR...

Every supervised run leaves a `results.json` in its workdir. Runs that differ in nothing but the
seed become one row, with mean and sample standard deviation of their scores, the mean loss and the
median speed. Every run keeps account of its time, finished or not, in `time.json`: see
docs/time.md.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("results"))

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mae_jax import UserError, cli
from mae_jax.config import FREE_FIELDS, flatten, image_size
from mae_jax.storage.files import PathLike, read_json, to_path, write_json
from mae_jax.train.ledger import summary
from mae_jax.train.metrics import CLASSES_FILE, evaluation_at, read_metrics

# What is scored, by its name in `results.json`: of classes of pictures, or of pixels.
SCORES = {"top1": "top-1 %", "top5": "top-5 %"}
PIXEL_SCORES = {"miou": "mIoU %", "macc": "mAcc %", "aacc": "aAcc %"}
# Of the fields that a run may change when it continues, two say what was measured.
_NOT_COMPARED = {"seed", *FREE_FIELDS} - {"data.dir", "eval.batches"}


def header(names: Mapping[str, str]) -> str:
    """The head of a table of `SCORES` or `PIXEL_SCORES`."""
    told = ["task", "model", "from", "trained blocks", "data", "epochs", "steps", "batch"]
    cells = [*told, *names.values(), "loss", "images/s", "seed"]
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def scores_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What a run was scored by."""
    return PIXEL_SCORES if "miou" in result else SCORES


def write_results(
    workdir: PathLike,
    config: ConfigDict,
    *,
    train_examples: int,
    steps: int,
    parameters: int,
) -> dict[str, Any]:
    """Writes `results.json` of a finished supervised run, and returns what it holds.

    Call it in one process, after the metrics are written: ValueError where they lack an evaluation
    of the last step. Accuracies are fractions; `parameters` counts frozen ones too. Of pixels,
    "classes" has IoU and accuracy of each: null where it does not occur.
    """
    path = to_path(workdir)
    final = evaluation_at(path, steps)
    if final is None:
        raise ValueError(f"{path / 'metrics.jsonl'} has no evaluation of the last step, {steps}")
    if "eval/miou" in final:
        scores = {name: final[f"eval/{name}"] for name in PIXEL_SCORES}
        scores["classes"] = read_json(path / CLASSES_FILE)["classes"]
    else:
        scores = {"top1": final["eval/top1"], "top5": final.get("eval/top5")}
    speed = "train/images_per_second"
    rates = [x[speed] for x in read_metrics(path / "metrics.jsonl") if x.get(speed) is not None]
    fields = ("task", "init_from", "trainable_blocks", "batch_size", "seed")
    result = {name: config[name] for name in fields} | {
        "variant": config.model.variant,
        "patch_size": config.model.patch_size,
        "image_size": list(image_size(config)),
        "epochs": config.epochs if not config.steps else steps * config.batch_size / train_examples,
        "data": config.data.name,
        "steps": steps,
        **scores,
        "loss": final.get("eval/loss"),
        "examples": int(final["eval/examples"]),
        "images_per_second": statistics.median(rates) if rates else None,
        "parameters": parameters,
        "config": config.to_dict(),
        "markdown_header": header(scores_of(scores)),
    }
    result["markdown"] = markdown_row([result])
    write_json(path / "results.json", result)
    return result


def read_results(workdir: PathLike) -> dict[str, Any]:
    """The results of one run; UserError where there are none, or a file of another origin."""
    path = to_path(workdir) / "results.json"
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
        *(percent([run[name] for run in runs]) for name in scores_of(runs[0])),
        "-" if None in losses else f"{statistics.fmean(losses):.4f}",
        f"{statistics.median(rates):,.0f}" if rates else "-",
        ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs)),
    )
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of many runs that are scored alike, rows as they first appear. Rows that
    look alike but are of different configs are told apart in notes below the table."""
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
    head = header(scores_of(results[0]))
    return "\n".join([head, *rows, *([""] if notes else []), *notes])


def _identity(result: dict[str, Any]) -> dict[str, Any]:
    """The fields that must be equal for two runs to be the same but for their seed."""
    fields = flatten(result["config"])
    return {name: fields[name] for name in sorted(fields.keys() - _NOT_COMPARED)}


def _description(result: dict[str, Any]) -> tuple[str, ...]:
    """The cells that say what was run."""
    blocks = "all" if result["trainable_blocks"] == -1 else f"{result['trainable_blocks']:g}"
    model = result["config"]["model"]
    size = model["image_size"]
    size = "x".join(map(str, [size] if isinstance(size, int) else size))
    name = f"ViT-{model['variant'].capitalize()}/{model['patch_size']}, {size} px"
    own = [f"{field} {model[field]}" for field in ("width", "depth", "heads") if model[field]]
    return (
        result["task"],
        f"{name} ({', '.join(own)})" if own else name,
        result["init_from"] or "scratch",
        "0" if result["task"] == "linear_probe" else blocks,
        result["data"],
        f"{result['epochs']:.4g}",
        str(result["steps"]),
        str(result["batch_size"]),
    )


def percent(values: list[float | None]) -> str:
    """`83.57 ± 0.09 (4)` of fractions; one alone without deviation."""
    if None in values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.2f} ({len(values)})" if values[1:] else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("results", __doc__)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run")
    args = parser.parse_args(argv)
    found, times = [], []
    for workdir in dict.fromkeys(to_path(w) for w in args.workdirs):
        supervised, time = (workdir / "results.json").exists(), summary(workdir)
        found += [read_results(workdir)] if supervised else []
        times += [time] if time else []
        if not (supervised or time):  # `runs/*` may be asked for
            note = "neither results.json nor time.json, one of which every run keeps"
            print(f"left out: {workdir}: {note}", file=sys.stderr)
    if not (found or times):
        raise UserError("none of these workdirs holds a run")
    kinds = ([r for r in found if scores_of(r) == names] for names in (SCORES, PIXEL_SCORES))
    print(*(table(alike) for alike in kinds if alike), *times, sep="\n\n")
