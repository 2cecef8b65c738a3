"""That exchange goes on beside other work is read from programs that the TPU's compiler made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mae_jax import UserError
from mae_jax.distributed.overlap import compiler_options
from mae_jax.planning import cost, program
from mae_jax.planning.chips import parse_pod
from mae_jax.tasks import create_task

WIDTH = 2048  # a matrix of gradients is 16 MiB


def gradients_of_products(pod, options):
    """Four products, one after the other; backwards each makes a matrix to be summed."""
    mesh = Mesh(np.array(pod.topology().devices), ("data",))

    def loss(matrices, x):
        for matrix in matrices:
            x = jnp.tanh(x @ matrix.astype(x.dtype))
        return x.astype(jnp.float32).sum()

    def summed(matrices, x):
        return jax.tree.map(lambda g: jax.lax.psum(g, "data"), jax.grad(loss)(matrices, x))

    step = jax.shard_map(
        summed, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    matrices = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 4
    x = jax.ShapeDtypeStruct((4096 * mesh.size, WIDTH), jnp.bfloat16)
    lowered = jax.jit(step, compiler_options=options(mesh)).lower(matrices, x)
    return program.compile_and_read(lowered)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2"])
def test_gradients_are_summed_beside_products(name):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    pod = parse_pod(name)
    alone = gradients_of_products(pod, lambda mesh: {})
    overlapped = gradients_of_products(pod, compiler_options)
    exchange = sum(one.seconds for one in cost.communication(alone, pod))
    assert cost.waiting(alone, pod) == pytest.approx(exchange)
    assert sum(one.bytes for one in cost.communication(overlapped, pod)) == sum(
        one.bytes for one in cost.communication(alone, pod)
    )
    # Nothing follows the last sum, which is a quarter of all.
    assert exchange / 4 < cost.waiting(overlapped, pod) < 0.8 * exchange


def test_other_devices_are_refused_by_name(tiny_config):
    tiny_config.mesh.overlap = True
    mesh = Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(UserError, match=r"mesh\.overlap=true is for .*; these devices are cpu: "):
        create_task(tiny_config, 100, None, mesh)
