"""The one place that computes attention."""

import jax
import jax.numpy as jnp


@jax.named_scope("attention")
def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Scaled dot-product attention of [B, N, heads, head_dim], softmax in float32; typed like `v`.

    `bias` [heads, N, N] float32 is added to the logits of (query, key). A plain einsum: at MAE's 50
    to 257 tokens the compiler fuses it as well as a kernel by hand.
    """
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)  # [B, heads, N, N]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
