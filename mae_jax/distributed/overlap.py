"""How a TPU's compiler is told to exchange while it computes."""

from typing import Any

from jax.sharding import Mesh

from mae_jax import UserError

# Matrices of gradients stay alone, vectors are summed together: libtpu sums several arrays at once
# only while nothing else runs.
LARGEST_SUM = {"xla_jf_crs_combiner_threshold_in_bytes": 8_000_000}
# In pieces, between those of the matrix products that follow; libtpu refuses that on other chips.
# Parameters split over both sides of a torus are gathered so, too, and not as sums with zeros.
BETWEEN_PRODUCTS = LARGEST_SUM | {
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}
# By the sparse cores, beside whatever the others do.
ON_SPARSE_CORES = LARGEST_SUM | {
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,
}
BY_DEVICE_KIND = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), BETWEEN_PRODUCTS),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), ON_SPARSE_CORES),
}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Of XLA, with which sums over devices run beside other work; for other chips UserError.

    Left alone libtpu sums gradients in a few large pieces beside which nothing runs, but on TPU7x,
    where it does better by itself. The options are among those that Google's recipes for training
    on TPUs (MaxText) set for all programs.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind not in BY_DEVICE_KIND:
        raise UserError(
            f"mesh.overlap=true is for TPU v5e and v6e; these devices are {kind}: leave it false"
        )
    return BY_DEVICE_KIND[kind]
