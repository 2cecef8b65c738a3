"""Training state, and one update of it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes.

    Attributes:
      step: int32 scalar, updates made so far.
      params: what is trained.
      ema: moving average of `params`, or None.
      frozen: parameters that no update changes, or None; no optimizer state is kept for them.
      statistics: running statistics of batch norm, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    frozen: Any = None
    statistics: Any = None

    @property
    def best_params(self) -> Any:
        """The trained parameters to evaluate and export: the average where one is kept."""
        return self.params if self.ema is None else self.ema

    @property
    def weights(self) -> Any:
        """The whole model's parameters to evaluate and export, frozen ones included."""
        return merge(self.best_params, self.frozen)

    def with_weights(self, weights: Any) -> "TrainState":
        """This state with the values of `weights`, a tree as `self.weights`."""

        def take(tree: Any) -> Any:
            # Copies: a donated state must not hold a buffer twice.
            chosen = {path: jnp.copy(flat[path]) for path in flatten_dict(tree)}
            return unflatten_dict(chosen)

        flat = flatten_dict(weights)
        return self.replace(
            params=take(self.params),
            ema=None if self.ema is None else take(self.ema),
            frozen=None if self.frozen is None else take(self.frozen),
        )


def merge(params: Any, frozen: Any) -> Any:
    """Two parameter trees without a leaf in common as one; `frozen` may be None."""
    if frozen is None:
        return params
    return unflatten_dict(flatten_dict(params) | flatten_dict(frozen))


def split(params: Any, trainable: Callable[[str], bool]) -> tuple[Any, Any]:
    """The inverse of `merge`: what `trainable(path)` says, and the rest (None if nothing)."""
    flat = flatten_dict(params, sep="/")
    chosen = {path: leaf for path, leaf in flat.items() if trainable(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(chosen, sep="/"), unflatten_dict(rest, sep="/") if rest else None


def create_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    keep_ema: bool,
    *,
    frozen: Any = None,
    statistics: Any = None,
) -> TrainState:
    """A state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
        frozen=frozen,
        statistics=statistics,
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

    def add_part(total: Any, part: Any) -> tuple[Any, None]:
        (loss, metrics), grads = grad_fn(params, part)
        return jax.tree.map(jnp.add, total, (grads, {"loss": loss, **metrics})), None

    micro_batches = _divide(batch, parts)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    (loss, metrics), grads = jax.eval_shape(grad_fn, params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, {"loss": loss, **metrics}))
    total, _ = jax.lax.scan(add_part, zeros, micro_batches)
    return jax.tree.map(lambda x: x / parts, total)


def _divide(batch: Any, parts: int) -> Any:
    """Arrays [B, ...] as [parts, B / parts, ...]; part a holds rows a, a + parts, ..."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def in_parts(function: Callable[[jax.Array], jax.Array], x: jax.Array, parts: int) -> jax.Array:
    """`function(x)` for a function of rows [B, ...] -> [B, ...], computed in so many parts."""
    if parts == 1:
        return function(x)
    y = jax.lax.map(function, _divide(x, parts))  # [parts, B / parts, ...]
    return jnp.swapaxes(y, 0, 1).reshape(x.shape[0], *y.shape[2:])


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One optimizer update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
