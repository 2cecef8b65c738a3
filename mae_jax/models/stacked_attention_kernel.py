"""Attention of the few tokens that a MAE's encoder sees as one kernel for TPUs.

[N, N] of one head would leave most of a register empty, and XLA copies queries, keys and values of
heads smaller than 128 lanes into another order of axes. Here all are read as the projections write
them, [B, N, D], heads side by side, and those that share 128 lanes are stacked: each one's queries,
with zeros in the lanes of the others, one below the other. Their products with the keys of all are
the logits of each, [keys, queries of all]; gradients by keys and values come out side by side.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.models.attention_kernel import TILE, divided, each, launch, padded, product

ROWS, LANES = TILE
# Of images computed side by side the steps of one fill the gaps of others (v5e, 50 tokens, cycles
# a head, forwards and backwards: 229 by four, 150 by eight, 120 by sixteen, 114 by 32).
ROUNDS = 2  # of them in one piece of the grid, while the next is read


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused(q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int) -> jax.Array:
    """Softmax attention of arrays [B, N, D], heads side by side; typed like them.

    Factors of products keep their type, sums and the softmax are float32. Where there is no TPU
    the kernel is interpreted, slowly.
    """
    [out] = run("stacked_attention_forward", head_dim, q, k, v)
    return out


def _gradients(head_dim: int, saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(run("stacked_attention_backward", head_dim, *saved, cotangent))


fused.defvjp(lambda q, k, v, head_dim: (fused(q, k, v, head_dim), (q, k, v)), _gradients)


def run(name: str, head_dim: int, *arrays: jax.Array) -> list[jax.Array]:
    """The kernel of this name, to which that of the compiled one adds `head_dim`, on arrays
    [B, N, D], some images and 128 lanes at a time; arrays like them."""
    kernel, _, results = KERNELS[name]
    images, tokens, _ = arrays[0].shape
    together, rounds = pieces(images, tokens, head_dim, arrays[0].dtype.itemsize)
    kernel = functools.partial(kernel, head_dim=head_dim, together=together)
    piece = together * rounds, tokens, LANES
    return launch(f"{name}_{head_dim}", kernel, arrays, results, piece)


def pieces(images: int, tokens: int, head_dim: int, itemsize: int) -> tuple[int, int]:
    """(images side by side, rounds of these in a piece of the grid)."""
    rows = tokens + -tokens % ROWS
    queries = LANES // head_dim * rows  # of all heads
    working = padded(tokens, queries) * (3 * 4 + 2 * 2)  # [keys, queries]: 3 float32, 2 rounded
    return divided(images, working, padded(tokens, LANES) * itemsize, ROUNDS)


def _own_lanes(head_dim: int) -> list[jax.Array]:
    """The lanes of each head, [1, LANES]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return [(lane >= i) & (lane < i + head_dim) for i in range(0, LANES, head_dim)]


def _stacked(x: jax.Array, own: list[jax.Array], factor: float = 1.0) -> jax.Array:
    """[N, LANES] times a factor, zero but for a head's own lanes, for one head below the other:
    [heads * rows, LANES]."""
    rows = x.astype(jnp.float32) * factor  # which all chips can
    if missing := -len(x) % ROWS:
        rows = jnp.concatenate([rows, jnp.zeros((missing, LANES), jnp.float32)])
    return jnp.concatenate([jnp.where(lanes, rows, 0.0).astype(x.dtype) for lanes in own])


def _side_by_side(x: jax.Array, own: list[jax.Array], tokens: int) -> jax.Array:
    """Of [heads * rows, LANES] the own lanes of each head: [N, LANES]."""
    first, *others = (part[:tokens] for part in jnp.split(x, len(own)))
    for part, lanes in zip(others, own[1:], strict=True):
        first = jnp.where(lanes, part, first)
    return first


def _weights(keys: jax.Array, queries: jax.Array) -> jax.Array:
    """[keys, queries of all heads]: the softmax over the keys, float32."""
    logits = product(keys, queries, 1, 1)
    weights = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return weights * (1 / jnp.sum(weights, axis=0, keepdims=True))


def _forward(q: Any, k: Any, v: Any, out: Any, *, head_dim: int, together: int) -> None:
    own = _own_lanes(head_dim)

    def work(images: list[Any]) -> None:
        queries = [_stacked(q[i], own, head_dim**-0.5) for i in images]
        weights = [_weights(k[i], x).astype(v.dtype) for i, x in zip(images, queries, strict=True)]
        for i, w in zip(images, weights, strict=True):
            result = product(w, v[i], 0, 0)
            out[i] = _side_by_side(result, own, q.shape[1]).astype(out.dtype)

    each(len(q), together, work)


def _backward(
    q: Any, k: Any, v: Any, given: Any, dq: Any, dk: Any, dv: Any, *, head_dim: int, together: int
) -> None:
    """Gradients by queries, keys and values, `given` that by the result."""
    own, scale = _own_lanes(head_dim), head_dim**-0.5

    def work(images: list[Any]) -> None:
        queries = [_stacked(q[i], own, scale) for i in images]
        changes = [_stacked(given[i], own) for i in images]
        weights = [_weights(k[i], x) for i, x in zip(images, queries, strict=True)]
        by_weights = [product(v[i], x, 1, 1) for i, x in zip(images, changes, strict=True)]
        # Through the softmax: less the mean, by the weights, over the keys.
        by_logits = [
            (w * (x - jnp.sum(w * x, axis=0, keepdims=True))).astype(q.dtype)
            for w, x in zip(weights, by_weights, strict=True)
        ]
        for j, i in enumerate(images):
            by_query = product(by_logits[j], k[i], 0, 0) * scale
            dq[i] = _side_by_side(by_query, own, q.shape[1]).astype(dq.dtype)
            dk[i] = product(by_logits[j], queries[j], 1, 0).astype(dk.dtype)
            dv[i] = product(weights[j].astype(v.dtype), changes[j], 1, 0).astype(dv.dtype)

    each(len(q), together, work)


# By name: what they do, the arrays they take and those they give.
KERNELS = {
    "stacked_attention_forward": (_forward, 3, 1),
    "stacked_attention_backward": (_backward, 4, 3),
}
