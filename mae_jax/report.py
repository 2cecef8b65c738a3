"""A page about a sweep, or about one run: tables beside the paper's, plots, curves, pictures.

    python -m mae_jax.report DIR...

DIR is a folder of `launch/sweep.py` or any workdir. Writes DIR/report/index.html, which needs no
other file, and the same as report.md with its PNGs. What is not finished is marked so, and can be
reported again later. Needs matplotlib: `pip install 'mae_jax[report]'`.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("report"))

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from mae_jax import UserError, cli
from mae_jax.config import default_config, flatten
from mae_jax.pictures.page import Page, newest_picture, smaller
from mae_jax.pictures.plots import Point, curves, sweep_plot
from mae_jax.results import percent, scores_of
from mae_jax.storage.files import read_json, to_path
from mae_jax.sweeps import RECORD, finished, last_line
from mae_jax.train.ledger import read_times, seconds_at_work, summary
from mae_jax.train.metrics import read_metrics

STAGES = {"finetune": "fine-tuned", "scratch": "from scratch", "linear_probe": "probed"}
CAPTION = "Ours on the left axis, the paper's (ViT-L, ImageNet) on the right. Neither starts at 0."
# Of single runs: what stands together in a panel, by the end of the metrics' names.
PANELS = ("loss", "top1", "miou", "lr", "grad_norm", "images_per_second")


class Facts(NamedTuple):
    """What a workdir tells of its run; hours without the time between starts."""

    state: str  # "done", or how far it is
    config: dict[str, Any]  # flat; empty if it never started
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None
    hours: float | None
    rate: float | None  # images/s, the median
    picture: bytes | None  # the newest reconstructions


def look(folder: epath.Path, task: str = "") -> Facts:
    """Reads what a run has left so far."""
    config, times = folder / "config.json", read_times(folder)
    fields = flatten(read_json(config)) if config.exists() else {}
    metrics = read_metrics(folder / "metrics.jsonl")
    results, done = folder / "results.json", finished(folder, fields.get("task", task))
    state = "done"
    if not done:
        told = textwrap.shorten(last_line(folder), 120)
        state = f"step {times['step']} of {times['total_steps']}" if times else "not begun"
        state += f" ({told})" * bool(told)
    rates = [line[name] for line in metrics if line.get(name := "train/images_per_second")]
    return Facts(
        state,
        fields,
        metrics,
        read_json(results) if done and results.exists() else None,
        seconds_at_work(times) / 3600 if times else None,
        statistics.median(rates) if rates else None,
        newest_picture(folder / "reconstructions"),
    )


def curve(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float | None]]:
    """(step, value) of a metric."""
    return [(line["step"], line[name]) for line in metrics if name in line]


def figure(value: float | None) -> str:
    """A number for a table."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# A sweep.


def add_sweep(page: Page, folder: epath.Path, name: str, sweep: dict[str, Any]) -> None:
    """One sweep of `sweep.json`: its tables, plot, curves, configs and pictures."""
    members = {member["name"]: member for member in sweep["members"]}
    tasks_of = {
        run: t for m in members.values() for s in m["runs"].values() for t, run in s.items()
    }
    runs = {run: look(folder / "members" / run, task) for run, task in tasks_of.items()}
    facts = {  # by member, then seed, then task
        key: {
            seed: {task: runs[run] for task, run in own.items()}
            for seed, own in member["runs"].items()
        }
        for key, member in members.items()
    }
    page.heading(sweep["title"] or name)
    given = "".join(
        f", --{task}.{field}={value}"
        for task, own in sweep["given"].items()
        for field, value in own.items()
    )
    done = sum(run.state == "done" for run in runs.values())
    page.text(f"Base {sweep['base']}{given}. {done} of {len(runs)} runs are finished.")
    tasks = [t for t in STAGES if any(t in s for m in facts.values() for s in m.values())]
    tasks = tasks or [t for t in STAGES if any((m["paper"] or {}).get(t) for m in members.values())]
    add_results(page, sweep, members, facts, tasks)

    points = {
        STAGES[task]: [
            point(member, scores(facts[key], task), task) for key, member in members.items()
        ]
        for task in tasks
    }
    both = [
        [p for p in own if p.mean is not None or p.paper is not None] for own in points.values()
    ]
    if len(both) > 1 and not {p.name for p in both[0]} & {p.name for p in both[1]}:
        points = {" or ".join(points): [p for own in reversed(both) for p in own]}  # figure 9
    else:
        points = dict(zip(points, both, strict=True))
    if points := {title: own for title, own in points.items() if own}:
        plot = sweep_plot(points, sweep["axis"], sweep["scale"])
        page.picture(name, plot, CAPTION)

    starts = {key: next(iter(own.values()), {}) for key, own in facts.items()}  # of the first seed
    first = {key: next(iter(tasks.values())) for key, tasks in starts.items() if tasks}
    shared = {}  # one run may be that of several members
    for key, run in first.items():
        shared.setdefault(id(run), (run, []))[1].append(key)
    distinct = {", ".join(keys): run for run, keys in shared.values()}
    losses = {key: curve(run.metrics, "train/loss") for key, run in distinct.items()}
    if losses := {key: points for key, points in losses.items() if points}:
        page.heading("Loss of the first seed", 3)
        page.picture(f"{name}_loss", curves({"train/loss": losses}))
    add_costs(page, facts)
    page.heading("What differs between members", 3)
    for task in dict.fromkeys(task for tasks in starts.values() for task in tasks):
        add_differences(page, task, {k: t[task].config for k, t in starts.items() if task in t})
    pictures = {key: run.picture for key, run in distinct.items() if run.picture}
    if pictures:
        page.heading("Reconstructions of the first seed", 3)
    for key, content in pictures.items():
        page.picture(f"{name}_{key}_reconstructions", content, key)


def scores(seeds: Mapping[str, Mapping[str, Facts]], task: str) -> list[float]:
    """Top-1 of the seeds that are finished, as fractions."""
    runs = [tasks[task] for tasks in seeds.values() if task in tasks]
    return [run.results["top1"] for run in runs if run.results]


def point(member: dict[str, Any], values: list[float], task: str) -> Point:
    """A member in the plot, in percent."""
    mean = 100 * statistics.fmean(values) if values else None
    spread = 100 * statistics.stdev(values) if values[1:] else 0.0
    return Point(member["name"], member["x"], mean, spread, (member["paper"] or {}).get(task))


def add_results(
    page: Page, sweep: dict[str, Any], members: dict[str, Any], facts: dict, tasks: list[str]
) -> None:
    """Ours, mean and sample standard deviation over seeds (how many), beside the paper's."""
    head, rows = [sweep["axis"] or "member"], []
    for task in tasks:
        head += [f"{STAGES[task]}, top-1 %", "paper"]
    head += ["loss at the end"] * (not tasks)  # of pretraining alone
    for key, member in members.items():
        same = member["x"] is None or f"{member['x']:g}" == key
        cells = [key if same or not member["paper"] else f"{key} (paper: {member['x']:g})"]
        for task in tasks:
            values = scores(facts[key], task)
            states = dict.fromkeys(unfinished(own, task) for own in facts[key].values())
            told = ", ".join(filter(None, states))
            cell = percent(values) if values else "-"
            if told:
                cell = f"{cell}; unfinished: " * bool(values) + told
            if not facts[key] and member.get("refused"):
                cell = f"refused: {textwrap.shorten(member['refused'], 120)}"
            paper = (member["paper"] or {}).get(task)
            cells += [cell, "-" if paper is None else f"{paper:.1f}"]
        if not tasks:
            ends = [next(iter(own.values())) for own in facts[key].values()]
            losses = [curve(run.metrics, "eval/loss")[-1:] for run in ends if run.state == "done"]
            losses = [value for own in losses for _, value in own if value is not None]
            told = ", ".join(dict.fromkeys(run.state for run in ends if run.state != "done"))
            cells.append(f"{statistics.fmean(losses):.4f}" if losses else told or "-")
        rows.append(cells)
    page.table(head, rows)


def unfinished(own: Mapping[str, Facts], task: str) -> str:
    """How far a member's run is, or what it waits for; empty where it is done or not wanted."""
    if task not in own or own[task].state == "done":
        return ""
    first = next(iter(own))
    return f"{first}: {own[first].state}" if own[first].state != "done" else own[task].state


def add_costs(page: Page, facts: dict[str, dict[str, dict[str, Facts]]]) -> None:
    """Hours and images/s of each task, means over seeds."""
    tasks = list(dict.fromkeys(task for m in facts.values() for own in m.values() for task in own))
    rows = []
    for key, seeds in facts.items():
        cells = [key]
        for task in tasks:
            runs = [own[task] for own in seeds.values() if task in own]
            for values in ([run.hours for run in runs], [run.rate for run in runs]):
                known = [value for value in values if value is not None]
                cells.append(figure(statistics.fmean(known) if known else None))
        if any(cell != "-" for cell in cells[1:]):
            rows.append(cells)
    page.heading("Cost of a run", 3)
    page.table(["member", *(f"{t}, {unit}" for t in tasks for unit in ("hours", "images/s"))], rows)


def add_differences(page: Page, task: str, configs: dict[str, dict[str, Any]]) -> None:
    """The fields in which configs of one task are not all equal, init_from and seed aside."""
    begun = {key: config for key, config in configs.items() if config}
    names = {n for config in begun.values() for n in config} - {"init_from", "seed"}
    names = [n for n in sorted(names) if len({str(c.get(n)) for c in begun.values()}) > 1]
    if not names:
        page.text(f"{task}: nothing but the seed and where it starts.")
        return
    rows = [[key, *(str(config.get(n, "-")) for n in names)] for key, config in begun.items()]
    page.table([task, *names], rows)


# One run.


def add_run(page: Page, folder: epath.Path) -> None:
    """A run of any task: how far, its results, curves, pictures and config."""
    run = look(folder)
    page.text(f"Task {run.config['task']}, {run.state}.")
    if run.results:
        names = scores_of(run.results)
        cells = [percent([run.results[name]]) for name in names]
        page.table(
            [*names.values(), "loss", "examples", "images/s"],
            [
                [
                    *cells,
                    *(figure(run.results[k]) for k in ("loss", "examples", "images_per_second")),
                ]
            ],
        )
    keys = dict.fromkeys(name for line in run.metrics for name in line)
    panels = {
        panel: {
            name: points
            for name in keys
            if name.rpartition("/")[2].startswith(panel) and (points := curve(run.metrics, name))
        }
        for panel in PANELS
    }
    if panels := {panel: lines for panel, lines in panels.items() if lines}:
        page.picture("curves", curves(panels))
    page.heading("Where the time went")
    page.text(summary(folder) or "No time.json was kept.", verbatim=True)
    pictures = {path.name: smaller(path) for path in sorted(folder.glob("*.png"))}
    newest = {part: newest_picture(folder / part) for part in ("reconstructions", "predictions")}
    pictures |= {f"{part}, the newest": content for part, content in newest.items() if content}
    if pictures:
        page.heading("Pictures")
    for caption, content in pictures.items():
        page.picture(caption.removesuffix(".png"), content, caption)
    page.heading("Config: what differs from the defaults, the paper's pretraining of ViT-B")
    defaults = flatten(default_config().to_dict())
    changed = {k: v for k, v in run.config.items() if v != defaults.get(k)}
    rows = [[k, str(v), str(defaults.get(k, "-"))] for k, v in changed.items()]
    page.table(["field", "this run", "default"], rows)


def write_report(folder: epath.Path) -> None:
    """Writes the report of a sweep or a run into it; UserError where it is neither."""
    page = Page(folder.name)
    if (folder / RECORD).exists():
        for name, sweep in read_json(folder / RECORD)["sweeps"].items():
            add_sweep(page, folder, name, sweep)
    elif (folder / "config.json").exists():
        add_run(page, folder)
    else:
        neither = f"neither {RECORD}, as sweeps keep, nor config.json, as runs do"
        raise UserError(f"{folder}: {neither}; give a folder of one of the two")
    page.write(folder / "report")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("report", __doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="of a sweep or of one run")
    for text in parser.parse_args(argv).folders:
        write_report(to_path(text))
        print(f"wrote {to_path(text) / 'report' / 'index.html'}")
