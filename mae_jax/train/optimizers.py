"""Learning-rate schedule and optimizers (paper tables 8 to 11)."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mae_jax import UserError
from mae_jax.distributed.sharding import path_name

SCHEDULES = ("cosine", "linear")
Mask = Callable[[optax.Params], optax.Params]


def warmup_then(
    decay: str,
    *,
    base_lr: float,
    batch_size: int,
    warmup_steps: int,
    total_steps: int,
    min_lr: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up from exactly 0 to base_lr * batch_size / 256, then half a cosine or a line
    (mmsegmentation's "poly" of power 1) to `min_lr`; UserError where the warm-up is as long as the
    run or longer."""
    if warmup_steps >= total_steps:
        raise UserError(
            f"the warm-up takes {warmup_steps} of {total_steps} steps: lower optim.warmup_epochs "
            "(or optim.warmup_steps), or train longer"
        )
    peak = base_lr * batch_size / 256
    if decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps, min_lr)
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    fall = optax.linear_schedule(peak, min_lr, total_steps - warmup_steps)
    return optax.join_schedules([rise, fall], [warmup_steps])


def decays(params: optax.Params) -> optax.Params:
    """True but for 1-D tensors: as in the reference's pretraining, tokens [1, 1, D] are decayed."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def decays_in_fine_tuning(params: optax.Params) -> optax.Params:
    """As `decays`, but positions and class token are exempt too (as in BEiT's recipe)."""

    exempt = re.compile("pos_embed|cls_token")
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and not exempt.search(jax.tree_util.keystr(path)), params
    )


def adamw(
    schedule: optax.Schedule, mask: Mask, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW with decoupled decay where `mask` says so."""
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


def lars(
    schedule: optax.Schedule, mask: Mask, *, momentum: float, trust: float, weight_decay: float
) -> optax.GradientTransformation:
    """LARS as linear probing uses it (paper table 10): decay, trust ratio, momentum, learning rate.

    `optax.lars` has the last two the other way round: another optimizer while the rate moves. Where
    `mask` says no there is neither decay nor trust ratio. The ratio is 1 where a norm is 0.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), mask),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(schedule),
    )


# By name; what follows the mask are the fields of `optim` that an optimizer uses.
OPTIMIZERS = {"adamw": adamw, "lars": lars}


def hyperparameters(name: str) -> list[str]:
    """The fields of `optim` that are the optimizer's own."""
    return inspect.getfullargspec(OPTIMIZERS[name]).kwonlyargs


def create(
    name: str, schedule: optax.Schedule, fields: Mapping[str, Any], *, mask: Mask = decays
) -> optax.GradientTransformation:
    """The optimizer of that name, after clipping by the global norm; among `fields` are `clip_norm`
    (0 clips nothing) and the optimizer's `hyperparameters`."""
    own = {field: fields[field] for field in hyperparameters(name)}
    optimizer, norm = OPTIMIZERS[name](schedule, mask, **own), fields["clip_norm"]
    return optax.chain(optax.clip_by_global_norm(norm), optimizer) if norm else optimizer


def layer_scales(params: optax.Params, depth: int, decay: float) -> optax.Params:
    """What layer-wise decay multiplies the learning rate of each parameter of a classifier with.

    `decay ** (depth + 1 - id)`: id 0 for class token, positions and patch embedding, i + 1 for
    block i, depth + 1 (scale 1) for what follows the blocks.
    """

    def scale(path: tuple, _: jax.Array) -> float:
        name = path_name(path)
        block = re.search(r"encoder/blocks/(\d+)/", name)
        embedding = re.search(r"encoder/(cls_token|pos_embed|patch_embed)", name)
        layer = int(block[1]) + 1 if block else 0 if embedding else depth + 1
        return decay ** (depth + 1 - layer)

    return jax.tree_util.tree_map_with_path(scale, params)


def scale_by_layer(depth: int, decay: float) -> optax.GradientTransformation:
    """Multiplies final updates by `layer_scales`: placed last, it scales weight decay and `min_lr`
    too, as PyTorch's learning rate of a parameter group does."""

    def update(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(jnp.multiply, updates, layer_scales(updates, depth, decay))

    return optax.stateless(update)
