"""Ten optimizer steps follow PyTorch's."""

import jax
import numpy as np
import optax
import pytest
from parity_models import (
    images_of,
    masking_of,
    noise_of,
    of_size,
    random_params,
    transformers_mae,
)

from mae_jax.train import optimizers
from mae_jax.train.state import merge, split

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")

STEPS, BATCH = 10, 2
SCHEDULE = {"base_lr": 0.128, "batch_size": BATCH, "warmup_steps": 3, "total_steps": STEPS}


def test_ten_steps_track_pytorch_losses(tmp_path):
    d = of_size(384, 2, 6, 16, decoder_depth=1)
    params = random_params(d)
    batches = [(images_of(d, BATCH, seed=s), noise_of(d, BATCH, seed=s)) for s in range(STEPS)]
    schedule = optimizers.warmup_then("cosine", **SCHEDULE)
    rates = [float(schedule(step)) for step in range(STEPS)]
    assert max(rates) == pytest.approx(1e-3)

    theirs, _ = transformers_mae(d, params, tmp_path)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    their_losses = []
    for (images, noise), rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        loss = theirs(pixel_values=pixels, noise=torch.tensor(noise)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        their_losses.append(loss.item())

    model = d.mae(position_params=True)
    ours = optimizers.adamw(
        schedule, optimizers.decays, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05
    )

    @jax.jit
    def step(params, state, images, noise):
        masking = masking_of(d, noise)

        def loss_fn(params):
            variables = {"params": merge(params, tables)}
            return model.apply(variables, images, masking).loss.mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, tables = split(params, lambda path: not path.endswith("pos_embed"))
    state, losses = ours.init(params), []
    for images, noise in batches:
        params, state, loss = step(params, state, images, noise)
        losses.append(float(loss))
    print("ours  ", np.round(losses, 6), "\ntorch ", np.round(their_losses, 6))
    assert abs(losses[-1] - losses[0]) > 0.1  # something was learned
    np.testing.assert_allclose(losses, their_losses, rtol=1e-4)
