"""Which patches the encoder sees (paper section 3, figure 6).

Every sampler gives each patch of one image a score; the `num_kept` patches with the lowest scores
stay visible. A sampler is a function of (random key, grid, ratio of removed patches) -> [L] scores,
which may be a mask (0 = visible) with noise to break ties; one line in `SAMPLERS` names it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Masking(NamedTuple):
    """One independent mask per image."""

    ids_keep: jax.Array  # [B, K] int32, visible patches in the order the encoder sees them
    ids_restore: jax.Array  # [B, L] int32, rank of each patch: below K its row in `ids_keep`
    mask: jax.Array  # [B, L] float32, 0 = visible, 1 = removed


def random_scores(key: jax.Array, grid: tuple[int, int], ratio: float) -> jax.Array:
    """Uniform noise: keeping the lowest scores is sampling without replacement."""
    return jax.random.uniform(key, (grid[0] * grid[1],))


Sampler = Callable[[jax.Array, tuple[int, int], float], jax.Array]
SAMPLERS: dict[str, Sampler] = {"random": random_scores}


def num_kept(num_patches: int, ratio: float) -> int:
    """Patches that stay visible: `int(L * (1 - ratio))` in floats, as in the reference, rounding
    error of `1 - ratio` included: (200, 0.8) keeps 39, not 40."""
    return int(num_patches * (1 - ratio))


def masking_from_scores(scores: jax.Array, kept: int) -> Masking:
    """Keeps the `kept` lowest of `scores` [B, L] in each image."""
    ids_shuffle = jnp.argsort(scores, axis=1)  # [B, L]
    ids_restore = jnp.argsort(ids_shuffle, axis=1)  # [B, L]
    mask = (ids_restore >= kept).astype(jnp.float32)
    return Masking(ids_shuffle[:, :kept], ids_restore, mask)


@jax.named_scope("masks")
def sample_masking(kind: str, keys: jax.Array, grid: tuple[int, int], ratio: float) -> Masking:
    """One mask for each of `keys` [B] by the sampler `kind`, removing the share `ratio`."""
    scores = jax.vmap(lambda key: SAMPLERS[kind](key, grid, ratio))(keys)  # [B, L]
    return masking_from_scores(scores, num_kept(grid[0] * grid[1], ratio))


@jax.named_scope("masks")
def take_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [B, K] of `tokens` [B, N, D]: [B, K, D]."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)
