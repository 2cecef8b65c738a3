"""UperNet on the tokens of a plain ViT: pyramid, head and auxiliary head (arXiv 1807.10221).

As the MAE paper uses it for ADE20K (appendix A.4): BEiT's feature pyramid, and heads of the widths
and losses of mmsegmentation. Sizes are those of a patch size of 16: its maps have strides 4, 8, 16
and 32; patches of p pixels give p/4, p/2, p and 2p.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.models.gelu import gelu
from mae_jax.models.vit import product

BATCH_NORM_EPS = 1e-5
POOL_SIZES = (1, 2, 3, 6)  # of pyramid pooling, cells a side
AUXILIARY_WIDTH = 256

# What mmsegmentation draws: convolutions before a batch norm by Kaiming's rule on the outputs,
# classifiers from N(0, 0.01). The pyramid's keep PyTorch's default, uniform within 1 / sqrt(4 D).
CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
CLASSIFIER_INIT = nn.initializers.normal(0.01)
UP_INIT = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


class How(NamedTuple):
    """How the heads are computed."""

    dtype: jnp.dtype  # of products and of maps; parameters and statistics are float32
    training: bool  # statistics of the batch and dropout, or running statistics and none
    axis_names: tuple[str, ...]  # of the devices that hold the batch, inside `shard_map`
    dropout: float


def bilinear_matrix(size: int, new_size: int) -> np.ndarray:
    """Linear interpolation of `size` values at `new_size` points: [new_size, size] float32.

    As PyTorch's with align_corners=False: pixels are areas, ends are repeated, and shrinking takes
    the two nearest values, without antialiasing.
    """
    x = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    nearness = 1 - np.abs(x[:, None] - np.arange(size))
    return np.maximum(nearness, 0).astype(np.float32)


def pooling_matrix(size: int, cells: int) -> np.ndarray:
    """Means of `size` values over `cells` spans of any length: [cells, size] float32. Span i goes
    from floor(i size / cells) to ceil((i + 1) size / cells): neighbours may share a value."""
    i, position = np.arange(cells)[:, None], np.arange(size)
    inside = (position >= i * size // cells) & (position < -(-(i + 1) * size // cells))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def by_matrices(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """x [..., H, W, C] with rows [H', H] and columns [W', W] applied: [..., H', W', C]."""
    multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = multiply("Hh,...hwc->...Hwc", jnp.asarray(rows, x.dtype), x)
    return multiply("Ww,...hwc->...hWc", jnp.asarray(columns, x.dtype), x)


def resize(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Maps [..., H, W, C] by bilinear interpolation at another height and width."""
    if x.shape[-3:-1] == tuple(size):
        return x
    h, w = x.shape[-3:-1]
    return by_matrices(x, bilinear_matrix(h, size[0]), bilinear_matrix(w, size[1]))


class BatchNorm(nn.Module):
    """Batch norm of x [B, H, W, C] over the examples of all devices; what is returned has its type.

    In training it normalises with the statistics of the batch and writes these, the variance
    unbiased, into the collection `batch`; it is the caller who moves the running ones (collection
    `statistics`, of the same tree), which evaluation uses.
    """

    how: How

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        names, dtype = self.how.axis_names, x.dtype
        x = x.astype(jnp.float32)

        def mean_of(values: jax.Array) -> jax.Array:
            mean = values.mean(axis=(0, 1, 2))  # [C]
            return jax.lax.pmean(mean, names) if names else mean

        if self.how.training:
            mean = mean_of(x)
            var = mean_of(jnp.square(x - mean))
            count = x.size // x.shape[-1] * (jax.lax.axis_size(names) if names else 1)
            if self.is_mutable_collection("batch"):
                self.put_variable("batch", "mean", mean)
                self.put_variable("batch", "var", var * (count / max(count - 1, 1)))
        else:
            mean = self.variable("statistics", "mean", jnp.zeros, x.shape[-1:]).value
            var = self.variable("statistics", "var", jnp.ones, x.shape[-1:]).value
        return ((x - mean) * (jax.lax.rsqrt(var + BATCH_NORM_EPS) * scale) + bias).astype(dtype)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU; the size of the map stays."""

    features: int
    size: int  # of the kernel
    how: How

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", CONV_INIT, (self.size, self.size, x.shape[-1], self.features))
        x, kernel = x.astype(self.how.dtype), kernel.astype(self.how.dtype)
        form = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=form)
        return jax.nn.relu(BatchNorm(self.how, name="norm")(x))


class Up(nn.Module):
    """Transposed convolution 2 x 2 with stride 2, which is a linear layer to four pixels: maps
    [B, H, W, D] -> [B, 2H, 2W, D]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, d = x.shape
        kernel = self.param("kernel", UP_INIT, (2, 2, d, d))  # row, column, in, out
        bound = (4 * d) ** -0.5
        init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        bias = self.param("bias", init, (d,))
        kernel = kernel.astype(self.dtype).transpose(2, 0, 1, 3)  # [D, 2, 2, D]
        x = product(x.astype(self.dtype), kernel, self.dtype)  # [B, H, W, 2, 2, D]
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, d)
        return x + bias.astype(self.dtype)


class Pyramid(nn.Module):
    """Four maps of one stride [B, h, w, D] -> maps of strides 4, 8, 16 and 32, D channels each."""

    how: How

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        first, second, third, fourth = maps
        x = Up(self.how.dtype, name="up4a")(first)  # [B, 2h, 2w, D]
        x = gelu(BatchNorm(self.how, name="norm")(x))
        return [
            Up(self.how.dtype, name="up4b")(x),  # [B, 4h, 4w, D]
            Up(self.how.dtype, name="up2")(second),  # [B, 2h, 2w, D]
            third,  # [B, h, w, D]
            nn.max_pool(fourth, (2, 2), (2, 2)),  # [B, h // 2, w // 2, D]
        ]


class Classify(nn.Module):
    """Dropout of whole channels, then logits [B, H, W, K] float32 of maps [B, H, W, C]; `keys` [B],
    one an example, are None in evaluation."""

    classes: int
    how: How

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        dtype, keep = self.how.dtype, 1.0 - self.how.dropout
        if keys is not None and keep < 1:
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[-1:]))(keys)
            x = jnp.where(kept[:, None, None], x / keep, 0)  # kept is [B, C]
        kernel = self.param("kernel", CLASSIFIER_INIT, (x.shape[-1], self.classes))
        bias = self.param("bias", nn.initializers.zeros, (self.classes,))
        return product(x.astype(dtype), kernel.astype(dtype), jnp.float32) + bias


class UPerHead(nn.Module):
    """Maps of strides 4, 8, 16, 32 -> logits of stride 4: pyramid pooling on the coarsest, then
    each finer one plus the coarser, all fused."""

    classes: int
    width: int
    how: How

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], keys: jax.Array | None) -> jax.Array:
        def conv(x: jax.Array, size: int, name: str) -> jax.Array:
            return ConvNorm(self.width, size, self.how, name=name)(x)

        *finer, coarsest = maps
        size = coarsest.shape[1:3]
        context = [coarsest]
        for cells in POOL_SIZES:
            rows, columns = (pooling_matrix(length, cells) for length in size)
            pooled = by_matrices(coarsest.astype(jnp.float32), rows, columns)  # [B, s, s, D]
            context.append(resize(conv(pooled, 1, f"pool{cells}"), size))
        x = conv(jnp.concatenate(context, axis=-1), 3, "context")  # [B, h/2, w/2, C]

        levels = [x]  # the finest first
        for i, level in reversed(list(enumerate(finer))):
            x = conv(level, 1, f"lateral{i}") + resize(x, level.shape[1:3])
            levels.insert(0, x)
        outputs = [conv(level, 3, f"smooth{i}") for i, level in enumerate(levels[:-1])]
        size = outputs[0].shape[1:3]
        x = jnp.concatenate([resize(x, size) for x in (*outputs, levels[-1])], axis=-1)
        x = conv(x, 3, "fuse")  # [B, 4h, 4w, 4C] -> [B, 4h, 4w, C]
        return Classify(self.classes, self.how, name="classifier")(x, keys)


class FCNHead(nn.Module):
    """A map of stride 16 -> logits of stride 16, which help to train what lies below."""

    classes: int
    how: How

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        x = ConvNorm(AUXILIARY_WIDTH, 3, self.how, name="conv")(x)  # [B, h, w, 256]
        return Classify(self.classes, self.how, name="classifier")(x, keys)
