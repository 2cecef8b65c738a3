"""Attention as one kernel for TPUs: what lies between its products never leaves the chip.

For the short sequences of ViTs: all tokens of an image and head, up to some 1,000, are one piece.
Left to XLA, the [N, N] weights go to memory and back several times, forwards and backwards. Here
the way back computes them again. Dao et al., arXiv 2205.14135, for the idea.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Heads that are computed side by side: the steps of one wait for each other, those of several fill
# the gaps (v5e, 197 tokens, cycles a head, forwards: 630 one by one, 371 by four, 297 by eight).
SIDE_BY_SIDE = 16
ROUNDS = 4  # at most, of them in one piece of the grid, while the next is read
WORKING_BYTES = 8 << 20  # for the [N, N] arrays of those side by side
VMEM_BYTES = 16 << 20  # what a kernel may use of the chip's memory on all TPUs since v4
TILE = 16, 128  # that the last two axes are padded to


@jax.custom_vjp
def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of arrays [U, head_dim, N], U heads of all images; typed like them.

    Factors of products keep their type, sums and the softmax are float32. Weights are rounded
    before they are normalised: the results are multiplied by what normalises them. Where there is
    no TPU the kernel is interpreted, slowly.
    """
    [out] = run("attention_forward", q, k, v)
    return out


def _gradients(saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(run("attention_backward", *saved, cotangent))


fused.defvjp(lambda *arrays: (fused(*arrays), arrays), _gradients)


def run(name: str, *arrays: jax.Array) -> list[jax.Array]:
    """The kernel of this name on arrays [U, head_dim, N], some of U at a time; arrays like them."""
    kernel, _, results = KERNELS[name]
    units, d, n = arrays[0].shape
    together, rounds = pieces(units, d, n, arrays[0].dtype.itemsize)
    limit = max(VMEM_BYTES, 2 * _working_bytes(n))
    kernel = functools.partial(kernel, together=together)
    return launch(name, kernel, arrays, results, (together * rounds, d, n), limit)


def launch(
    name: str,
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    results: int,
    piece: tuple[int, int, int],
    limit: int = VMEM_BYTES,
) -> list[jax.Array]:
    """So many results, like the arrays [U, rows, lanes], of a kernel that sees a piece of each,
    all rows, and may use so many bytes of the chip's memory."""
    block = pl.BlockSpec(piece, lambda i, j: (i, 0, j))
    units, _, lanes = arrays[0].shape
    call = functools.partial(
        pl.pallas_call,
        kernel,
        grid=(units // piece[0], lanes // piece[2]),
        in_specs=[block] * len(arrays),
        out_specs=[block] * results,
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=limit
        ),
        name=name,
    )
    return jax.lax.platform_dependent(*arrays, tpu=call(), default=call(interpret=True))


def pieces(units: int, d: int, n: int, itemsize: int) -> tuple[int, int]:
    """(heads side by side, rounds of these in a piece of the grid) for `units` of [d, n]."""
    return divided(units, _working_bytes(n), padded(d, n) * itemsize, ROUNDS)


def divided(units: int, working_bytes: int, array_bytes: int, rounds: int) -> tuple[int, int]:
    """(units side by side, rounds of these in a piece of the grid, no more than `rounds`), of
    units that take so many bytes to work on, and so many in each array."""
    together = divisor(units, min(SIDE_BY_SIDE, WORKING_BYTES // working_bytes))
    arrays = 2 * 7 * together * array_bytes  # four in, three out, this piece's and the next one's
    return together, divisor(units // together, min(rounds, (VMEM_BYTES - WORKING_BYTES) // arrays))


def divisor(number: int, most: int) -> int:
    """The largest up to `most`."""
    return max(i for i in range(1, max(1, most) + 1) if number % i == 0)


def _working_bytes(n: int) -> int:
    """That the way back keeps of a head at a time: three arrays [N, N] float32, two rounded."""
    return padded(n, n) * (3 * 4 + 2 * 2)


def padded(rows: int, lanes: int) -> int:
    """Numbers that an array [rows, lanes] has room for in the chip's memory."""
    sizes = zip((rows, lanes), TILE, strict=True)
    return math.prod(math.ceil(size / tile) * tile for size, tile in sizes)


def each(units: int, together: int, work: Callable[[list[Any]], None]) -> None:
    """Calls `work` with the numbers of so many units, until all are done."""

    def step(i: jax.Array, _: None) -> None:
        work([i * together + j for j in range(together)])

    jax.lax.fori_loop(0, units // together, step, None)


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Of matrices, summed over these axes, float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _scaled(x: jax.Array, factor: Any) -> jax.Array:
    """Multiplied in float32, which all chips can."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _weights(q: Any, k: Any, places: list[Any]) -> tuple[list, list, list]:
    """(scaled queries, weights [keys, queries], what normalises them [1, queries]) of each head."""
    queries = [_scaled(q[p], q.shape[1] ** -0.5) for p in places]  # [d, N]
    logits = [product(k[p], x, 0, 0) for p, x in zip(places, queries, strict=True)]
    highest = [jnp.max(x, axis=0, keepdims=True) for x in logits]
    weights = [jnp.exp(x - high) for x, high in zip(logits, highest, strict=True)]
    return queries, weights, [1 / jnp.sum(w, axis=0, keepdims=True) for w in weights]


def _forward(q: Any, k: Any, v: Any, out: Any, *, together: int) -> None:
    def work(places: list[Any]) -> None:
        _, weights, shares = _weights(q, k, places)
        sums = [
            product(v[p], w.astype(v.dtype), 1, 0) for p, w in zip(places, weights, strict=True)
        ]
        for p, x, share in zip(places, sums, shares, strict=True):
            out[p] = (x * share).astype(out.dtype)

    each(len(q), together, work)


def _backward(
    q: Any, k: Any, v: Any, given: Any, dq: Any, dk: Any, dv: Any, *, together: int
) -> None:
    """Gradients by queries, keys and values, `given` that by the result."""

    def work(places: list[Any]) -> None:
        queries, weights, shares = _weights(q, k, places)
        by_weights = [product(v[p], given[p], 0, 0) for p in places]  # [keys, queries]
        by_values = [
            product(_scaled(given[p], share), w.astype(v.dtype), 1, 1)
            for p, w, share in zip(places, weights, shares, strict=True)
        ]
        # Through the softmax: less the mean, by the weights, over the keys.
        by_logits = []
        for w, change, share in zip(weights, by_weights, shares, strict=True):
            mean = jnp.sum(w * change, axis=0, keepdims=True) * share
            by_logits.append((w * (change - mean)).astype(q.dtype))
        by_queries = [product(k[p], x, 1, 0) for p, x in zip(places, by_logits, strict=True)]
        by_keys = [
            product(_scaled(x, share), change, 1, 1)
            for x, share, change in zip(queries, shares, by_logits, strict=True)
        ]
        for i, p in enumerate(places):
            dq[p] = (by_queries[i] * (shares[i] * q.shape[1] ** -0.5)).astype(dq.dtype)
            dk[p] = by_keys[i].astype(dk.dtype)
            dv[p] = by_values[i].astype(dv.dtype)

    each(len(q), together, work)


# By name: what they do, the arrays they take and those they give.
KERNELS = {"attention_forward": (_forward, 3, 1), "attention_backward": (_backward, 4, 3)}
