import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import abstract_state, state_sharding
from mae_jax.planning.chips import parse_pod
from mae_jax.tasks import create_task
from mae_jax.train.step import lower_step


@dataclasses.dataclass(frozen=True)
class Device:
    """One that is not there."""

    id: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


def slices(count, height, width):
    """Devices of slices of a TPU, in no order that helps."""
    places = [(s, x, y) for x in range(width) for s in range(count) for y in range(height)]
    return [Device(i, s, (x, y, 0)) for i, (s, x, y) in enumerate(places)]


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, -1, (1, 8)), (-1, -1, (1, 8)), (4, 2, (4, 2))],
)
def test_minus_one_takes_what_the_other_axis_leaves(data, fsdp, shape):
    assert tuple(mesh_lib.make_mesh(data, fsdp).shape.values()) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, -1), (4, 4), (-1, 3), (-1, 16), (8, 0)])
def test_a_mesh_that_does_not_cover_the_devices_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=r"mesh\.data"):
        mesh_lib.make_mesh(data, fsdp)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 16])
def test_slices_split_the_batch_and_fsdp_stays_in_one(fsdp):
    mesh = mesh_lib.make_mesh(-1, fsdp, slices(4, 4, 4))
    assert dict(mesh.shape) == {"data": 64 // fsdp, "fsdp": fsdp}
    of_rows = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(of_rows, np.repeat(np.arange(4), 16).reshape(-1, fsdp))
    assert len(set(mesh.devices.flat)) == 64


def test_fsdp_may_take_a_whole_slice():
    assert dict(mesh_lib.make_mesh(-1, -1, slices(4, 4, 4)).shape) == {"data": 4, "fsdp": 16}


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 32), (1, -1), (2, 32)])
def test_fsdp_that_leaves_a_slice_is_refused(data, fsdp):
    with pytest.raises(
        ValueError, match=r"mesh\.fsdp = \d+ does not .*: there are 4 of 16 devices"
    ):
        mesh_lib.make_mesh(data, fsdp, slices(4, 4, 4))


def test_an_axis_of_the_grid_may_be_divided_between_both_of_the_mesh():
    assert mesh_lib.make_mesh(-1, 4, slices(1, 8, 8)).devices.shape == (16, 4)  # of no side 4


def test_nodes_of_gpus_are_neighbours_but_no_slices():
    gpus = [Device(i, i // 4, platform="gpu", device_kind="NVIDIA H100") for i in range(16)]
    mesh = mesh_lib.make_mesh(-1, 8, gpus[::-1])
    np.testing.assert_array_equal(
        np.vectorize(lambda device: device.id)(mesh.devices), np.arange(16).reshape(2, 8)
    )


@pytest.mark.slow
def test_only_gradients_leave_a_slice(tiny_config):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    tiny_config.compute_dtype = "bfloat16"
    tiny_config.model.width, tiny_config.decoder.width = 256, 128
    mesh = mesh_lib.make_mesh(-1, 2, list(parse_pod("v5e:2x2", slices=2).topology().devices))
    task = create_task(tiny_config, 100, None, mesh)
    state = abstract_state(task.init, mesh)
    text = lower_step(task, state).compile().as_text()
    kind = r"(all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)"
    groups = re.findall(rf" {kind}(?:-start)?\(.*?replica_groups=\{{([\d,{{}}]+)\}},", text)
    # Within a slice ids are those of its four devices; its program is that of every slice.
    assert {int(i) for _, group in groups for i in re.findall(r"\d+", group)} == set(range(4))
    assert ("all-gather", "{0,1},{2,3}") in groups
    sent = re.findall(r"= \(f32\[([\d,]+)\].* send\(.*transfer_type=\"(\w+)\"", text)
    assert len(sent) == len(re.findall(r" send\(", text)) > 0
    assert {what for _, what in sent} == {"ALL_REDUCE"}
    a_device = sum(4 * math.prod(map(int, shape.split(","))) for shape, _ in sent)
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    # Each device sends what it has summed, a quarter; padded to whole tiles.
    assert gradients <= 4 * a_device < 1.1 * gradients


def test_batch_that_does_not_divide_names_the_sizes_that_do():
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_batch(64, 2, mesh)
    with pytest.raises(ValueError, match=r"batch_size = 60 .* 8 device\(s\); .* 56 or 64"):
        mesh_lib.check_batch(60, 1, mesh)
    with pytest.raises(ValueError, match=r"optim.accumulate = 2; .* 48 or 64"):
        mesh_lib.check_batch(56, 2, mesh)


def test_global_batch_puts_every_row_in_its_place():
    mesh = mesh_lib.make_mesh(2, 4)
    positions = mesh_lib.local_positions(16, mesh)
    np.testing.assert_array_equal(positions, np.arange(16))
    rows = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)}
    batch = mesh_lib.global_batch(rows, positions, 16, mesh)
    np.testing.assert_array_equal(batch["image"], rows["image"])
    for shard in batch["image"].addressable_shards:
        assert shard.data.shape == (2, 3)
        np.testing.assert_array_equal(shard.data, rows["image"][shard.index])


def test_replicated_arrays_are_whole_on_every_device():
    mesh = mesh_lib.make_mesh()
    array = mesh_lib.replicate(np.arange(5), mesh)
    assert array.is_fully_replicated
    assert len(array.addressable_shards) == len(jax.devices())
    np.testing.assert_array_equal(array, np.arange(5))


def test_split_arrays_come_to_the_host_without_a_program_that_collects_them():
    mesh = mesh_lib.make_mesh(1, 8)
    whole = {"w": np.arange(128.0, dtype=np.float32).reshape(16, 8), "n": np.float32(3)}
    split = mesh_lib.place(whole, state_sharding(whole, mesh))
    assert not split["w"].is_fully_replicated
    programs = []

    def listener(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    before = {id(array) for array in jax.live_arrays()}
    host = mesh_lib.to_host(split)
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert not programs
    assert max(array.size for array in new) <= 128 // 8  # what one device has of it
    jax.tree.map(np.testing.assert_array_equal, host, whole)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    jax.jit(lambda x: x, out_shardings=mesh_lib.replicated(mesh))(split["w"])
    assert programs  # such as would be seen above
