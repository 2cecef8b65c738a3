"""How parameters and optimizer state lie on the mesh, by their paths."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax.distributed.mesh import replicated

# Small, not worth a collective. Optimizer moments and averages carry their parameter's path.
REPLICATED = r"norm|bias|cls_token|mask_token|layer_scale"
# What layers multiply in the compute type; the head of a classifier (head/kernel) is not among
# them, those of a segmenter (head/fuse/kernel) are.
CAST_BY_LAYERS = r"(blocks/.+|embed|pred|(pyramid|head|auxiliary)/.+)/kernel$"


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as `params/encoder/blocks/0/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], ways: int) -> P:
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not divisible or re.search(REPLICATED, name):
        return P()
    axis = max(divisible, key=lambda axis: shape[axis])
    return P(*("fsdp" if i == axis else None for i in range(len(shape))))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """NamedShardings of (abstract) `state`: fsdp splits the largest axis it divides, or none."""
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


def in_compute_type(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters, those matrices in `dtype` that their layers cast to it anyway."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.astype(dtype) if re.search(CAST_BY_LAYERS, path_name(path)) else p, params
    )


def gather_params(params: Any, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """Collects split parameters for use in a program that the compiler lays out.

    Without this it may split the computation the way the parameters are split, which on TPU costs
    several times the gather (see the numbers in `plan`). Does nothing on a mesh without fsdp.
    """
    if mesh.shape["fsdp"] == 1:
        return params
    return jax.lax.with_sharding_constraint(in_compute_type(params, dtype), replicated(mesh))


def bytes_per_device(abstract: Any) -> int:
    """Bytes of an `abstract_state` on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )
