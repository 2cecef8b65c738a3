"""What a sweep consists of: members of a file in configs/ablations, and the runs they share."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from mae_jax import UserError
from mae_jax import config as config_lib
from mae_jax.config_checks import validate
from mae_jax.models.flops import spec_forward_macs
from mae_jax.models.spec import ModelSpec
from mae_jax.storage.files import PathLike, read_json, to_path, unfinished, write_json
from mae_jax.train.ledger import read_times

RECORD = "sweep.json"  # which members have which runs, for the report
LOG = "log.txt"  # in the folder of a run, what it printed
# What tells two runs apart: all that changes what they compute, and what they are evaluated on.
_NOT_COMPARED = {*config_lib.FREE_FIELDS, "init_from"} - {"data.dir", "eval.batches"}
# Follow-ups read the same data with the same model: these fields are theirs, too.
_SHARED = re.compile(r"model\.|data\.(name|dir|eval_split|mean|std|workers|threads)$").match

Fields = dict[str, Any]
Base = dict[str, tuple[str, Fields]]  # {task: (recipe, fields)}, in the order run


@dataclasses.dataclass(eq=False)
class Run:
    """One training of a sweep, and how far it is."""

    folder: epath.Path
    arguments: list[str]  # of mae_jax.main
    config: ConfigDict
    needs: "Run | None"
    state: str = ""  # not asked for; or waiting, running, done, failed, left out
    restarts: int = 0
    began: float = 0.0

    def command(self, python: str = "python") -> list[str]:
        """What can be typed to make this run by hand."""
        return [python, "-m", "mae_jax.main", *self.arguments]

    def is_done(self) -> bool:
        """Whether it is finished, with the config that it has here."""
        if not finished(self.folder, self.config.task):
            return False
        saved = read_json(self.folder / "config.json")
        return not config_lib.differing_fields(saved, self.config).keys() - {"init_from"}

    def work(self) -> float:
        """How much there is to compute, beside other runs of the `kind`: images times their work
        through the model, forward, and backward as far down as blocks are trained."""
        config = self.config
        length = config.steps * config.batch_size or config.epochs
        if config.task in config_lib.DVAE:
            return length
        spec, blocks = ModelSpec.from_config(config), config.trainable_blocks
        frozen = config.task in config_lib.PROBE
        trained = 0 if frozen else 1 if blocks == -1 else min(1, blocks / spec.depth)
        return length * spec_forward_macs(spec) * (1 + 2 * trained)

    @property
    def kind(self) -> tuple[str, bool]:
        """Runs of one kind tell how long another takes: its task, and how its length is given."""
        return self.config.task, self.config.steps > 0

    def share(self) -> float:
        """The part of its steps that is made."""
        times = read_times(self.folder)
        return times["step"] / times["total_steps"] if times else 0.0


def finished(workdir: PathLike, task: str) -> bool:
    """Whether a run's own mark says so: the results of a classifier, else the export."""
    folder = to_path(workdir)
    mark = folder / ("results.json" if task in config_lib.SUPERVISED else "export")
    return mark.exists() and (folder / "config.json").exists() and not unfinished(mark)


def last_line(workdir: PathLike) -> str:
    """What a run of a sweep said last."""
    log = to_path(workdir) / LOG
    lines = log.read_bytes().decode(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# Files and options.


def find(text: str, folder: str) -> pathlib.Path | None:
    """The file of that path, or of that name in a folder of our recipes."""
    own = config_lib.recipe_folder()
    paths = (pathlib.Path(text), own.parent / text, own / folder / f"{text}.py")
    return next((path for path in paths if path.is_file()), None)


def load_base(text: str) -> Base:
    """{task: (recipe, fields)}, what comes first first, of a base or of a recipe."""
    path = find(text, "ablations/bases")
    if path is not None and (base := getattr(config_lib.load_recipe(path), "BASE", None)):
        return base
    return {config_lib.load_config(text).task: (text, {})}


def load_sweep(text: str, base: ConfigDict) -> dict[str, Any]:
    """Name, title and members of a file of configs/ablations or of one's own."""
    path = find(text, "ablations")
    if path is None:
        own = (config_lib.recipe_folder() / "ablations").glob("*.py")
        names = ", ".join(sorted(path.stem for path in own))
        raise UserError(f"{text}: no such file, and no sweep of that name ({names})")
    module = config_lib.load_recipe(path)
    if not hasattr(module, "members"):
        raise UserError(f"{path}: a sweep file has a function members(base)")
    facts = {key.lower(): getattr(module, key, "") for key in ("TITLE", "AXIS", "SCALE")}
    return {"name": path.stem, **facts, "members": list(module.members(base))}


def grid(texts: Sequence[str], task: str) -> dict[str, Any]:
    """The sweep of all combinations of `FIELD=VALUE,VALUE`; `;` between values that are lists."""
    axes = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not (equals and name in config_lib.FIELDS):
            raise UserError(f"--grid {text}: give FIELD=VALUE,VALUE, a field of mae_jax/config.py")
        many = isinstance(config_lib.FIELDS[name].default, tuple)
        axes[name] = values.split(";" if many else ",")
    members = []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        member = {"name": " ".join(values), task: fields}
        if len(axes) == 1 and re.fullmatch(r"-?[\d.]+(e-?\d+)?", values[0]):
            member["x"] = float(values[0])
        members.append(member)
    name = " ".join(axes)
    return {"name": f"grid {name}", "title": f"Grid: {name}", "axis": name, "members": members}


def spelled(value: Any) -> str:
    """A field's value as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def configured(recipe: str, fields: Fields) -> ConfigDict:
    """The recipe with these fields; UserError where one does not exist or has no such value."""
    config = config_lib.load_config(recipe)
    for name, value in fields.items():
        config_lib.override(config, name, spelled(value))
    return config


class Plan:
    """Runs, in the order they are made, of members of sweeps; equal ones are the same object."""

    def __init__(self, workdir: epath.Path, base: Base, given: dict[str, Fields]):
        self._members, self._base, self._given = workdir / "members", base, given
        self.runs: dict[str, Run] = {}  # by what they compute
        exists = self._members.exists()
        self._found = (
            {p.name.rpartition("-")[2]: p for p in self._members.iterdir()} if exists else {}
        )

    def add(self, member: dict[str, Any], seed: int, asked: bool) -> dict[str, Run]:
        """A member's runs by task; where not `asked`, they are not to be made.

        UserError: its fields do not go together.
        """
        unknown = member.keys() - {"name", "x", "paper", *self._base}
        if tasks := unknown - set(config_lib.TASKS):
            raise UserError(f"its key {min(tasks)} is neither name, x, paper nor a task")
        runs: dict[str, Run] = {}  # by task; none counts if one is refused
        keys: dict[str, str] = {}
        first_key, shared = "", {}
        for task, (recipe, fields) in self._base.items():
            own = member.get(task, {})
            if own is None:
                continue
            first = next(iter(runs.values()), None)
            given = self._given.get(task, {})
            of_task = {k: v for k, v in shared.items() if task in config_lib.FIELDS[k].tasks}
            fields = fields | of_task | given | own | {"seed": seed}
            if first is not None:
                fields["init_from"] = str(first.folder)
            config = configured(recipe, fields)
            if given.get("tokenizer") and config.target != "token":
                config.tokenizer = ""  # it is for the members that read it
                fields.pop("tokenizer")
            validate(config)
            key = fingerprint(config, first_key)
            if first is None:
                first_key, shared = key, {k: v for k, v in (given | own).items() if _SHARED(k)}
                differing = self._differing(config, task)
            elif own:
                differing = [*differing, *(f"{k}-{spelled(v)}" for k, v in own.items())]
            name = re.sub(r"[^\w.-]+", "_", "-".join([task, *differing]))[:80]
            folder = self._found.get(key, self._members / f"{name}-seed{seed}-{key}")
            texts = [f"--config.{k}={spelled(v)}" for k, v in fields.items()]
            arguments = [f"--config={recipe}", f"--workdir={folder}", *texts]
            runs[task] = self.runs.get(key, Run(folder, arguments, config, first))
            keys[task] = key
        for task, run in runs.items():
            self.runs[keys[task]] = run
            if asked and not run.state:
                run.state = "done" if run.is_done() else "waiting"
        return runs

    def _differing(self, config: ConfigDict, task: str) -> list[str]:
        """What a run has other than the base, for the name of its folder."""
        base = config_lib.flatten(configured(*self._base[task]).to_dict())
        fields = config_lib.flatten(config.to_dict()).items()
        skipped = {*_NOT_COMPARED, "seed", "data.dir"}
        return [f"{k}-{spelled(v)}" for k, v in fields if v != base[k] and k not in skipped]


def fingerprint(config: ConfigDict, start: str) -> str:
    """Of what a run computes: its fields that are not the default, and the run it starts from."""
    defaults = config_lib.flatten(config_lib.default_config().to_dict())
    fields = config_lib.flatten(config.to_dict()).items()
    own = {k: v for k, v in fields if v != defaults[k] and k not in _NOT_COMPARED}
    own["init_from"] = start or config.init_from
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]


class Sweeps(NamedTuple):
    """What a command asks for.

    Attributes:
      runs: to be made or done, in order.
      rows: runs by task, of each member and seed asked for.
      record: of every sweep by name, as the report reads it from `sweep.json`: title, axis, base,
        and members with their values in the paper and the folders of their runs.
      refused: (member and seed, why) of those whose fields do not go together.
    """

    runs: list[Run]
    rows: dict[str, dict[str, Run]]
    record: dict[str, dict[str, Any]]
    refused: list[tuple[str, str]]


def prepare(
    workdir: PathLike,
    base_name: str,
    *,
    files: Sequence[str] = (),
    grids: Sequence[str] = (),
    only: Collection[str] = (),
    seeds: Sequence[int] = (0,),
    given: dict[str, Fields] | None = None,
) -> Sweeps:
    """All of sweep files, or of one grid; writes nothing. UserError: files and options are wrong.

    `given`: fields by task, that of `config` for the first of the base.
    """
    base = load_base(base_name)
    main_task = next(iter(base))
    given = {main_task if key == "config" else key: own for key, own in (given or {}).items()}
    if unknown := given.keys() - base.keys():
        raise UserError(f"--{min(unknown)}.FIELD: --base={base_name} has no such run")
    recipe, fields = base[main_task]
    config = configured(recipe, fields | given.get(main_task, {}))
    found = [load_sweep(file, config) for file in files]
    if grids:
        found.append(grid(grids, main_task))
    names = dict.fromkeys(member["name"] for sweep in found for member in sweep["members"])
    if absent := set(only) - names.keys():
        raise UserError(f"--only={min(absent)}: the members are {', '.join(names)}")
    plan, asked = Plan(to_path(workdir), base, given), Sweeps([], {}, {}, [])
    told = {
        task: {k: spelled(v) for k, v in own.items() if k not in _NOT_COMPARED}
        for task, own in given.items()
    }
    for sweep in found:
        facts = {"title": sweep["title"], "axis": sweep["axis"], "scale": sweep.get("scale", "")}
        record = {**facts, "base": base_name, "given": told, "members": []}
        asked.record[sweep["name"]] = record
        for member in sweep["members"]:
            kept = {key: member.get(key) for key in ("name", "x", "paper")} | {"runs": {}}
            record["members"].append(kept)
            wanted = not only or member["name"] in only
            for seed in seeds:
                label = f"{sweep['name']} {member['name']} seed {seed}"
                try:
                    runs = plan.add(member, seed, wanted)
                except UserError as error:
                    kept["refused"] = str(error)
                    asked.refused.extend([(label, str(error))] * wanted)
                    continue
                kept["runs"][str(seed)] = {task: run.folder.name for task, run in runs.items()}
                if wanted:
                    asked.rows[label] = runs
    asked.runs.extend(run for run in plan.runs.values() if run.state)
    return asked


def keep_record(workdir: PathLike, record: dict[str, dict[str, Any]]) -> None:
    """Adds to `sweep.json`; other seeds stay where an earlier command asked for the same else."""
    path = to_path(workdir) / RECORD
    sweeps = read_json(path)["sweeps"] if path.exists() else {}
    for name, new in record.items():
        old = sweeps.get(name)
        if old is not None and all(old[key] == new[key] for key in ("base", "given")):
            runs = {member["name"]: member["runs"] for member in old["members"]}
            for member in new["members"]:
                member["runs"] = runs.get(member["name"], {}) | member["runs"]
        sweeps[name] = new
    write_json(path, {"sweeps": sweeps})
