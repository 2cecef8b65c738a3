"""The masked autoencoder: encoder on visible patches, light decoder, loss on removed patches."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.masking import Masking, scatter_tokens
from mae_jax.models.targets.base import Target
from mae_jax.models.vit import Blocks, ViT, dense, layer_norm, sincos_position_table


class Decoder(nn.Module):
    """Predicts every patch from the encoded visible ones (paper section 3, "MAE decoder"), or from
    all, where mask tokens have passed the encoder already (paper table 1c)."""

    grid: tuple[int, int]
    outputs: int  # numbers predicted for a patch
    width: int
    depth: int
    heads: int
    dtype: jnp.dtype = jnp.float32
    residual_dtype: jnp.dtype = jnp.float32
    stacking: str = "unrolled"
    remat: str = "none"
    position_params: bool = False  # as in `ViT`
    attention: str = "plain"  # as in `ViT`, and `local`
    local: bool = False

    @nn.compact
    def __call__(self, latent: jax.Array, masking: Masking | None) -> jax.Array:
        """Predictions [B, L, outputs] from latent [B, 1 + K, D] of the patches that `masking` keeps
        or, where that is None, from latent [B, 1 + L, D] of all patches in order."""
        residual = self.residual_dtype
        x = dense(latent, self.width, self.dtype, "embed", residual)  # [B, 1 + K, Dd]
        if masking is not None:
            mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
            removed = masking.mask[:, :, None] > 0  # [B, L, 1]
            patches = scatter_tokens(x[:, 1:], masking)  # [B, L, Dd]
            patches = jnp.where(removed, mask_token.astype(residual), patches)
            x = jnp.concatenate([x[:, :1], patches], axis=1)  # [B, 1 + L, Dd]
        positions = jnp.asarray(sincos_position_table(self.width, self.grid))  # [1 + L, Dd]
        if self.position_params:
            positions = self.param("pos_embed", lambda _: positions[None])[0]
        x = x + positions.astype(residual)
        how = {"stacking": self.stacking, "remat": self.remat}
        how |= {"attention": self.attention, "local": self.local}
        x = Blocks(self.depth, self.heads, self.dtype, **how, name="blocks")(x)
        x = layer_norm(self.dtype, "norm")(x)
        return dense(x, self.outputs, self.dtype, "pred", residual)[:, 1:]


class LinearHead(nn.Module):
    """In the decoder's place, one linear layer on the encoder's tokens (SimMIM, MaskFeat)."""

    outputs: int  # numbers predicted for a patch
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latent: jax.Array, masking: None) -> jax.Array:
        """Predictions [B, L, outputs] from latent [B, 1 + L, D] of all patches in order."""
        return dense(latent[:, 1:], self.outputs, self.dtype, "pred", jnp.float32)


class MAEOutput(NamedTuple):
    """What the model gives, in float32."""

    loss: jax.Array  # [B]
    predictions: jax.Array  # [B, L, outputs]


class MAE(nn.Module):
    """Masked autoencoder; the state of its target, if it has one, is among the parameters."""

    encoder: ViT
    decoder: Decoder | LinearHead
    target: Target
    encoder_tokens: bool = False  # the encoder sees mask tokens in place of removed patches

    @nn.compact
    def __call__(
        self, images: jax.Array, masking: Masking, counted: jax.Array | None = None
    ) -> MAEOutput:
        """Predicts the removed patches of images [B, H, W, C] (float, normalised). The loss is over
        these, or over the patches where `counted` [B, L] is 1."""
        images = images.astype(jnp.float32)
        if self.encoder_tokens:
            latent = self.encoder(images, mask=masking.mask)  # [B, 1 + L, D]
            predictions = self.decoder(latent, None).astype(jnp.float32)
        else:
            latent = self.encoder(images, masking.ids_keep)  # [B, 1 + K, D]
            predictions = self.decoder(latent, masking).astype(jnp.float32)
        state = self.target.init_state()
        if state is not None:
            state = jax.lax.stop_gradient(self.param("target_state", lambda _: state))
        with jax.named_scope("target"):
            error = self.target.loss(predictions, self.target.values(images, state))  # [B, L]
            counted = masking.mask if counted is None else counted
            return MAEOutput(masked_mean(error, counted), predictions)

    def encode(self, images: jax.Array) -> jax.Array:
        """Tokens [B, 1 + L, D] of whole images, nothing masked."""
        return self.encoder(images)


def masked_mean(error: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `error` [B, L] over each image's patches where `mask` [B, L] is 1: [B]; 0 where there
    are none. Images have equally many removed ones, so that the mean over images is theirs."""
    return (error * mask).sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)
