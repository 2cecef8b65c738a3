"""Blocks of a ViT lowered for a TPU that is not there."""

import jax
import jax.numpy as jnp

from mae_jax.models.vit import Blocks


def lowered_gradients(pod, tokens, heads, **how):
    """Of one block on `tokens` [B, N, D] by its parameters, for the first device of `pod`."""
    here = jax.sharding.SingleDeviceSharding(pod.topology().devices[0])
    model = Blocks(1, heads, jnp.bfloat16, **how)
    x = jax.ShapeDtypeStruct(tokens, jnp.float32, sharding=here)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), shapes)
    step = jax.grad(lambda params, x: (model.apply(params, x) ** 2).mean())
    return jax.jit(step, out_shardings=here).lower(params, x)
