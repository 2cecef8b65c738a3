"""Parameters out of the checkpoints of workdirs."""

from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax import UserError
from mae_jax.interop.weights import Params
from mae_jax.models.classifier import probe_params
from mae_jax.models.spec import ModelSpec
from mae_jax.storage.checkpoints import read_newest
from mae_jax.storage.files import read_json_lines

# All of `train.state.TrainState` but the optimizer; `statistics` (batch norm) are of version 0.1.
_PARTS = ("step", "params", "ema", "frozen", "extra", "statistics")


def read_workdir(workdir: epath.Path) -> tuple[Params, ModelSpec, dict[str, Any], list[str]]:
    """The newest whole checkpoint of a run: parameters (averages where kept, frozen ones and a
    segmenter's running statistics too, batch norm absorbed into a probe's head), description, facts
    for a card, notes."""
    state, record, notes = read_newest(workdir / "checkpoints", _PARTS)
    config = record["config"]
    if config.get("task") == "tokenizer":
        raise UserError(f"{workdir}: a tokenizer, no encoder; pretraining takes it as tokenizer=")
    averaged = state["ema"] is not None
    params = state["ema" if averaged else "params"]
    params = unflatten_dict({**flatten_dict(params), **flatten_dict(state["frozen"] or {})})
    statistics = state["statistics"] or (state["extra"] or {}).get("statistics")
    if statistics:
        params = jax.tree.map(np.asarray, probe_params(params, statistics))
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
    if "model" in record:
        return params, ModelSpec.from_json(record["model"]), facts, notes
    classes = params["head"]["bias"].shape[0] if "head" in params else 0
    return params, ModelSpec.from_config(config, classes), facts, notes  # of version 0.1


def _last_metrics(path: epath.Path) -> dict[str, str]:
    """The newest value of every loss and accuracy that the run logged."""
    values: dict[str, str] = {}
    for line in read_json_lines(path):
        for key, value in line.items():
            if isinstance(value, float) and key.endswith(("loss", "accuracy", "top1", "top5")):
                values[f"last {key}"] = f"{value:.4f}"
    return values
