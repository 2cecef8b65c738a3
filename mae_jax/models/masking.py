"""Which patches the encoder sees (paper section 3, figure 6).

Every sampler gives each patch of one image a score; the `num_kept` patches with the lowest scores
stay visible. A sampler is a function of (random key, grid, ratio of removed patches) -> [L] scores,
which may be a mask (0 = visible) with noise to break ties; one line in `SAMPLERS` names it. Beside
them there is the kind `FILE`: masks that somebody made before, one of them at random an image.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Masking(NamedTuple):
    """One independent mask per image."""

    ids_keep: jax.Array  # [B, K] int32, visible patches in the order the encoder sees them
    ids_restore: jax.Array  # [B, L] int32, rank of each patch: below K its row in `ids_keep`
    mask: jax.Array  # [B, L] float32, 0 = visible, 1 = removed


def random_scores(key: jax.Array, grid: tuple[int, int], ratio: float) -> jax.Array:
    """Uniform noise: keeping the lowest scores is sampling without replacement."""
    return jax.random.uniform(key, (grid[0] * grid[1],))


MIN_BLOCK = 16  # patches, the area that a rectangle of BEiT is asked to have at least
ATTEMPTS = 10  # rectangles in a row that may not fit, before BEiT ends a mask
LOG_ASPECT = math.log(1 / 0.3)  # aspects are drawn from 0.3 to 1 / 0.3, evenly in the logarithm
# Rectangles drawn for a mask, taken or not. BEiT has no limit; of 1,500 masks each it tried 54 at
# most on 14 x 14 at 75 %, 88 at 95 %, and 128 on 28 x 28 at 95 %.
CANDIDATES = 128


def block_mask(key: jax.Array, grid: tuple[int, int], removed: int) -> jax.Array:
    """BEiT's rectangles [h, w] bool (arXiv 2106.08254, algorithm 1 and its code): at most `removed`
    patches, mostly as many, less where ten rectangles in a row did not fit."""
    h, w = grid
    row, column = jnp.arange(h)[:, None], jnp.arange(w)[None, :]

    def attempt(carry: tuple, draw: jax.Array) -> tuple[tuple, None]:
        mask, failures = carry  # [h, w] bool, int32 in a row
        room = removed - mask.sum()
        area = MIN_BLOCK + draw[0] * (room - MIN_BLOCK)  # a room below 16 turns the range around
        aspect = jnp.exp(LOG_ASPECT * (2 * draw[1] - 1))
        height = jnp.sqrt(area * aspect).round().astype(jnp.int32)
        width = jnp.sqrt(area / aspect).round().astype(jnp.int32)
        top = (draw[2] * (h - height + 1)).astype(jnp.int32)
        left = (draw[3] * (w - width + 1)).astype(jnp.int32)
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        new = (inside & ~mask).sum()
        fits = (height < h) & (width < w) & (new > 0) & (new <= room)
        taken = fits & (failures < ATTEMPTS)
        return (mask | (inside & taken), jnp.where(taken, 0, failures + 1)), None

    draws = jax.random.uniform(key, (CANDIDATES, 4))
    start = jnp.zeros(grid, bool), jnp.zeros((), jnp.int32)
    return jax.lax.scan(attempt, start, draws)[0][0]


def block_scores(key: jax.Array, grid: tuple[int, int], ratio: float) -> jax.Array:
    """`block_mask`, filled up to the exact number with random patches (paper table 1f)."""
    mask_key, fill_key = jax.random.split(key)
    patches = grid[0] * grid[1]
    mask = block_mask(mask_key, grid, patches - num_kept(patches, ratio))
    return mask.ravel() + jax.random.uniform(fill_key, (patches,))


def grid_scores(key: jax.Array, grid: tuple[int, int], ratio: float) -> jax.Array:
    """The upper left one of every 2 x 2 patches stays (paper figure 6): the key is of no use."""
    row, column = jnp.indices(grid)
    return ((row % 2 == 1) | (column % 2 == 1)).ravel().astype(jnp.float32)


Sampler = Callable[[jax.Array, tuple[int, int], float], jax.Array]
SAMPLERS: dict[str, Sampler] = {
    "random": random_scores,
    "block": block_scores,
    "grid": grid_scores,
}
FILE = "file"
KINDS = (*SAMPLERS, FILE)


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


def mask_problems(kind: str, grid: tuple[int, int], ratio: float, unit: int = 1) -> Iterator[str]:
    """Why masks of a `SAMPLERS` kind cannot be drawn on `grid` in squares of `unit` patches."""
    rows, columns = grid
    of = "patches"
    if unit > 1:
        if rows % unit or columns % unit:
            whole = f"a grid of {rows} x {columns} patches"
            yield f"mask.unit: squares of {unit} x {unit} patches do not fill {whole}"
            return
        rows, columns, of = rows // unit, columns // unit, "squares"
    count, squares = rows * columns, f"a grid of {rows} x {columns} {of}"
    if not 0 < ratio < 1 or not 0 < (kept := num_kept(count, ratio)) < count:
        kept = f"keeps {kept} of {count} {of}" if 0 < ratio < 1 else "is not between 0 and 1"
        yield f"mask.ratio = {ratio} {kept}: one at least must stay, and one go"
    if kind == "grid" and (rows % 2 or columns % 2):
        yield f"mask.kind = 'grid' keeps one of every 2 x 2, and {squares} has an odd side"
    if kind == "grid" and ratio != 0.75:
        yield f"mask.kind = 'grid' keeps one of every 2 x 2: mask.ratio is 0.75, not {ratio}"
    if kind == "block" and min(rows, columns) < 5:
        blocks = f"BEiT's blocks take {MIN_BLOCK} or more"
        yield f"mask.kind = 'block': {squares} has no room, {blocks}; 5 x 5 is the least"


@jax.named_scope("masks")
def sample_masking(
    kind: str, keys: jax.Array, grid: tuple[int, int], ratio: float, unit: int = 1
) -> Masking:
    """One mask for each of `keys` [B] by the sampler `kind`, removing the share `ratio`, in squares
    of `unit` x `unit` patches: see `mask_problems` for what cannot be."""
    h, w = grid[0] // unit, grid[1] // unit
    scores = jax.vmap(lambda key: SAMPLERS[kind](key, (h, w), ratio))(keys)  # [B, h * w]
    kept = num_kept(h * w, ratio)
    if unit > 1:
        ranks = masking_from_scores(scores, kept).ids_restore.reshape(-1, h, w)
        scores = ranks.repeat(unit, axis=1).repeat(unit, axis=2).reshape(len(keys), -1)  # [B, L]
    return masking_from_scores(scores, kept * unit**2)


@jax.named_scope("masks")
def choose_masking(keys: jax.Array, masks: np.ndarray) -> Masking:
    """For each of `keys` [B] one of `masks` [n, L] at random (1 = removed, as many in each)."""
    chosen = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(masks)))(keys)  # [B]
    kept = int((masks[0] == 0).sum())
    return masking_from_scores(jnp.asarray(masks, jnp.float32)[chosen], kept)


@jax.named_scope("masks")
def take_tokens(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [B, K] of `tokens` [B, N, D]: [B, K, D]."""
    return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)


@jax.custom_vjp
def scatter_tokens(tokens: jax.Array, masking: Masking) -> jax.Array:
    """The inverse of `take_tokens` by `ids_keep`: [B, K, D] to [B, L, D], each token at its place;
    removed places hold any, and must not be used.

    So that its gradient, too, is a gather: the place of every token is known.
    """
    kept = tokens.shape[1]
    return take_tokens(tokens, jnp.minimum(masking.ids_restore, kept - 1))


scatter_tokens.defvjp(
    lambda tokens, masking: (scatter_tokens(tokens, masking), masking),
    lambda masking, cotangent: (take_tokens(cotangent, masking.ids_keep), None),
)
