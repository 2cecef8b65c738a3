"""Peak speed of known chips, for MFU."""

import re

import jax

# Dense bf16 FLOP/s of one JAX device (v2 and v3: one of a chip's two cores). Vendor data sheets.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 FLOP/s of `device`, None where the chip is not in the table."""
    kind = device.device_kind
    if kind.startswith("NVIDIA"):  # with a suffix, such as "NVIDIA A100-SXM4-80GB"
        kind = " ".join(re.split("[ -]", kind)[:2])
    return PEAK_FLOPS.get(kind)
