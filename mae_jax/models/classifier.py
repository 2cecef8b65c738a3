"""The encoder with a head: what fine-tuning and probing train (paper section 4.1, appendix A.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mae_jax.models.vit import ViT, layer_norm

POOLS = ("mean", "cls")
BATCH_NORM_EPS = 1e-6  # of the linear probe, as in the reference's main_linprobe.py


class Classifier(nn.Module):
    """ViT encoder, pooling, linear head; `head_std` is of the head's initial weights.

    `pool` is `mean` of the patch tokens, then a layer norm of its own (`fc_norm`) instead of the
    encoder's; `cls`, the class token, or `normed_mean`, of patch tokens, after the encoder's norm.
    """

    encoder: ViT
    classes: int
    pool: str = "mean"
    head_std: float = 2e-5

    @nn.compact
    def __call__(self, images: jax.Array, path_scale: jax.Array | None = None) -> jax.Array:
        """Logits [B, classes] float32 of images [B, H, W, C] (float, normalised)."""
        if self.encoder.final_norm == (self.pool == "mean"):
            raise ValueError(f"pool {self.pool!r} and the encoder's final norm do not go together")
        x = self.encoder(images, path_scale=path_scale)  # [B, 1 + L, D]
        x = pool_tokens(x, self.pool)  # [B, D]
        if self.pool == "mean":
            x = layer_norm(jnp.float32, "fc_norm")(x)
        return nn.Dense(
            self.classes,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,  # accelerators use fewer bits by default
            kernel_init=nn.initializers.normal(self.head_std),
            name="head",
        )(x)


def pool_tokens(tokens: jax.Array, pool: str) -> jax.Array:
    """One vector an image from tokens [B, 1 + L, D]: [B, D] float32."""
    x = tokens[:, 0] if pool == "cls" else tokens[:, 1:].astype(jnp.float32).mean(axis=1)
    return x.astype(jnp.float32)


def absorb_batch_norm(head: dict, statistics: dict) -> dict:
    """A head (kernel [D, K], bias [K]) that does what batch norm without affine (`statistics`:
    running mean [D] and var [D]) and `head` do."""
    kernel = head["kernel"] * jax.lax.rsqrt(statistics["var"] + BATCH_NORM_EPS)[:, None]
    shift = linear_head({"kernel": kernel, "bias": 0.0}, statistics["mean"])
    return {"kernel": kernel, "bias": head["bias"] - shift}


def probe_params(params: dict, statistics: dict) -> dict:
    """A linear probe as parameters of `Classifier`, its batch norm absorbed into the head."""
    return {**params, "head": absorb_batch_norm(params["head"], statistics)}


def linear_head(head: dict, x: jax.Array) -> jax.Array:
    """Logits [..., K] of features [..., D], in full float32 on accelerators too."""
    return jnp.dot(x, head["kernel"], precision=jax.lax.Precision.HIGHEST) + head["bias"]


def classification_sums(
    logits: jax.Array, labels: jax.Array, weight: jax.Array
) -> dict[str, jax.Array]:
    """Summed cross entropy, top-1 and top-5 hits and count of examples, each times its weight.

    Of classes that score the same the first counts as higher, as for `argmax`; where a score is
    NaN nothing is a hit. Logits are [B, K], labels [B], weight [B] is 0 for padding.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)  # [B]
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)  # [B, 1]
    first = jnp.arange(logits.shape[1]) < labels[:, None]  # [B, K]
    rank = (~(logits <= own) | ((logits == own) & first)).sum(axis=1)  # [B], 0 = best
    return {
        "loss": (loss * weight).sum(),
        "top1": ((rank < 1) * weight).sum(),
        "top5": ((rank < 5) * weight).sum(),
        "weight": weight.sum(),
    }
