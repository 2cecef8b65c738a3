"""The Vision Transformer of MAE, as plain maths on arrays (paper appendix A.1)."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.attention import attention, is_stacked, stacked_attention
from mae_jax.models.gelu import gelu
from mae_jax.models.masking import take_tokens
from mae_jax.models.patches import patchify


class Shape(NamedTuple):
    width: int
    depth: int
    heads: int


VARIANTS = {
    "ti": Shape(192, 12, 3),
    "s": Shape(384, 12, 6),
    "b": Shape(768, 12, 12),
    "l": Shape(1024, 24, 16),
    "h": Shape(1280, 32, 16),
}

MLP_RATIO = 4
LAYER_NORM_EPS = 1e-6

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def sincos_position_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Fixed 2-D sine-cosine positions with a zero row for the class token: [1 + L, D] float32.

    Channels are [sin(column), cos(column), sin(row), cos(row)], a quarter of the width each, with
    frequencies 10000^(-i / (D/4)). Computed in float64.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {width}")
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = (x.reshape(-1, 1) * frequencies for x in np.indices(grid))  # [L, D/4] each
    table = np.hstack([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)])
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, contracted: int = 1) -> jax.Array:
    """The last `contracted` dimensions of x summed with the first of kernel, the result in `dtype`
    (float32: the sums of a bfloat16 product).

    The cotangent is rounded to the type of x, so that backwards too all factors are bfloat16.
    CPUs multiply plain matrices backwards: they would transpose the factors of anything else first.
    """
    last = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=(last, ((), ())))
    forward = functools.partial(dot, preferred_element_type=dtype)

    def in_shape(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple:
        return jax.vjp(dot, x, kernel)[1](cotangent)

    def as_matrices(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple:
        matrix = kernel.reshape(math.prod(kernel.shape[:contracted]), -1)  # [in, out]
        rows, changes = x.reshape(-1, len(matrix)), cotangent.reshape(-1, matrix.shape[1])
        return (changes @ matrix.T).reshape(x.shape), (rows.T @ changes).reshape(kernel.shape)

    def backward(saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        arrays = *saved, cotangent.astype(saved[0].dtype)
        return jax.lax.platform_dependent(*arrays, cpu=as_matrices, default=in_shape)

    with_gradients = jax.custom_vjp(forward)
    with_gradients.defvjp(lambda *factors: (forward(*factors), factors), backward)
    return with_gradients(x, kernel)


class Linear(nn.Module):
    """The weight [in, out] and bias [out] of a linear layer, as the reference initialises them."""

    features: int
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.xavier_uniform()
        kernel = self.param("kernel", init, (inputs, self.features))
        return kernel, self.param("bias", self.bias_init, (self.features,))


def dense(
    x: jax.Array,
    features: int,
    dtype: jnp.dtype,
    name: str,
    result: jnp.dtype | None = None,
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> jax.Array:
    """A linear layer, its factors in `dtype`, its sums and what it returns in `result`."""
    result = result or dtype
    kernel, bias = Linear(features, bias_init, name=name)(x.shape[-1])
    return product(x.astype(dtype), kernel.astype(dtype), result) + bias.astype(result)


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """Layer norm with eps 1e-6; statistics in float32 and by the two-pass formula."""
    return nn.LayerNorm(epsilon=LAYER_NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


def relative_bias(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """What attention of each pair of tokens of a grid [H, W] gets added: [heads, 1 + L, 1 + L].

    The table [(2H-1)(2W-1) + 3, heads] is BEiT's (arXiv 2106.08254): row (dy + H - 1) (2W - 1) +
    (dx + W - 1) for a query dy rows below and dx columns right of its key; the last three are of
    the class token as query, as key, and as both.

    The biases of a query are one slice of those by distance, once columns are sorted: no gather,
    whose gradient would be a scatter of L^2 rows, and long rows, which accelerators do not pad.
    """
    (h, w), heads = grid, table.shape[1]
    x = table[:-3].reshape(2 * h - 1, 2 * w - 1, heads)[::-1, ::-1]  # by key minus query
    x = x.transpose(2, 0, 1)  # [heads, 2H-1, 2W-1]
    x = jnp.stack([x[:, :, w - 1 - i : 2 * w - 1 - i] for i in range(w)], axis=1)
    x = x.reshape(heads, w, (2 * h - 1) * w)  # by column of the query; distance in rows and column
    x = jnp.stack([x[:, :, (h - 1 - i) * w : (2 * h - 1 - i) * w] for i in range(h)], axis=1)
    x = x.reshape(heads, h * w, h * w)
    as_query, as_key, as_both = (table[i][:, None, None] for i in (-3, -2, -1))
    as_query = jnp.broadcast_to(as_query, (heads, 1, h * w))
    as_key = jnp.broadcast_to(as_key, (heads, h * w, 1))
    first = jnp.concatenate([as_both, as_query], axis=2)  # [heads, 1, 1 + L]
    return jnp.concatenate([first, jnp.concatenate([as_key, x], axis=2)], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention, its parameters those of one fused query-key-value projection.

    Fused, because Xavier on [D, 3D] draws weights sqrt(2) smaller than on [D, D]. Multiplied one
    head layout at a time, because splitting a [B, N, 3D] product costs the TPU copies: 13 % of the
    estimated cycles of a ViT-L step (v5e, `mae_jax.plan`).
    """

    heads: int
    dtype: jnp.dtype
    result: jnp.dtype
    bias_grid: tuple[int, int] | None = None  # of the tokens, where there are relative biases
    attention: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        tokens, d = x.shape[-2:]
        head_dim = d // self.heads
        stacked = not self.bias_grid and is_stacked(self.attention, tokens, d, self.heads)
        shape = (d,) if stacked else (self.heads, head_dim)
        kernel, bias = Linear(3 * d, name="qkv")(d)
        kernel = kernel.astype(self.dtype).reshape(d, 3, *shape)
        bias = bias.astype(self.dtype).reshape(3, *shape)
        q, k, v = (product(x, kernel[:, i], self.dtype) + bias[i] for i in range(3))
        relative = None
        if self.bias_grid:
            h, w = self.bias_grid
            rows = (2 * h - 1) * (2 * w - 1) + 3
            table = self.param("relative_bias", nn.initializers.zeros, (rows, self.heads))
            relative = relative_bias(jnp.asarray(table, jnp.float32), self.bias_grid)
        # [B, N, heads, head_dim] each, or [B, N, D], whichever way tokens are grouped
        q, k, v = (y.reshape(-1, tokens, *shape) for y in (q, k, v))
        if stacked:
            y = stacked_attention(q, k, v, head_dim)
        else:
            y = attention(q, k, v, relative, self.attention)
        kernel, bias = Linear(d, name="proj")(d)
        kernel = kernel.astype(self.dtype).reshape(*shape, d)
        y = product(y.reshape(*x.shape[:-1], *shape), kernel, self.result, contracted=len(shape))
        return y + bias.astype(self.result)  # [B, N, D]


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    dtype: jnp.dtype
    result: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        x = gelu(dense(x, MLP_RATIO * d, self.dtype, "fc1"))  # [B, N, 4D]
        return dense(x, d, self.dtype, "fc2", self.result)


def drop_path_scale(keys: jax.Array, depth: int, rate: float) -> jax.Array:
    """What stochastic depth multiplies the residual branches with, for examples of `keys` [B].

    [depth, 2, B] float32: 0 for a dropped branch (attention, MLP), else 1 / (1 - its rate), which
    rises evenly from 0 in the first block to `rate` in the last.
    """
    keep = 1.0 - jnp.linspace(0.0, rate, depth)[:, None]  # [depth, 1]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)  # [B, depth, 2]
    return jnp.moveaxis((uniform < keep) / keep, 0, 2)


class Block(nn.Module):
    """Pre-norm transformer block; `path_scale` [2, B] multiplies what its two branches, computed in
    `dtype`, add to x, and so do the layer scales [D] where it has them; the sum keeps the type of
    x."""

    heads: int
    dtype: jnp.dtype
    bias_grid: tuple[int, int] | None = None
    layer_scale: bool = False
    attention: str = "plain"

    @nn.compact
    def __call__(self, x: jax.Array, path_scale: jax.Array | None = None) -> jax.Array:
        def add(x: jax.Array, y: jax.Array, branch: int) -> jax.Array:
            if self.layer_scale:
                shape = (x.shape[-1],)
                y = y * self.param(f"layer_scale{branch + 1}", nn.initializers.ones, shape)
            if path_scale is not None:  # float32: the product is rounded, not the factor
                y = y * path_scale[branch][..., None, None]
            return x + y.astype(x.dtype)

        y = layer_norm(self.dtype, "norm1")(x)
        how = (self.dtype, x.dtype, self.bias_grid, self.attention)
        attn = Attention(self.heads, *how, name="attn")
        x = add(x, attn(y), 0)
        y = layer_norm(self.dtype, "norm2")(x)
        return add(x, Mlp(self.dtype, x.dtype, name="mlp")(y), 1)


def group(images: int, tokens: int) -> tuple[int, ...]:
    """A shape for the axis of `images`: (images,), or groups of fewer images than tokens.

    TPUs pad the last two axes of an array in memory. Their compiler lays out [B, N, D] with B
    before D where B is larger than N, which pads less, and then copies what attention reads, which
    wants N there: in groups an encoder of 50 tokens takes 5 to 9 % less time (64 images, ViT-B on
    v5e, L on v4 and v6e, by `mae_jax.plan`) and keeps 12 % more. A kernel that reads [B, N, D] has
    the same effect, and is better off without groups.
    """
    size = max((i for i in range(8, tokens) if images % i == 0), default=0)
    return (images // size, size) if size and tokens < images < size * tokens else (images,)


class Blocks(nn.Module):
    """A stack of blocks with parameters `0`, `1`, ... whichever way the stack is computed.

    Attributes:
      stacking: `unrolled` compiles every block by itself (fastest); `scan` compiles one block and
        loops: compiles 1.6 times as fast, and copies parameters. Same parameters and numbers.
      remat: what the backward pass recomputes: nothing, `dots` all but the results of matrix
        products with weights, `full` everything inside a block.
      frozen: so many blocks at the start get no gradients and drop no paths.
      bias_grid: height and width of the tokens, where blocks have relative position biases.
      layer_scale: whether blocks scale their branches by learnt vectors.
      taps: blocks, counted from 0, whose outputs are returned in place of the last one's.
      attention: one of `ATTENTION`.
      local: all examples are on one device; they may be grouped, see `group`.
    """

    depth: int
    heads: int
    dtype: jnp.dtype
    stacking: str = "unrolled"
    remat: str = "none"
    frozen: int = 0
    bias_grid: tuple[int, int] | None = None
    layer_scale: bool = False
    taps: tuple[int, ...] = ()
    attention: str = "plain"
    local: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, path_scale: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, ...]:
        """Runs x [B, N, D] through the stack; `path_scale` as `drop_path_scale` gives it. With
        `taps` the tokens [B, N, D] after each of these."""
        how = (self.heads, self.dtype, self.bias_grid, self.layer_scale, self.attention)
        seen, shape = {}, x.shape  # blocks done -> tokens
        if self.local and not is_stacked(self.attention, *x.shape[1:], self.heads):
            groups = group(*x.shape[:2])
            x = x.reshape(*groups, *x.shape[1:])
            if path_scale is not None:
                path_scale = path_scale.reshape(*path_scale.shape[:2], *groups)
        if self.is_initializing():
            for i in range(self.depth):
                seen[i + 1] = x = Block(*how, name=str(i))(x)
        else:
            params = [self.variables["params"][str(i)] for i in range(self.depth)]
            block, done = Block(*how, parent=None), 0
            for stop in sorted({self.frozen, self.depth, *(tap + 1 for tap in self.taps)} - {0}):
                part = params[done:stop]
                if stop <= self.frozen:
                    x = jax.lax.stop_gradient(self._run(block, x, part, None, "none"))
                else:
                    scale = None if path_scale is None else path_scale[done:stop]
                    x = self._run(block, x, part, scale, self.remat)
                seen[stop], done = x, stop
        if self.taps:
            return tuple(seen[tap + 1].reshape(shape) for tap in self.taps)
        return x.reshape(shape)

    def _run(
        self,
        block: Block,
        x: jax.Array,
        params: list[dict],
        path_scale: jax.Array | None,
        remat: str,
    ) -> jax.Array:
        def run(x: jax.Array, params: dict, path_scale: jax.Array | None) -> jax.Array:
            return block.apply({"params": params}, x, path_scale)

        if remat != "none":
            # Outside a loop the compiler would merge what is computed again with the first time.
            prevent_cse = self.stacking == "unrolled"
            run = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=prevent_cse)
        if self.stacking == "unrolled":
            run = jax.jit(run, inline=True)  # traced once for all; the program is the same
            for i, p in enumerate(params):
                x = run(x, p, None if path_scale is None else path_scale[i])
            return x

        # Matrices are used in the compute type anyway; stacking them in it halves the copy.
        def stack(path: tuple, *leaves: jax.Array) -> jax.Array:
            cast = path[-1].key == "kernel"
            return jnp.stack([p.astype(self.dtype) if cast else p for p in leaves])

        stacked = jax.tree_util.tree_map_with_path(stack, *params)
        x, _ = jax.lax.scan(lambda x, xs: (run(x, *xs), None), x, (stacked, path_scale))
        return x


class ViT(nn.Module):
    """The encoder: images in, tokens out."""

    image_size: tuple[int, int]  # height and width in pixels, each divisible by `patch_size`
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype = jnp.float32  # of matrix products; parameters, softmax, norms are float32
    residual_dtype: jnp.dtype = jnp.float32  # of tokens between blocks and of what is returned
    stacking: str = "unrolled"
    remat: str = "none"
    position_params: bool = False  # positions are a parameter that starts as the sine-cosine table
    final_norm: bool = True  # False leaves the last layer norm to whoever pools the tokens
    frozen_blocks: int = 0
    # What BEiT adds (arXiv 2106.08254), for dense tasks; as initialised they change no number.
    relative_bias: bool = False  # each block has a table of biases by the distance of two patches
    layer_scale: bool = False  # each block has factors of its branches, one a channel
    taps: tuple[int, ...] = ()  # blocks, from 0, whose outputs are wanted, instead of the last's
    attention: str = "plain"  # one of `ATTENTION`
    local: bool = False  # all examples are on one device, as inside `shard_map`

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        ids_keep: jax.Array | None = None,
        path_scale: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """Tokens [B, 1 + K, D] in the residual type, the class token first; with `taps` those after
        each of these blocks, without the final norm.

        Images are [B, H, W, C] float, normalised; `ids_keep` [B, K] the patches to encode (None:
        all L in order); `path_scale` [depth, 2, B] is `drop_path_scale`'s (None drops nothing);
        `mask` [B, L] is 1 where the learnt token stands in for the patch's embedding, before
        positions are added, as in BEiT and SimMIM: it must know where it stands.
        """
        expected = (*self.image_size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {images.shape[1:]}, the model takes {expected} (H, W, C)")
        if self.relative_bias and ids_keep is not None:
            raise ValueError("relative biases are of whole images, not of some of their patches")
        positions = sincos_position_table(self.width, self.grid)  # [1 + L, D]
        if self.position_params:
            positions = self.param("pos_embed", lambda _: jnp.asarray(positions)[None])[0]
        positions = jnp.asarray(positions, self.residual_dtype)  # parameters may be numpy's

        x, positions_of = patchify(images, self.patch_size), positions[1:]  # [B, L, p*p*C], [L, D]
        if ids_keep is not None:  # before they are embedded: nothing is computed for the others
            x, positions_of = take_tokens(x, ids_keep), positions_of[ids_keep]  # [B, K, p*p*C or D]
        # The reference leaves its patch convolution's bias at the default of torch.
        bound = x.shape[-1] ** -0.5
        bias_init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        x = dense(x, self.width, self.dtype, "patch_embed", self.residual_dtype, bias_init)
        if mask is not None:
            token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
            x = jnp.where(mask[:, :, None] > 0, token.astype(self.residual_dtype), x)
        x = x + positions_of  # [B, K, D]
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls = cls.astype(self.residual_dtype) + positions[0]
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, x], axis=1)  # [B, 1 + K, D]
        how = (self.dtype, self.stacking, self.remat, self.frozen_blocks)
        how += (self.grid if self.relative_bias else None, self.layer_scale, self.taps)
        how += (self.attention, self.local)
        x = Blocks(self.depth, self.heads, *how, name="blocks")(x, path_scale)
        with_norm = self.final_norm and not self.taps
        return layer_norm(self.residual_dtype, "norm")(x) if with_norm else x
