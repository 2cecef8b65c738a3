"""Semantic segmentation: the encoder with UperNet (MAE paper section 5, appendix A.4)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.upernet import FCNHead, How, Pyramid, UPerHead, resize
from mae_jax.models.vit import ViT

AUXILIARY_WEIGHT = 0.4
DROPOUT = 0.1


def default_taps(depth: int) -> tuple[int, int, int, int]:
    """The blocks, from 0, whose outputs the pyramid reads: after a third, a half, two thirds and
    all of them; 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24."""
    return tuple(max(0, round(depth * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1))


class Segmenter(nn.Module):
    """ViT, feature pyramid, UperNet head and auxiliary head.

    Running statistics of batch norm are in the collection `statistics`. In training this batch's
    are written to the collection `batch` if that is mutable; see `upernet.BatchNorm`.
    """

    encoder: ViT  # with four taps
    classes: int
    width: int  # channels of the head
    dtype: jnp.dtype = jnp.float32
    axis_names: tuple[str, ...] = ()  # of the devices that share a batch, inside `shard_map`
    dropout: float = DROPOUT

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        path_scale: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [B, 4h, 4w, K] and of the auxiliary head [B, h, w, K], float32, for h x w patches.

        Images are [B, H, W, C] float, normalised: with patches of 16 pixels the strides of the
        logits are 4 and 16, with patches of p they are p/4 and p. `path_scale` is as for the
        encoder. `dropout_keys` [B] are random keys, one an example; None is evaluation.
        """
        tokens = self.encoder(images, path_scale=path_scale)  # 4 of [B, 1 + L, D]
        shape = (images.shape[0], *self.encoder.grid, self.encoder.width)
        maps = [x[:, 1:].reshape(shape).astype(self.dtype) for x in tokens]  # [B, h, w, D] each
        head_keys = auxiliary_keys = None
        if dropout_keys is not None:
            keys = jax.vmap(jax.random.split)(dropout_keys)  # [B, 2]
            head_keys, auxiliary_keys = keys[:, 0], keys[:, 1]
        how = How(self.dtype, dropout_keys is not None, self.axis_names, self.dropout)
        maps = Pyramid(how, name="pyramid")(maps)
        logits = UPerHead(self.classes, self.width, how, name="head")(maps, head_keys)
        auxiliary = FCNHead(self.classes, how, name="auxiliary")(maps[2], auxiliary_keys)
        return logits, auxiliary


def segmenter_variables(params: dict[str, Any]) -> dict[str, Any]:
    """What `Segmenter.apply` takes, of parameters that have the running statistics among them under
    `statistics`, as files do."""
    statistics = params["statistics"]
    others = {name: x for name, x in params.items() if name != "statistics"}
    return {"params": others, "statistics": statistics}


def pixel_classes(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The best class of each pixel, int32 [B, *size], by logits [B, h, w, K] interpolated there."""

    def best(logits: jax.Array) -> jax.Array:
        return resize(logits, size).argmax(axis=-1).astype(jnp.int32)

    return jax.lax.map(best, logits)  # an image at a time: of 150 classes each takes 157 MB


def segmentation_loss(
    logits: jax.Array, auxiliary: jax.Array, labels: jax.Array, ignored: int = 255
) -> jax.Array:
    """Cross entropy of both heads, the auxiliary one's times 0.4: a number, float32.

    Logits [B, h, w, K] of any stride are interpolated to labels [B, H, W], any integers. Pixels
    labelled `ignored` add nothing, but the sum is divided by the number of all pixels, as in
    mmsegmentation (avg_non_ignore=False).
    """

    # One image at a time, and again backwards: 150 classes at 512 x 512 are 157 MB an image.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # the loop keeps them apart
    def of_image(example: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        logits, auxiliary, labels = example
        main, other = (cross_entropy_sum(x, labels, ignored) for x in (logits, auxiliary))
        return main + AUXILIARY_WEIGHT * other

    with jax.named_scope("loss"):
        return jax.lax.map(of_image, (logits, auxiliary, labels)).sum() / labels.size


def cross_entropy_sum(logits: jax.Array, labels: jax.Array, ignored: int) -> jax.Array:
    """Summed over the counted pixels of an image: logits [h, w, K], labels [H, W]."""
    x = resize(logits.astype(jnp.float32), labels.shape)  # [H, W, K]
    own = labels[..., None] == jnp.arange(x.shape[-1])  # a gather's gradient would be a scatter
    losses = jax.nn.logsumexp(x, axis=-1) - jnp.where(own, x, 0).sum(axis=-1)
    return jnp.where(labels == ignored, 0, losses).sum()
