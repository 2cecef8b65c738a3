"""Training state, and one update of it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes."""

    step: jax.Array  # int32, updates made so far
    params: Any  # what is trained
    opt_state: Any
    ema: Any  # moving average of `params`, or None
    # Beside them, or None: what no gradient changes, not in `opt_state`: frozen parameters, and the
    # running statistics of a segmenter.
    frozen: Any = None
    # Further trees by name, such as running statistics of batch norm ("statistics"); laid out,
    # saved and handed to the loss with the rest.
    extra: dict[str, Any] = flax.struct.field(default_factory=dict)

    @property
    def weights(self) -> Any:
        """The whole model's parameters to evaluate and export: averages where they are kept."""
        return merge(self.params if self.ema is None else self.ema, self.frozen)

    def with_weights(self, weights: Any) -> "TrainState":
        """This state with the values of `weights`, a tree as `self.weights`."""

        def take(tree: Any) -> Any:
            # Copies: a donated state must not hold a buffer twice.
            chosen = {path: jnp.copy(flat[path]) for path in flatten_dict(tree)}
            return unflatten_dict(chosen)

        flat = flatten_dict(weights)
        trees = {name: getattr(self, name) for name in ("params", "ema", "frozen")}
        return self.replace(**{name: take(x) for name, x in trees.items() if x is not None})


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
    extra: dict[str, Any] | None = None,
) -> TrainState:
    """A state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if keep_ema else None,
        frozen=frozen,
        extra=extra or {},
    )


def apply_gradients(
    state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One optimizer update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params, ema = optax.apply_updates(state.params, updates), state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
