"""Gradients of a global batch: each device runs its own examples, then sums are exchanged.

Written for one device (`shard_map`): left to place the sums, the compiler puts them behind every
matrix product, in the product's type and once for every part of an accumulated batch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mae_jax.distributed.mesh import BATCH_AXES
from mae_jax.distributed.sharding import in_compute_type, state_sharding
from mae_jax.train.state import Metrics, TrainState, merge

# (weights, extra, examples) -> (mean loss of the examples, further means). Weights are all of the
# model's, frozen ones included; `extra` is that of the state.
LossFn = Callable[[Any, dict[str, Any], Any], tuple[jax.Array, Metrics]]


def gradients(
    loss_fn: LossFn,
    state: TrainState,
    batch: Any,
    *,
    mesh: Mesh,
    parts: int = 1,
    compute_dtype: jnp.dtype = jnp.float32,
    reduce_dtype: jnp.dtype = jnp.float32,
) -> tuple[Any, Metrics]:
    """Mean gradients by `state.params`, float32, laid out as these; mean metrics, "loss" included.

    Split parameters are gathered once a step, matrices in `compute_dtype`. Their gradients are
    summed over `fsdp` as soon as each is known, and over `data` once a step; those of whole
    parameters over both once a step; matrices' in `reduce_dtype`.

    Args:
      loss_fn: run on the examples of one device and part: it may not mix examples.
      batch: arrays [B, ...]; B divisible by devices times `parts`.
      parts: how many times a device runs a share of its examples, one after the other.
    """

    trees = (state.params, state.frozen, state.extra)
    specs = jax.tree.map(lambda sharding: sharding.spec, state_sharding(trees, mesh))
    param_specs = specs[0]

    def split_axis(spec: P) -> int | None:
        return spec.index("fsdp") if "fsdp" in spec else None

    def gather(x: jax.Array, spec: P) -> jax.Array:
        axis = split_axis(spec)
        return x if axis is None else jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True)

    def to_sum(gradient: jax.Array) -> jax.Array:
        return gradient.astype(reduce_dtype if gradient.ndim > 1 else jnp.float32)

    def gathered(param: jax.Array, spec: P, whole: jax.Array) -> jax.Array:
        """`whole`, its gradient led to the slice `param` of this device."""
        axis = split_axis(spec)
        if axis is None:
            return param

        def scatter(_: None, gradient: jax.Array) -> tuple[jax.Array, None]:
            gradient = jax.lax.psum_scatter(
                to_sum(gradient), "fsdp", scatter_dimension=axis, tiled=True
            )
            return gradient.astype(param.dtype), None

        use = jax.custom_vjp(lambda param, whole: whole)
        use.defvjp(lambda param, whole: (whole, None), scatter)
        return use(param, whole)

    def sum_over_devices(gradient: jax.Array, spec: P) -> jax.Array:
        axes = BATCH_AXES if split_axis(spec) is None else ("data",)
        total = to_sum(gradient)
        if math.prod(mesh.shape[axis] for axis in axes) > 1:  # a CPU would copy the sum of one
            total = jax.lax.psum(total, axes)
        return total.astype(jnp.float32) / (parts * mesh.size)

    def on_one_device(trees: Any, batch: Any) -> tuple[Any, Metrics]:
        params = trees[0]
        whole, frozen, extra = jax.tree.map(gather, in_compute_type(trees, compute_dtype), specs)

        def loss_of_part(params: Any, part: Any) -> tuple[jax.Array, Metrics]:
            weights = jax.tree.map(gathered, params, param_specs, whole)
            loss, metrics = loss_fn(merge(weights, frozen), extra, part)
            return loss, {"loss": loss, **metrics}

        grad_fn = jax.grad(loss_of_part, has_aux=True)
        if parts == 1:
            grads, metrics = grad_fn(params, batch)
        else:
            micro_batches = jax.tree.map(
                lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch
            )
            shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micro_batches))
            (grads, metrics), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, grad_fn(params, part)), None),
                jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                micro_batches,
            )
        metrics = jax.tree.map(lambda x: jax.lax.pmean(x, BATCH_AXES) / parts, metrics)
        return jax.tree.map(sum_over_devices, grads, param_specs), metrics

    # Unchecked, a device's gradient stays its own until it is summed here, by hand.
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, P(BATCH_AXES)),
        out_specs=(param_specs, P()),
        check_vma=False,
    )(trees, batch)
