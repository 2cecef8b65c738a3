"""Parameters out of Orbax checkpoints: our exports, and workdirs."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import UserError
from mae_jax.interop.description import Description
from mae_jax.interop.weights import Params
from mae_jax.models.classifier import probe_params
from mae_jax.models.vit import VARIANTS

# What is read of a training state (`train.state.TrainState`), in its order: all but the optimizer.
_STATE_FIELDS = ("step", "params", "ema", "frozen", "statistics")


def read_params(path: pathlib.Path) -> Params:
    """A tree of numpy arrays, whatever devices it was saved from.

    Raises:
      UserError: `path` cannot be read.
    """
    return _read(path, lambda tree: tree)


def read_workdir(
    workdir: pathlib.Path,
) -> tuple[Params, Description, dict[str, Any], list[str]]:
    """The newest whole checkpoint of a run: parameters, description, facts for a card, notes.

    The parameters are the moving average where the run keeps one, with those that were frozen. The
    batch norm of a linear probe is absorbed into its head. A head on the mean token expects another
    norm than the encoder's, so that of a probe on it is left out, and a note says so.

    Raises:
      UserError: no complete checkpoint, or the newest is damaged.
    """
    steps = sorted(
        (int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()),
        reverse=True,
    )
    if not steps:
        raise UserError(f"{workdir}: no complete checkpoint in its checkpoints/ folder yet")
    folder = workdir / "checkpoints" / str(steps[0])
    try:
        record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder.absolute() / "record")
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: its record cannot be read ({error})") from error
    state = _read(folder / "state", lambda tree: {k: tree[k] for k in _STATE_FIELDS if k in tree})
    state = dict.fromkeys(_STATE_FIELDS) | state  # older runs have nothing frozen
    config = record["config"]
    _check_fingerprints(state, record["fingerprint"], folder)
    averaged = state["ema"] is not None
    params = state["ema"] if averaged else state["params"]
    params = unflatten_dict({**flatten_dict(params), **flatten_dict(state["frozen"] or {})})
    notes = []
    if state["statistics"] is not None:
        params = probe_params(params, state["statistics"], config["head"]["pool"])
        params = jax.tree.map(np.asarray, params)
        if "head" not in params:
            notes.append(
                "the head of this linear probe reads the mean token, for which there is no model: "
                "it is left out (a probe with head.pool=cls keeps its head)"
            )
    facts = {
        "task": config.get("task", "pretrain"),
        "data": config["data"]["name"],
        "started from": config.get("init_from") or "random weights",
        "images seen": int(state["step"]) * config["batch_size"],
        "steps": int(state["step"]),
        "batch size": config["batch_size"],
        "base learning rate": config["optim"]["base_lr"],
        "weights": "moving average" if averaged else "as trained",
        "hours": f"{record['elapsed_seconds'] / 3600:.2f}",
        "made with": f"mae_jax {record['version']}",
        **_last_metrics(workdir / "metrics.jsonl"),
    }
    classes = params["head"]["bias"].shape[0] if "head" in params else 0
    return params, _describe(config, classes), facts, notes


def _describe(config: dict[str, Any], classes: int) -> Description:
    """The model of a resolved config (`config.json` of a workdir); `classes` 0 for no head."""
    model, decoder = config["model"], config["decoder"]
    shape = VARIANTS[model["variant"]]
    size = model["image_size"]
    size = [size] if isinstance(size, int) else list(size)
    if config.get("task", "pretrain") == "pretrain":
        own: dict[str, Any] = {
            "decoder_width": decoder["width"],
            "decoder_depth": decoder["depth"],
            "decoder_heads": decoder["heads"],
            "target": config["target"],
            "mask_ratio": config["mask"]["ratio"],
        }
    else:
        own = {"pool": config["head"]["pool"] if classes else "", "classes": classes}
    return Description(
        image_size=(size[0], size[-1]),
        patch_size=model["patch_size"],
        channels=model["channels"],
        width=model["width"] or shape.width,
        depth=model["depth"] or shape.depth,
        heads=model["heads"] or shape.heads,
        mean=tuple(config["data"]["mean"]),
        std=tuple(config["data"]["std"]),
        **own,
    )


def _read(path: pathlib.Path, choose: Any) -> Any:
    """Restores the chosen part of a tree as numpy arrays."""
    try:
        # A checkpointer would look for a file of its own that a part of a step does not have.
        handler = ocp.PyTreeCheckpointHandler()
        tree = choose(handler.metadata(path.absolute()).tree)
        item = jax.tree.map(lambda leaf: 0, tree)
        arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return handler.restore(
            path.absolute(),
            args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True),
        )
    except (ValueError, OSError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a readable Orbax checkpoint ({first[:200]})") from error


def _check_fingerprints(state: dict[str, Any], expected: list[int], folder: pathlib.Path) -> None:
    """Compares the parameters with the bit sums the run recorded when it saved them.

    The sums are in the order of the state's leaves: step, parameters, optimizer, then the rest.
    """
    params = jax.tree.leaves(state["params"])
    rest = jax.tree.leaves([state[field] for field in _STATE_FIELDS[2:]])
    recorded = expected[1 : 1 + len(params)] + expected[len(expected) - len(rest) :]
    for leaf, value in zip(params + rest, recorded, strict=True):
        bits = np.ascontiguousarray(leaf).view(np.uint32).sum(dtype=np.uint64)
        if int(bits) % 2**32 != value:
            raise UserError(
                f"{folder}: its tensors are not what was saved, the disk has changed them; move "
                "this folder away to use the checkpoint before it"
            )


def _last_metrics(path: pathlib.Path) -> dict[str, str]:
    """The newest value of every loss and accuracy that the run logged."""
    if not path.is_file():
        return {}
    values: dict[str, str] = {}
    for line in path.read_text().splitlines():
        for key, value in json.loads(line).items():
            if isinstance(value, float) and key.endswith(("loss", "accuracy", "top1", "top5")):
                values[f"last {key}"] = f"{value:.4f}"
    return values
