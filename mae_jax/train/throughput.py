"""Peak speed of known chips, for MFU."""

import re

import jax

from mae_jax.planning.chips import CHIPS

# Dense bf16 FLOP/s of one JAX device. Vendor data sheets.
PEAK_FLOPS = {
    **{kind: chip.flops / chip.devices for chip in CHIPS.values() for kind in chip.kinds},
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
