"""Training state, and one update of it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32 scalar, updates made so far.
      ema: moving average of `params`, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any

    @property
    def best_params(self) -> Any:
        """The parameters to evaluate and export: the average where one is kept."""
        return self.params if self.ema is None else self.ema


def create_state(
    params: Any, optimizer: optax.GradientTransformation, keep_ema: bool
) -> TrainState:
    """A state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
    )


def gradients(loss_fn: LossFn, params: Any, batch: Any, parts: int) -> tuple[Any, Metrics]:
    """Mean gradients and metrics of `loss_fn(params, batch)` over `parts` micro-batches.

    Args:
      loss_fn: gives the mean loss of its examples and a dict of further means.
      batch: arrays [B, ...]; B divisible by `parts`.

    Every part takes rows a, a + parts, a + 2 * parts, ... so that a batch split over devices
    stays where it is.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (loss, metrics), grads = grad_fn(params, batch)
        return grads, {"loss": loss, **metrics}

    def split(x: jax.Array) -> jax.Array:  # [B, ...] -> [parts, B / parts, ...]
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def add_part(total: Any, part: Any) -> tuple[Any, None]:
        (loss, metrics), grads = grad_fn(params, part)
        return jax.tree.map(jnp.add, total, (grads, {"loss": loss, **metrics})), None

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    (loss, metrics), grads = jax.eval_shape(grad_fn, params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, {"loss": loss, **metrics}))
    total, _ = jax.lax.scan(add_part, zeros, micro_batches)
    return jax.tree.map(lambda x: x / parts, total)


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One optimizer update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
