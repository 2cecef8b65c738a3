"""A compiled training step, read back: its work, parts and exchanges are those of the model."""

import jax
import numpy as np
import pytest

from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import abstract_state
from mae_jax.models import flops
from mae_jax.planning import cost, program
from mae_jax.planning.chips import parse_pod
from mae_jax.tasks import create_task
from mae_jax.train.step import lower_step


@pytest.fixture
def compiled(tiny_config):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")

    def step(pod="v5e:2x2", slices=1, **changes):
        tiny_config.compute_dtype = "bfloat16"
        tiny_config.model.width, tiny_config.decoder.width = 256, 128
        for name, value in changes.items():
            tiny_config[name.split("__")[0]][name.split("__")[1]] = value
        pod = parse_pod(pod, slices)
        mesh = mesh_lib.make_mesh(-1, tiny_config.mesh.fsdp, list(pod.topology().devices))
        task = create_task(tiny_config, 100, None, mesh)
        state = abstract_state(task.init, mesh)
        _, read = program.compile_and_read(lower_step(task, state))
        return task, state, read, cost.communication(read, pod, list(mesh.devices.flat))

    return step


def multiply_adds(task):
    """FLOPs of a step on one device: pixels need no gradient, and removed patches no embedding."""
    images, patches, kept = task.batch_size // task.mesh.size, 16, 4
    embedding = 2 * task.encoder.patch_size**2 * 3 * task.encoder.width  # of one patch
    whole = flops.train_flops(flops.mae_forward_macs(task.model, kept))
    return images * (whole - 3 * patches * embedding + 2 * kept * embedding)


def test_work_parts_and_sums_are_those_of_the_model(compiled):
    task, state, read, exchanged = compiled()
    assert read.flops == multiply_adds(task)
    blocks = {f"{a} {b}" for a in ("encoder", "decoder") for b in ("MLP", "projections", "norms")}
    others = {"encoder attention", "decoder attention", "masks", "images", "target", "optimizer"}
    parts = cost.estimate(read, parse_pod("v5e:2x2").chip)
    assert set(parts) >= blocks | others
    assert parts["rest"].seconds < 0.2 * sum(part.seconds for part in parts.values())
    (total,) = exchanged
    size = sum(4 * np.prod(x.shape) for x in jax.tree.leaves(state.params))
    assert total.kind == "all-reduce"
    assert total.bytes == pytest.approx(2 * size * 3 / 4, rel=1e-3)  # metrics ride along


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"model__stacking": "scan"}, {"optim__accumulate": 2}])
def test_work_in_loops_counts_as_often_as_it_is_done(compiled, changes):
    task, _, read, _ = compiled(**changes)
    assert max(i.times for i in read.instructions) == 2
    assert read.flops == multiply_adds(task)


@pytest.mark.slow
def test_what_is_computed_again_is_counted_again(compiled):
    task, _, read, _ = compiled(model__remat="full")
    assert read.flops > 1.1 * multiply_adds(task)


@pytest.mark.slow
def test_split_parameters_are_gathered_once_and_their_gradients_scattered(compiled):
    _, state, _, exchanged = compiled(mesh__fsdp=4)
    found = {x.kind: x for x in exchanged}
    split = [
        np.prod(leaf.shape)
        for leaf in jax.tree.leaves(state.params)
        if "fsdp" in leaf.sharding.spec
    ]
    assert found["all-gather"].bytes == pytest.approx(2 * sum(split) * 3 / 4, rel=1e-3)
    assert found["reduce-scatter"].bytes == pytest.approx(4 * sum(split) * 3 / 4, rel=0.01)


@pytest.mark.slow
def test_a_step_sums_gradients_beside_other_work_where_it_is_told_to(compiled):
    # Matrices of 16 MiB, which 16 images leave little to do beside.
    _, _, read, exchanged = compiled(model__width=1024, mesh__overlap=True)
    seconds = sum(one.seconds for one in exchanged)
    assert cost.waiting(read, parse_pod("v5e:2x2")) < 0.99 * seconds


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_slices_exchange_each_gradient_once(compiled, fsdp):
    _, state, _, exchanged = compiled(slices=2, mesh__fsdp=fsdp)
    found = {(x.kind, x.over): x for x in exchanged}
    size = sum(4 * np.prod(x.shape) for x in jax.tree.leaves(state.params))
    # A chip of four has a quarter, sends half of it to be summed and half of the sum back.
    assert found["all-reduce", "dcn"].bytes == pytest.approx(size / 4, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "tpu7x:1x1x1"])
def test_steps_of_every_generation_are_read(compiled, name):
    fsdp = 2 if name.startswith("tpu7x") else 1
    task, _, read, exchanged = compiled(pod=name, mesh__fsdp=fsdp)
    # tpu7x computes a small product again rather than keep it.
    assert read.flops == pytest.approx(multiply_adds(task), rel=0.01)
    assert exchanged
