"""What happens to pixels on the device, inside the compiled step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, step: jax.Array | int, positions: jax.Array) -> jax.Array:
    """Keys [B], the same on any number of devices: functions of (key, step, position) alone.

    Args:
      key: the run's key for this purpose.
      positions: int32 [B], places of the examples in the global batch of that step.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, positions)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image [H, W, C] of [B, H, W, C] left to right with probability 1/2; keys [B]."""
    flip = jax.vmap(jax.random.bernoulli)(keys)  # [B]
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps uint8 [B, H, W, C] to float32 with mean and deviation taken out.

    Args:
      mean, std: C values each, of pixels in [0, 1].
    """
    pixels = images.astype(jnp.float32) / 255.0
    return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Inverse of `normalize`, float to uint8 [B, H, W, C]: rounded and clipped."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    pixels = (images.astype(jnp.float32) * std + mean) * 255.0
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
