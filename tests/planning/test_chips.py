import math

import pytest

from mae_jax import UserError
from mae_jax.planning.chips import CHIPS, parse_pod, products
from mae_jax.train.throughput import PEAK_FLOPS


@pytest.mark.parametrize(
    ("name", "grid", "chips", "devices", "hosts"),
    [
        ("v4-8", (2, 2, 1), 4, 4, 1),
        ("v4-128", (4, 4, 4), 64, 64, 16),
        ("v5p-64", (2, 4, 4), 32, 32, 8),
        ("v5p-12288", (16, 16, 24), 6144, 6144, 1536),
        ("v5e-256", (16, 16), 256, 256, 64),
        ("v5litepod-256", (16, 16), 256, 256, 64),
        ("v5e-1", (1, 1), 1, 1, 1),
        ("v6e-64", (8, 8), 64, 64, 16),
        ("tpu7x-128", (4, 4, 4), 64, 128, 16),
        ("tpu7x-2", (1, 1, 1), 1, 2, 1),
        ("v5e:4x4", (4, 4), 16, 16, 4),
        ("v5e:4x4x1", (4, 4), 16, 16, 4),
        ("v4:4x4x16", (4, 4, 16), 256, 256, 64),
        ("v3-32", (4, 4), 16, 32, 4),
    ],
)
def test_names_that_people_know_and_those_of_the_compiler(name, grid, chips, devices, hosts):
    pod = parse_pod(name)
    assert (pod.grid, pod.chips, pod.devices, pod.hosts) == (grid, chips, devices, hosts)


# Slices of MaxText's table of names (accelerator_to_spec_map.py).
@pytest.mark.parametrize(
    ("cores", "grid"),
    [
        *((384, (4, 4, 12)), (512, (4, 8, 8)), (1536, (8, 8, 12)), (1792, (4, 8, 28))),
        *((2048, (8, 8, 16)), (4096, (8, 16, 16)), (6912, (12, 12, 24)), (9216, (12, 16, 24))),
    ],
)
def test_sizes_are_put_together_as_others_do(cores, grid):
    assert parse_pod(f"v5p-{cores}").grid == parse_pod(f"tpu7x-{cores}").grid == grid


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-100", r"v5e-64 \(v5e:8x8\), v5e-128 \(v5e:8x16\)"),
        ("v5e-512", r"near it: v5e-256 \(v5e:16x16\)$"),
        ("v5e:16x32", "v5e-256"),
        ("v5e:4x16", "v5e-64"),
        ("v5e:0x4", "v5e-1"),
        ("v4-100", r"count 2 cores a chip\); near it: v4-64 \(v4:2x4x4\), v4-128"),
        ("v4-7", "v4-8"),
        ("v4:2x4x8", "v4-128"),
        ("v5p-17920", "v5p-12288"),
        ("v9-8", "'v9-8' names no TPU: .* v2, v3, v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "CHIP-SIZE or CHIP:GRID"),
        ("v5e:4xfour", "CHIP-SIZE or CHIP:GRID"),
    ],
)
def test_what_no_product_has_is_refused_with_what_exists(name, message):
    with pytest.raises(UserError, match=message):
        parse_pod(name)


def test_several_slices():
    pod = parse_pod("v5e-256", slices=2)
    assert (pod.chips, pod.hosts, pod.chips_a_slice, pod.name) == (512, 128, 256, "2xv5e-256")
    assert parse_pod(pod.name) == pod
    with pytest.raises(UserError, match="give the slices once"):
        parse_pod("2xv5e-256", slices=2)
    with pytest.raises(UserError, match="2 slices of v3 cannot be joined"):
        parse_pod("v3-32", slices=2)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("v5e-64", (False, False)),
        ("v6e-128", (False, True)),
        ("v5e-256", (True, True)),
        ("v4-64", (False,) * 3),
        ("v4-128", (True,) * 3),
        ("v5p-256", (True,) * 3),
    ],
)
def test_which_axes_are_rings(name, wrap):
    assert parse_pod(name).wrap == wrap


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_figures_of_a_chip_agree_with_each_other(chip):
    units = chip.flops / (2 * chip.mxu**2 * chip.clock)  # matrix units of the chip, a few
    assert round(units) in (2, 4, 8, 16)
    assert units == pytest.approx(round(units), rel=0.03)
    assert 0.9 * chip.hbm_bytes < chip.device_bytes * chip.devices <= chip.hbm_bytes
    sizes = [math.prod(grid) for grid in products(chip)]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= chip.largest
    for kind in chip.kinds:
        assert PEAK_FLOPS[kind] == chip.flops / chip.devices


def test_the_compiler_knows_every_generation():
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    for chip in CHIPS.values():
        several = 2 if chip.dcn_bandwidth else 1
        for grid in (products(chip)[0], (4,) * chip.axes):
            pod = parse_pod(f"{chip.name}:{'x'.join(map(str, grid))}", several)
            devices = pod.topology().devices
            assert len(devices) == pod.devices
            assert devices[0].device_kind in chip.kinds
            hosts = {device.process_index for device in devices}
            assert len(hosts) == pod.hosts
            slices = {getattr(device, "slice_index", 0) for device in devices}
            assert len(slices) == several
