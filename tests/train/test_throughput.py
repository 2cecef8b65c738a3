import types

import pytest

from mae_jax.train.throughput import peak_flops


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v3", 61.5e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
        ("TPU v99", None),
        ("NVIDIA A10", None),
    ],
)
def test_known_chips_have_their_peak_and_unknown_ones_none(kind, flops):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == flops
