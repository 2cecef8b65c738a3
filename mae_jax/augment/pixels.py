"""What happens to pixels on the device, inside the compiled step."""

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, step: jax.Array | int, positions: jax.Array) -> jax.Array:
    """Keys [B] of (key, step, int32 positions [B] in the global batch) alone, on any devices."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, positions)


@jax.named_scope("images")
def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image [H, W, C] of [B, H, W, C] left to right with probability 1/2; keys [B]."""
    flip = jax.vmap(jax.random.bernoulli)(keys)  # [B]
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
