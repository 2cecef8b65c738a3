"""Learning-rate schedule and optimizer (paper table 8, mae.md 2.1 and 2.2)."""

import jax
import optax


def warmup_cosine(
    *, base_lr: float, batch_size: int, warmup_steps: int, total_steps: int, min_lr: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0, then half a cosine to `min_lr` at `total_steps`, by step.

    The peak is base_lr * batch_size / 256. Step 0 has a learning rate of exactly 0.

    Raises:
      ValueError: the warm-up is as long as the run or longer.
    """
    if warmup_steps >= total_steps:
        raise ValueError(
            f"the warm-up takes {warmup_steps} of {total_steps} steps: lower optim.warmup_epochs "
            "(or optim.warmup_steps), or train longer"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=base_lr * batch_size / 256,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=min_lr,
    )


def global_norm(grads: optax.Updates) -> jax.Array:
    """The L2 norm of all gradients together."""
    return optax.tree.norm(grads)


def decays(params: optax.Params) -> optax.Params:
    """True for matrices, False for 1-D tensors and biases.

    `cls_token` and `mask_token` are [1, 1, D] and are decayed, as in the reference.
    """
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW with decoupled decay on matrices; `clip_norm` 0 clips nothing."""
    optimizer = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    if clip_norm:
        return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return optimizer
