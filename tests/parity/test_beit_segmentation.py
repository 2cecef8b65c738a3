"""Segmentation models against transformers' BEiT and PyTorch's interpolation and pooling."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_models import images_of, largest_relative_difference
from segmenters import TINY_SEGMENTER, random_segmenter

from mae_jax import UserError
from mae_jax.interop.beit import beit_tensors
from mae_jax.interop.export import export_hugging_face
from mae_jax.interop.weights import to_official
from mae_jax.models.segmenter import segmentation_loss, segmenter_variables
from mae_jax.models.upernet import by_matrices, pooling_matrix, resize

torch = pytest.importorskip("torch", reason="pip install torch")
transformers = pytest.importorskip("transformers", reason="pip install transformers")


@pytest.fixture(scope="module")
def params():
    return random_segmenter()


@pytest.fixture(scope="module")
def images():
    return images_of(TINY_SEGMENTER, 4)  # fewer, and the norm of 1 x 1 cells is all rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("beit")
    export_hugging_face(params, folder, TINY_SEGMENTER, {})
    return folder


@pytest.fixture(scope="module")
def beit(folder):
    """As anyone would load it; everything that the file lacks or has besides is an error."""
    model, info = transformers.BeitForSemanticSegmentation.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def of_torch(beit, images):
    """Logits of both heads [B, H, W, K]."""
    seen = []
    hook = beit.auxiliary_head.register_forward_hook(lambda *call: seen.append(call[2]))
    logits = beit(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))).logits
    hook.remove()
    return logits.permute(0, 2, 3, 1), seen[0].permute(0, 2, 3, 1)


def test_logits_of_both_heads_are_those_of_beit_as_exported(beit, params, images):
    model = TINY_SEGMENTER.segmenter()
    ours = jax.jit(model.apply)(segmenter_variables(params), images)
    with torch.no_grad():
        theirs = of_torch(beit.eval(), images)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert largest_relative_difference(a, b) < 1e-4


def test_loss_gradients_and_statistics_in_training_are_those_of_beit(beit, params, images):
    labels = np.random.default_rng(3).integers(0, 7, (4, 64, 64)).astype(np.uint8)
    labels[:, :20, :30] = 255
    variables = segmenter_variables(params)
    model = TINY_SEGMENTER.segmenter(dropout=0.0)  # transformers' heads have none
    keys = jax.random.split(jax.random.key(0), 4)

    def loss_fn(params):
        outputs, new = model.apply({"params": params}, images, None, keys, mutable=["batch"])
        return segmentation_loss(*outputs, jnp.asarray(labels)), new["batch"]

    (loss, batch), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])

    before = {name: x.clone() for name, x in beit.named_buffers() if "running" in name}
    beit.train().zero_grad()
    target = torch.tensor(labels.astype(np.int64))
    theirs = 0
    for logits, weight in zip(of_torch(beit, images), (1, 0.4), strict=True):
        x = logits.permute(0, 3, 1, 2)
        x = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", align_corners=False)
        losses = torch.nn.functional.cross_entropy(x, target, ignore_index=255, reduction="none")
        theirs += weight * losses.mean()
    theirs.backward()
    beit.eval()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)

    named = dict(beit.named_parameters())
    official = to_official({**grads, "statistics": batch}, TINY_SEGMENTER)
    # Once loaded, transformers 5 names tensors as it likes: find them by loading gradients.
    expected = {name: p.grad for name, p in named.items()}
    ours = in_names_of_transformers(beit, beit_tensors(official, TINY_SEGMENTER))
    scale = max(float(x.abs().max()) for x in expected.values() if x is not None)
    for name, gradient in expected.items():
        if ".layers.12." in name:  # the block that is not ours
            continue
        a, b = ours[name].numpy(), gradient.numpy()
        if re.search(r"fpn\.fpn.*transpose.\.bias|fpn2.bias", name):  # batch norm follows: rounding
            assert max(np.abs(a).max(), np.abs(b).max()) < 1e-6 * scale
        else:
            assert largest_relative_difference(a, b) < 1e-4, name
    for name, old in before.items():
        moved = dict(beit.named_buffers())[name]
        expected_moments = ((moved - 0.9 * old) / 0.1).numpy()
        assert largest_relative_difference(ours[name].numpy(), expected_moments) < 1e-4, name
        moved.copy_(old)


def in_names_of_transformers(beit, tensors):
    """Tensors in names of the hub -> in those of the model in memory."""
    with torch.device("cpu"):
        model = transformers.BeitForSemanticSegmentation.from_pretrained(
            None,
            config=beit.config,
            state_dict={name: torch.tensor(x) for name, x in tensors.items()},
        )
    return model.state_dict()


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (7, 10), (16, 16), (2, 5)])
@pytest.mark.parametrize("new", [(1, 1), (3, 8), (16, 16), (15, 20), (40, 4)])
def test_resizes_are_those_of_torch(size, new):
    x = np.random.default_rng(0).standard_normal((2, *size, 3), np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(x.transpose(0, 3, 1, 2)), new, mode="bilinear", align_corners=False
    )
    ours = resize(jnp.asarray(x), new)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 10), (16, 16), (6, 2)])
@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_pooling_is_that_of_torch(size, cells):
    x = np.random.default_rng(0).standard_normal((2, *size, 3), np.float32)
    theirs = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x.transpose(0, 3, 1, 2)), cells)
    rows, columns = (pooling_matrix(length, cells) for length in size)
    ours = by_matrices(jnp.asarray(x), rows, columns)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


def test_transformers_refuses_nothing_that_the_card_does_not_say(folder):
    card = (folder / "README.md").read_text()
    assert "BeitForSemanticSegmentation" in card
    assert "a last block more, number 12" in card


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": (64, 48)}, "square images alone"),
        ({"segment_width": 24}, "as wide as the encoder"),
        ({"segment_taps": (0, 0, 1, 2)}, "four different blocks"),
        ({"segment_ignore": 0}, "255 as the label"),
    ],
)
def test_what_beit_cannot_hold_is_refused(change, words, params, tmp_path):
    spec = dataclasses.replace(TINY_SEGMENTER, **change)
    with pytest.raises(UserError, match=words):
        export_hugging_face(params, tmp_path, spec, {})
