"""The cost model against physics: work of known size over the speed of the chip's data sheet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mae_jax.planning import cost, program
from mae_jax.planning.chips import CHIPS, Pod, parse_pod
from mae_jax.planning.program import Collective, Instruction, Product, Program

CHIP_NAMES = ("v5e", pytest.param("v6e", marks=pytest.mark.slow))
MIB = 2**20


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def compiled(function, *arguments, chip):
    """The program of `function` for one chip."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    device = parse_pod(f"{chip}-1").topology().devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    return program.compile_and_read(jax.jit(function, in_shardings=sharding).lower(*arguments))[1]


def seconds(read, chip):
    return sum(part.seconds for part in cost.estimate(read, CHIPS[chip]).values())


@pytest.mark.parametrize("chip", CHIP_NAMES)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        pytest.param(8192, 8192, 8192, marks=pytest.mark.slow),
        *((6304, 512, 2048), (16384, 1024, 4096)),
    ],
)
def test_products_take_their_work_at_peak(chip, m, k, n):
    bf16 = {"dtype": jnp.bfloat16}
    read = compiled(jnp.matmul, shape(m, k, **bf16), shape(k, n, **bf16), chip=chip)
    assert read.flops == 2 * m * k * n
    work = 2 * m * k * n / CHIPS[chip].flops
    moved = 2 * (m * k + k * n + m * n) / CHIPS[chip].hbm_bandwidth
    assert seconds(read, chip) == pytest.approx(max(work, moved), rel=0.2)


def test_a_gather_handed_to_the_sparse_cores_is_read():
    """JAX 0.10.2 cannot print such a program."""

    def gathered(x, indices):
        return jnp.take_along_axis(x * 2, indices[..., None], axis=1)

    rows = 32 * 49 * 1024 * 4  # bytes
    read = compiled(gathered, shape(32, 196, 1024), shape(32, 49, dtype=jnp.int32), chip="v6e")
    [start] = (i for i in read.instructions if i.name.startswith("gather_offload") and i.starts)
    assert start.hbm_bytes == pytest.approx(2 * rows, rel=0.1)  # 56 rows of tiles for 49
    assert any(i.waits_for == start.name for i in read.instructions)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_exact_float32_products_take_six_passes(chip):
    square = shape(2048, 2048)
    exact = compiled(lambda a, b: jnp.dot(a, b, precision="highest"), square, square, chip=chip)
    work = 6 * 2 * 2048**3 / CHIPS[chip].flops
    assert seconds(exact, chip) == pytest.approx(work, rel=0.2)


@pytest.mark.parametrize("chip", CHIP_NAMES)
@pytest.mark.parametrize(
    ("function", "dtype", "arrays"),
    [
        (lambda a, b: a + b, jnp.float32, 3),
        (lambda a, b: jax.lax.erf(a) + b, jnp.float32, 3),
        (lambda a, b: a * jnp.tanh(b), jnp.bfloat16, 3),
        (lambda a, b: (jnp.exp(a) * b).sum(axis=1), jnp.float32, 2),
        (lambda a, b: jnp.abs(a - b).max(axis=0), jnp.float32, 2),
        (lambda a, b: a.T.copy(), jnp.float32, 2),
    ],
)
def test_elementwise_work_and_sums_take_their_bytes_at_bandwidth(chip, function, dtype, arrays):
    square = shape(8192, 8192, dtype=dtype)
    read = compiled(function, square, square, chip=chip)
    moved = arrays * 8192**2 * jnp.dtype(dtype).itemsize
    assert seconds(read, chip) == pytest.approx(moved / CHIPS[chip].hbm_bandwidth, rel=0.2)


def test_the_compilers_estimate_is_told_beside_and_is_blind_to_type_and_operation():
    square, half = shape(8192, 8192), shape(8192, 8192, dtype=jnp.bfloat16)
    one = compiled(jnp.exp, square, chip="v5e")
    other = compiled(jnp.tanh, half, chip="v5e")
    assert one.estimated_cycles == pytest.approx(other.estimated_cycles, rel=0.01)
    assert seconds(one, "v5e") == pytest.approx(2 * seconds(other, "v5e"), rel=0.01)
    (part,) = cost.estimate(one, CHIPS["v5e"]).values()
    assert part.estimated_cycles == one.estimated_cycles > 0


def test_loops_count_their_trips():
    def step(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=12)[0]

    square = shape(1024, 1024, dtype=jnp.bfloat16)
    read = compiled(step, square, square, chip="v5e")
    assert read.flops == 12 * 2 * 1024**3
    work = read.flops / CHIPS["v5e"].flops
    assert seconds(read, "v5e") == pytest.approx(work, rel=0.2)


def test_small_factors_are_padded_to_the_matrix_unit():
    assert cost.padded_flops(Product(1, 1024, 1024, 1024), 128) == 2 * 1024**3
    # Heads of 64 fill half of its rows; of 50 tokens, 50 of 128 columns.
    assert cost.padded_flops(Product(16, 50, 64, 50), 128) == 2 * 16 * 56 * 128 * 128
    assert cost.padded_flops(Product(1, 50, 256, 256, passes=6), 256) == 6 * 2 * 56 * 256 * 256


def test_copies_take_what_bandwidth_other_work_leaves():
    chip = CHIPS["v5e"]
    second = int(chip.hbm_bandwidth)

    def total(*instructions):
        return sum(part.seconds for part in cost.estimate(Program(instructions), chip).values())

    fetch = Instruction("c", "copy-start", "rest", 1, hbm_bytes=second, starts=True)
    done = Instruction("d", "copy-done", "rest", 1, waits_for="c")
    product = (Product(1, 1, 1, int(chip.flops / 2 / 128 / 8)),)
    busy = Instruction("b", "fusion", "rest", 1, product, hbm_bytes=second // 4)
    assert total(busy) == pytest.approx(1.0, rel=0.01)
    assert total(fetch, done) == pytest.approx(1.0)
    assert total(fetch, busy, done) == pytest.approx(1.25, rel=0.01)


def devices_of(pod):
    """A mesh (slice, chip in it), as training lays one out."""
    shape = (1, pod.devices // pod.slices)
    if pod.slices == 1:
        return mesh_utils.create_device_mesh(shape, pod.topology().devices)
    return mesh_utils.create_hybrid_device_mesh(shape, (pod.slices, 1), pod.topology().devices)


def exchanged(pod, function, given, out):
    """What the program exchanges that maps a float32 array of 64 MiB, or the parts of one."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    devices = devices_of(pod)
    mapped = jax.shard_map(
        function, mesh=Mesh(devices, ("s", "c")), in_specs=given, out_specs=out, check_vma=False
    )
    _, read = program.compile_and_read(jax.jit(mapped).lower(shape(64 * MIB // 512, 128)))
    return read, cost.communication(read, pod, devices.ravel())


LINKS = {"v5e:2x2": 2, "v5e:4x4": 2, "v5e:16x16": 4, "v4:4x4x4": 6, "v5p:2x2x2": 3}


@pytest.mark.parametrize("name", LINKS)
def test_a_sum_over_a_slice_takes_its_bytes_over_all_links(name):
    pod = parse_pod(name)
    _, found = exchanged(pod, lambda x: jax.lax.psum(x, ("s", "c")), P(), P())
    (total,) = found
    n = pod.chips
    assert (total.kind, total.over, total.count) == ("all-reduce", "ici", 1)
    assert total.bytes == 2 * 64 * MIB * (n - 1) // n
    expected = total.bytes / (LINKS[name] * pod.chip.link_bandwidth)
    assert total.seconds == pytest.approx(expected)


def test_parts_are_gathered_and_scattered_for_half_of_a_sum():
    pod = parse_pod("v5e:2x2")
    _, (gather,) = exchanged(pod, lambda x: jax.lax.all_gather(x, "c", tiled=True), P("c"), P())
    assert (gather.kind, gather.bytes) == ("all-gather", 64 * MIB * 3 // 4)
    assert gather.seconds == pytest.approx(48 * MIB / 90e9)
    scatter = lambda x: jax.lax.psum_scatter(x, "c", tiled=True)  # noqa: E731
    _, found = exchanged(pod, scatter, P(), P("c"))
    total = next(x for x in found if x.kind == "reduce-scatter")
    # libtpu pads the array to a multiple that suits it.
    assert total.bytes == pytest.approx(64 * MIB * 3 / 4, rel=0.01)


def test_a_sum_over_slices_crosses_the_network_once_a_chip():
    pod = parse_pod("v5e:2x2", slices=2)
    _, found = exchanged(pod, lambda x: jax.lax.psum(x, ("s", "c")), P(), P())
    dcn = next(x for x in found if x.over == "dcn")
    assert (dcn.kind, dcn.count) == ("all-reduce", 1)
    assert dcn.bytes == 16 * MIB  # a quarter of it, there and back, half of that to the other
    assert dcn.seconds == pytest.approx(16 * MIB / pod.chip.dcn_bandwidth)
    assert {x.kind for x in found if x.over == "ici"} >= {"reduce-scatter", "all-gather"}


def test_the_compilers_estimate_is_blind_to_how_many_chips_exchange():
    both = [
        exchanged(parse_pod(name), lambda x: jax.lax.psum(x * 2, ("s", "c")), P(), P())
        for name in ("v5e:4x4", "v5e:16x16")
    ]
    (small, (few,)), (large, (many,)) = both
    assert small.estimated_cycles == large.estimated_cycles
    assert few.seconds > 1.8 * many.seconds  # 16 x 16 is a torus, 4 x 4 has edges


def places(pod):
    """Devices of `pod` as its topology lists them, without a compiler."""

    class Device:
        def __init__(self, coords):
            self.coords = coords

    grid = (*pod.grid, 1, 1)[:3]
    return [Device(tuple(c)) for c in np.ndindex(*grid) for _ in range(pod.chip.devices)]


def exchange(pod, kind, size, groups=()):
    collective = Collective(kind, size, "ici", groups)
    read = Program((Instruction("x", kind, "collectives", 3, collective=collective),))
    (found,) = cost.communication(read, pod, places(pod))
    assert found.count == 3
    return found.bytes / 3, found.seconds / 3


def test_a_group_along_one_axis_has_the_links_of_that_axis():
    pod = parse_pod("v5e:16x16")
    row = tuple(tuple(range(i * 16, i * 16 + 16)) for i in range(16))
    assert exchange(pod, "all-reduce", 1 << 30, row)[1] == pytest.approx(
        2 * (1 << 30) * 15 / 16 / (2 * 45e9)
    )
    part = tuple(tuple(range(i * 4, i * 4 + 4)) for i in range(64))
    assert exchange(pod, "all-gather", 1 << 30, part)[1] == pytest.approx((1 << 30) * 3 / 4 / 45e9)


def test_small_exchanges_take_a_microsecond_a_hop():
    sent, time = exchange(parse_pod("v5e:16x16"), "all-reduce", 4)
    assert sent == pytest.approx(2 * 4 * 255 / 256, abs=1 / 3)
    assert time == pytest.approx(2 * 16e-6)


def test_two_devices_of_a_chip_share_its_links():
    pod = parse_pod("tpu7x:2x2x1")
    assert exchange(pod, "all-reduce", 1 << 20)[0] == pytest.approx(2 * (1 << 20) * 3 / 4)
    cores = (tuple(range(0, 8, 2)), tuple(range(1, 8, 2)))
    assert exchange(pod, "all-reduce", 1 << 20, cores)[0] == pytest.approx(4 * (1 << 20) * 3 / 4)
    assert exchange(pod, "all-reduce", 1 << 20, ((0, 1), (2, 3)))[0] == 0
    assert isinstance(pod, Pod)


def test_an_exchange_takes_what_the_work_beside_it_leaves():
    pod = parse_pod("v5e:16x16")
    second = int(pod.chip.hbm_bandwidth)  # bytes
    size = round(180e9 / 2 * 256 / 255)  # of which both ways take a second on four links
    total = Collective("all-reduce", size, "ici", ())

    def waiting(*instructions, **how):
        return cost.waiting(Program(instructions), pod, places(pod), **how)

    begin = Instruction("x", "fusion", "collectives", 2, collective=total)
    beside = Instruction("b", "fusion", "rest", 2, hbm_bytes=second // 4, beside=("x",))
    other = Instruction("o", "fusion", "rest", 2, hbm_bytes=second)
    assert waiting(begin, other) == pytest.approx(2.0, rel=0.01)
    assert waiting(begin, beside, other) == pytest.approx(1.5, rel=0.01)
    assert waiting(begin, beside, beside, other) == pytest.approx(1.0, rel=0.01)
    assert waiting(begin, *[beside] * 5, other) == pytest.approx(0.0, abs=0.01)
    assert waiting(begin, beside, other, work=2.0) == pytest.approx(1.0, rel=0.01)


def test_work_beside_two_exchanges_hides_its_own_time_once():
    pod = parse_pod("v5e:16x16")
    size = round(180e9 / 2 * 256 / 255)
    begin = [
        Instruction(name, "fusion", "rest", 1, collective=Collective("all-reduce", size, "ici", ()))
        for name in "xy"
    ]
    bytes_moved = int(1.5 * pod.chip.hbm_bandwidth)
    beside = Instruction("b", "fusion", "rest", 1, hbm_bytes=bytes_moved, beside=("x", "y"))
    waited = cost.waiting(Program((*begin, beside)), pod, places(pod))
    assert waited == pytest.approx(0.5, rel=0.01)
