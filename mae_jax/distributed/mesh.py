"""The device mesh, and arrays on it: `data` and `fsdp` split the batch, `fsdp` the state too."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mae_jax import UserError

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; -1 takes what the other axis leaves, and of two `fsdp`
    takes a slice.

    Several TPU slices split the batch: `data` goes over the network between them, `fsdp` stays on
    the links inside one. Processes with GPUs or CPUs are no slices; their order makes neighbours.
    """
    devices = jax.devices() if devices is None else devices
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    try:
        data = slices if data == fsdp == -1 else data
        data, fsdp = np.empty(len(devices)).reshape(data, fsdp).shape
    except ValueError as error:
        raise UserError(
            f"mesh.data = {data} by mesh.fsdp = {fsdp} does not cover the {len(devices)} device(s) "
            "present; -1 for one of them fits it to the other"
        ) from error
    if data % slices:
        raise UserError(
            f"mesh.fsdp = {fsdp} does not fit into a slice: there are {slices} of "
            f"{len(devices) // slices} devices; give a divisor of that, with mesh.data = -1"
        )
    # Where a shape asks for it, a side of the physical grid is divided between both axes.
    if slices > 1:
        inside, over = (data // slices, fsdp), (slices, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, over, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(grid, BATCH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, field: str = "batch_size") -> None:
    """Raises UserError where the batch does not split evenly over devices and micro-batches."""
    parts = mesh.size * accumulate
    if batch_size % parts:
        near = [n for n in (batch_size // parts * parts, (batch_size // parts + 1) * parts) if n]
        raise UserError(
            f"{field} = {batch_size} does not divide over {mesh.size} device(s)"
            + (f" and optim.accumulate = {accumulate}" if accumulate > 1 else "")
            + f"; near it: {' or '.join(map(str, near))}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over every device."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def local_positions(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, ascending: [b] int32."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in indices.values()]
    return np.unique(np.concatenate(rows)).astype(np.int32)


def global_batch(
    batch: dict[str, np.ndarray], positions: np.ndarray, batch_size: int, mesh: Mesh
) -> Any:
    """Global arrays [batch_size, ...] from this process's rows [b, ...], its `local_positions`."""
    sharding = batch_sharding(mesh)

    def assemble(local: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(positions, start)
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, rows)

    return jax.tree.map(assemble, batch)


def abstract_batch(schema: Mapping[str, tuple], batch_size: int, mesh: Mesh) -> Any:
    """What `global_batch` returns, as shapes, types and shardings; `schema`: (shape, dtype)s."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in schema.items()
    }


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, equal in every process, as global arrays laid out by `shardings`."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)

    return jax.tree.map(one, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, equal in every process, as fully replicated global arrays."""
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def to_host(tree: Any) -> Any:
    """Global arrays, however they are laid out, as numpy arrays in every process.

    No device holds more than one whole array at a time for it, and none where a process sees all.
    """

    def one(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)  # put together on the host
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
