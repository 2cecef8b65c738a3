"""How parameters and optimizer state lie on the mesh: ordered rules on parameter paths."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# First match wins. Optimizer moments and averages carry their parameter's path and follow it.
RULES: tuple[tuple[str, str], ...] = (
    (r"(norm\d?|bias|cls_token|mask_token)", "replicate"),  # small: not worth a collective
    (r".*", "fsdp"),
)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as `params/encoder/blocks/0/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], ways: int) -> P:
    strategy = next(strategy for pattern, strategy in RULES if re.search(pattern, name))
    if strategy == "replicate" or ways == 1:
        return P()
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if not divisible:
        return P()
    axis = max(divisible, key=lambda axis: shape[axis])
    return P(*("fsdp" if i == axis else None for i in range(len(shape))))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of (abstract) `state`.

    `fsdp` splits the largest axis that the mesh's fsdp axis divides; anything else is replicated.
    """
    ways = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path_name(path), leaf.shape, ways)), state
    )


def abstract_state(init: Callable[[], Any], mesh: Mesh) -> Any:
    """What `init` returns, as shapes, types and shardings; nothing is computed."""
    abstract = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        state_sharding(abstract, mesh),
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings of an `abstract_state`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def gather_params(params: Any, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """Collects split parameters for use in a step, matrices already in the compute type.

    Without this the compiler may split the computation the way the parameters are split, which
    on TPU costs several times the gather (see the numbers in `plan`). Gathering in bfloat16
    halves the traffic; the layers cast to it anyway. Does nothing on a mesh without fsdp.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def gather(p: jax.Array) -> jax.Array:
        p = p.astype(dtype) if p.ndim > 1 else p
        return jax.lax.with_sharding_constraint(p, NamedSharding(mesh, P()))

    return jax.tree.map(gather, params)


def bytes_per_device(abstract: Any) -> int:
    """Bytes of an `abstract_state` on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
