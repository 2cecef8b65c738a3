"""The one place that computes attention."""

import jax
import jax.numpy as jnp

ATTENTION = ("plain", "kernel")
REGISTER = 128  # numbers side by side, of a TPU


def is_stacked(kind: str, tokens: int, d: int, heads: int) -> bool:
    """Whether `stacked_attention` is what computes attention of `kind`."""
    in_registers = d % REGISTER == 0 and REGISTER % (d // heads) == 0
    return kind == "kernel" and tokens <= REGISTER and in_registers


@jax.named_scope("attention")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    kind: str = "plain",
) -> jax.Array:
    """Scaled dot-product attention of [B, N, heads, head_dim], softmax in float32; typed like `v`.

    `bias` [heads, N, N] float32 is added to the logits of (query, key). `kind` "kernel": where
    there are more than 128 tokens by `attention_kernel`, which is for TPUs, knows no bias and is
    not split over devices by the compiler: for use inside `shard_map`.
    """
    if kind == "kernel" and bias is not None:
        raise ValueError("the kernel of attention knows no relative biases")
    if kind == "kernel" and q.shape[1] > REGISTER:
        from mae_jax.models.attention_kernel import fused  # Pallas takes 0.3 s to import

        b, n, heads, d = q.shape
        arrays = (x.transpose(0, 2, 3, 1).reshape(b * heads, d, n) for x in (q, k, v))
        return fused(*arrays).reshape(b, heads, d, n).transpose(0, 3, 1, 2)
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)  # [B, heads, N, N]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@jax.named_scope("attention")
def stacked_attention(q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int) -> jax.Array:
    """The same of few tokens, [B, N, D], heads side by side, by `stacked_attention_kernel`, for
    which holds what does for the other."""
    from mae_jax.models.stacked_attention_kernel import fused

    return fused(q, k, v, head_dim)
