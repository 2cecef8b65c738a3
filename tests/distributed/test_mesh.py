import jax
import numpy as np
import pytest

from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import state_sharding


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, -1, (1, 8)), (4, 2, (4, 2))]
)
def test_minus_one_takes_what_the_other_axis_leaves(data, fsdp, shape):
    assert tuple(mesh_lib.make_mesh(data, fsdp).shape.values()) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, -1), (4, 4), (-1, 3), (-1, 16), (-1, -1), (8, 0)])
def test_a_mesh_that_does_not_cover_the_devices_is_refused(data, fsdp):
    with pytest.raises(ValueError, match=r"mesh\.data"):
        mesh_lib.make_mesh(data, fsdp)


def test_batch_that_does_not_divide_names_the_sizes_that_do():
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_batch(64, 2, mesh)
    with pytest.raises(ValueError, match=r"batch_size = 60 .* 8 device\(s\); .* 56, 64"):
        mesh_lib.check_batch(60, 1, mesh)
    with pytest.raises(ValueError, match=r"optim.accumulate = 2; .* 48, 64"):
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
