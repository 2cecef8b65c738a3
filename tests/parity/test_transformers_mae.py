"""Same weights, same noise, float32: our numbers are those of transformers' ViTMAE."""

import dataclasses

import numpy as np
import pytest
from parity_models import (
    BASE,
    TINY,
    images_of,
    largest_relative_difference,
    noise_of,
    of_size,
    ours,
    random_params,
    theirs,
    transformers_mae,
)

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")

# Blocks are few where only the shapes are new; BASE is the whole ViT-B.
MODELS = {
    "tiny-norm_pixel": TINY,
    "tiny-pixel": dataclasses.replace(TINY, target="pixel"),
    "base-norm_pixel": BASE,
    "base-pixel": dataclasses.replace(BASE, target="pixel"),
    "large-2-blocks": of_size(1024, 2, 16, 16, decoder_depth=1),
    "huge-2-blocks": of_size(1280, 2, 16, 14, decoder_depth=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_predictions_mask_and_every_gradient_agree(name, tmp_path):
    d = MODELS[name]
    params = random_params(d)
    images, noise = images_of(d, 2), noise_of(d, 2)
    model, info = transformers_mae(d, params, tmp_path)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.layer_norm_eps == 1e-6

    loss, predictions, mask, grads = ours(d, params, images, noise)
    their_loss, their_predictions, their_mask, their_grads = theirs(model, images, noise)
    np.testing.assert_array_equal(mask, their_mask)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert largest_relative_difference(predictions, their_predictions) < 1e-5

    assert grads.keys() == their_grads.keys()
    differences = {
        n: float(np.linalg.norm(grads[n] - g) / np.linalg.norm(g)) for n, g in their_grads.items()
    }
    worst = max(differences, key=differences.get)
    print(
        f"{name}: loss {loss:.6f}, off by {abs(loss - their_loss) / their_loss:.1e}; predictions "
        f"by {largest_relative_difference(predictions, their_predictions):.1e}; "
        f"{len(grads)} gradients, worst {worst} by {differences[worst]:.1e}"
    )
    assert differences[worst] < 1e-4, worst
