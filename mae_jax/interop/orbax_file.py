"""Parameters out of Orbax checkpoints: our exports, and workdirs."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mae_jax.interop.description import Description, WeightsError
from mae_jax.interop.weights import Params
from mae_jax.models.vit import VARIANTS


def read_params(path: pathlib.Path) -> Params:
    """A tree of numpy arrays, whatever devices it was saved from.

    Raises:
      WeightsError: `path` cannot be read.
    """
    return _read(path, lambda tree: tree)


def read_workdir(workdir: pathlib.Path) -> tuple[Params, Description, dict[str, Any]]:
    """The newest whole checkpoint of a run: parameters, description, facts for a model card.

    The parameters are the moving average where the run keeps one.

    Raises:
      WeightsError: no complete checkpoint, or the newest is damaged.
    """
    steps = sorted(
        (int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()),
        reverse=True,
    )
    if not steps:
        raise WeightsError(f"{workdir}: no complete checkpoint in its checkpoints/ folder yet")
    folder = workdir / "checkpoints" / str(steps[0])
    try:
        record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder.absolute() / "record")
    except (ValueError, OSError) as error:
        raise WeightsError(f"{folder}: its record cannot be read ({error})") from error
    state = _read(folder / "state", lambda tree: {k: tree[k] for k in ("step", "params", "ema")})
    config = record["config"]
    averaged = state["ema"] is not None
    params = state["ema"] if averaged else state["params"]
    _check_fingerprints(state, record["fingerprint"], folder)
    facts = {
        "data": config["data"]["name"],
        "images seen": int(state["step"]) * config["batch_size"],
        "steps": int(state["step"]),
        "batch size": config["batch_size"],
        "base learning rate": config["optim"]["base_lr"],
        "weights": "moving average" if averaged else "as trained",
        "hours": f"{record['elapsed_seconds'] / 3600:.2f}",
        "made with": f"mae_jax {record['version']}",
        **_last_metrics(workdir / "metrics.jsonl"),
    }
    return params, describe(config), facts


def describe(config: dict[str, Any]) -> Description:
    """The model of a resolved config (`config.json` of a workdir)."""
    model, decoder = config["model"], config["decoder"]
    shape = VARIANTS[model["variant"]]
    size = model["image_size"]
    size = [size] if isinstance(size, int) else list(size)
    return Description(
        image_size=(size[0], size[-1]),
        patch_size=model["patch_size"],
        channels=model["channels"],
        width=model["width"] or shape.width,
        depth=model["depth"] or shape.depth,
        heads=model["heads"] or shape.heads,
        decoder_width=decoder["width"],
        decoder_depth=decoder["depth"],
        decoder_heads=decoder["heads"],
        target=config["target"],
        mask_ratio=config["mask"]["ratio"],
        mean=tuple(config["data"]["mean"]),
        std=tuple(config["data"]["std"]),
    )


def _read(path: pathlib.Path, choose: Any) -> Any:
    """Restores the chosen part of a tree as numpy arrays."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = choose(checkpointer.metadata(path.absolute()).item_metadata.tree)
            item = jax.tree.map(lambda leaf: 0, tree)
            arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(
                path.absolute(),
                args=ocp.args.PyTreeRestore(
                    item=item, restore_args=arguments, partial_restore=True
                ),
            )
    except (ValueError, OSError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise WeightsError(f"{path}: not a readable Orbax checkpoint ({first[:200]})") from error


def _check_fingerprints(state: dict[str, Any], expected: list[int], folder: pathlib.Path) -> None:
    """Compares the parameters with the bit sums the run recorded when it saved them.

    The sums are in the order of the state's leaves: step, parameters, optimizer, average.
    """
    params, ema = jax.tree.leaves(state["params"]), jax.tree.leaves(state["ema"])
    recorded = expected[1 : 1 + len(params)] + expected[len(expected) - len(ema) :]
    for leaf, value in zip(params + ema, recorded, strict=True):
        bits = np.ascontiguousarray(leaf).view(np.uint32).sum(dtype=np.uint64)
        if int(bits) % 2**32 != value:
            raise WeightsError(
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
