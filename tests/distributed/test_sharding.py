import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import (
    abstract_state,
    bytes_per_device,
    gather_params,
    shardings_of,
    state_sharding,
)
from mae_jax.tasks import create_task


def test_matrices_split_on_their_largest_divisible_axis_and_small_tensors_are_copied():
    mesh = mesh_lib.make_mesh(1, 8)
    tree = {
        "encoder": {
            "mlp": {"kernel": jnp.zeros((16, 64)), "bias": jnp.zeros(64)},
            "norm1": {"scale": jnp.zeros(64)},
            "odd": {"kernel": jnp.zeros((15, 24))},
            "prime": {"kernel": jnp.zeros((7, 9))},
            "cls_token": jnp.zeros((1, 1, 64)),
        }
    }
    specs = jax.tree.map(lambda s: s.spec, state_sharding(tree, mesh))["encoder"]
    assert specs["mlp"] == {"kernel": P(None, "fsdp"), "bias": P()}
    assert specs["odd"]["kernel"] == P(None, "fsdp")
    assert specs["prime"]["kernel"] == specs["norm1"]["scale"] == specs["cls_token"] == P()


def test_optimizer_state_lies_as_its_parameters_do(tiny_config):
    task = create_task(tiny_config, 100, None, mesh_lib.make_mesh(1, 8))
    split = abstract_state(task.init, task.mesh)
    shardings = shardings_of(split)
    moments = shardings.opt_state[0]
    assert moments.mu == shardings.params
    assert moments.nu == shardings.params
    replicated = abstract_state(task.init, mesh_lib.make_mesh(8, 1))
    assert bytes_per_device(split) < 0.3 * bytes_per_device(replicated)
    assert bytes_per_device(replicated) == sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(replicated)
    )


def test_gathered_parameters_are_whole_and_what_layers_cast_is_in_the_compute_type():
    mesh = mesh_lib.make_mesh(1, 8)
    kernel = jnp.arange(128.0).reshape(8, 16)
    tree = {
        "blocks": {"0": {"mlp": {"kernel": kernel, "bias": jnp.zeros(16)}}},
        "pos_embed": jnp.zeros((1, 8, 16)),
        "head": {"kernel": kernel},
    }
    split = jax.device_put(tree, state_sharding(tree, mesh))
    gathered = jax.jit(lambda t: gather_params(t, mesh, jnp.bfloat16))(split)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(gathered))
    layer = gathered["blocks"]["0"]["mlp"]
    assert layer["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer["kernel"].astype(jnp.float32), kernel)
    for exact in (layer["bias"], gathered["pos_embed"], gathered["head"]["kernel"]):
        assert exact.dtype == jnp.float32
