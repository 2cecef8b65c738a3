"""Logits are resized, and windows put together, as PyTorch does it for mmsegmentation."""

import numpy as np
import pytest

from mae_jax.data.segmentation import SegmentEvalTransform
from mae_jax.evaluators.segmentation import _resized, classes_of

torch = pytest.importorskip("torch")


def bilinear(x, size):
    return torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(52, 52), (26, 39), (13, 13), (6, 7), (7, 100), (1, 1)])
def test_planes_are_resized_as_by_torch(size):
    plane = np.random.default_rng(0).normal(size=(13, 13)).astype(np.float32)
    expected = bilinear(torch.from_numpy(plane)[None, None], size)[0, 0].numpy()
    np.testing.assert_allclose(_resized(plane, size), expected, atol=5e-6)


@pytest.mark.parametrize("size", [(100, 150), (301, 203), (64, 64)])
def test_windows_are_put_together_as_by_torch(size):
    transform = SegmentEvalTransform((64, 64), 5, stride=(43, 43))
    (view,) = transform.views(*size)
    corners = transform.corners(view)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(corners), 5, 16, 16)).astype(np.float32)
    total = torch.zeros(1, 5, view.height, view.width)
    count = torch.zeros(1, 1, view.height, view.width)
    for (top, left), part in zip(corners, torch.from_numpy(logits), strict=True):
        total[..., top : top + 64, left : left + 64] += bilinear(part[None], (64, 64))
        count[..., top : top + 64, left : left + 64] += 1
    expected = bilinear(total / count, size)[0].argmax(dim=0).numpy()
    found = classes_of([(view, corner) for corner in corners], logits, (64, 64), size)
    assert (found == expected).mean() > 0.9995  # ties
