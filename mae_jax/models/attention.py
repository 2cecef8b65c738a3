"""The one place that computes attention."""

import jax
import jax.numpy as jnp

ATTENTION = ("plain", "kernel")
REGISTER = 128  # numbers side by side, of a TPU


def is_stacked(kind: str, tokens: int, d: int, heads: int) -> bool:
    """Whether `attention` of `kind` wants queries, keys and values [B, N, D], heads not apart."""
    in_registers = d % REGISTER == 0 and REGISTER % (d // heads) == 0
    return kind == "kernel" and tokens <= REGISTER and in_registers


@jax.named_scope("attention")
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    kind: str = "plain",
    head_dim: int | None = None,
) -> jax.Array:
    """Scaled dot-product attention of [B, N, heads, head_dim], softmax in float32; typed like `v`.

    `bias` [heads, N, N] float32 is added to the logits of (query, key). `kind` "kernel": by kernels
    for TPUs, which know no bias and are not split over devices by the compiler: for use inside
    `shard_map`. Of more than 128 tokens by `attention_kernel`; of fewer, where `is_stacked`, by
    `stacked_attention_kernel`, of [B, N, D] and told `head_dim`; else plain.
    """
    if kind == "kernel" and bias is not None:
        raise ValueError("the kernel of attention knows no relative biases")
    if q.ndim == 3:
        from mae_jax.models import stacked_attention_kernel  # Pallas takes 0.3 s to import

        return stacked_attention_kernel.fused(q, k, v, head_dim)
    if kind == "kernel" and q.shape[1] > REGISTER:
        from mae_jax.models.attention_kernel import fused

        b, n, heads, d = q.shape
        arrays = (x.transpose(0, 2, 3, 1).reshape(b * heads, d, n) for x in (q, k, v))
        return fused(*arrays).reshape(b, heads, d, n).transpose(0, 3, 1, 2)
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)  # [B, heads, N, N]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
