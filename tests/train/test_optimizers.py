import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.train.optimizers import adamw, decays, warmup_cosine


def reference_lr(step, peak, warmup, total, minimum):
    """Section 2.2 of the reference digest, written out."""
    if step < warmup:
        return peak * step / warmup
    return minimum + (peak - minimum) * 0.5 * (
        1 + np.cos(np.pi * (step - warmup) / (total - warmup))
    )


def test_schedule_is_the_references_at_every_step():
    schedule = warmup_cosine(
        base_lr=1.5e-4, batch_size=4096, warmup_steps=12480, total_steps=249600, min_lr=1e-6
    )
    for step in (0, 1, 6000, 12479, 12480, 12481, 100000, 249599):
        expected = reference_lr(step, 2.4e-3, 12480, 249600, 1e-6)
        np.testing.assert_allclose(schedule(step), expected, rtol=2e-4, atol=1e-9)
    assert schedule(0) == 0


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up takes 10 of 10 steps"):
        warmup_cosine(base_lr=1.0, batch_size=256, warmup_steps=10, total_steps=10)


def test_adamw_equals_numpy_and_decays_matrices_only():
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, 4)),
        "bias": rng.normal(size=4),
        "cls_token": rng.normal(size=(1, 1, 4)),
    }
    grads = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(5)]
    schedule = warmup_cosine(base_lr=0.1, batch_size=256, warmup_steps=2, total_steps=10)
    optimizer = adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    jax_params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(jax_params)
    for g in grads:
        g32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, state = optimizer.update(g32, state, jax_params)
        jax_params = optax.apply_updates(jax_params, updates)

    for name, p in params.items():
        m = v = 0
        for t, g in enumerate(grads):
            lr = reference_lr(t, 0.1, 2, 10, 0)
            m = 0.9 * m + 0.1 * g[name]
            v = 0.95 * v + 0.05 * g[name] ** 2
            if name != "bias":
                p = p * (1 - lr * 0.05)
            p = p - lr * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(jax_params[name], p, rtol=1e-5, atol=1e-6)


def test_decay_exempts_one_dimensional_tensors():
    params = {
        "kernel": jnp.zeros((2, 2)),
        "scale": jnp.zeros(2),
        "mask_token": jnp.zeros((1, 1, 2)),
    }
    assert decays(params) == {"kernel": True, "scale": False, "mask_token": True}


def test_clipping_bounds_the_global_norm():
    optimizer = adamw(
        optax.constant_schedule(1.0), b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip_norm=1.0
    )
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.asarray([6.0, 0.0]), "b": jnp.asarray([8.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # Clipped to (0.6, 0, 0.8); with b1 = b2 = 0 and eps = 1 the update is -g / (|g| + 1).
    np.testing.assert_allclose(updates["a"], [-0.6 / 1.6, 0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-0.8 / 1.8], rtol=1e-6)
