"""Gradients on any mesh and in any number of parts; what is exchanged for them, in which type."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.distributed import mesh as mesh_lib
from mae_jax.distributed.sharding import state_sharding
from mae_jax.train.gradients import gradients
from mae_jax.train.state import create_state

EXAMPLES, INPUTS, OUTPUTS = 64, 16, 8
BYTES = {"f32": 4, "bf16": 2}


def data():
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"0": {"kernel": rng.normal(size=(INPUTS, OUTPUTS)), "bias": rng.normal(size=8)}}
    }
    batch = {"x": rng.normal(size=(EXAMPLES, INPUTS)), "y": rng.normal(size=(EXAMPLES, OUTPUTS))}
    return jax.tree.map(lambda x: x.astype(np.float32), (params, batch))


def loss_fn(weights, extra, batch):
    """Least squares, with the product of a layer in the type of the gathered kernel."""
    layer = weights["blocks"]["0"]
    x = batch["x"].astype(extra["compute"].dtype)
    product = (x @ layer["kernel"].astype(x.dtype)).astype(jnp.float32)
    error = product + layer["bias"] - batch["y"]
    return jnp.square(error).mean(), {"error": error.mean()}


def program(devices, fsdp, parts, compute=jnp.float32, reduce=jnp.float32):
    """The gradients as a jitted function, with its arguments laid out on a mesh."""
    mesh = mesh_lib.make_mesh(-1, fsdp, jax.devices()[:devices])
    params, batch = data()
    extra = {"compute": jnp.zeros(1, compute)}
    state = create_state(params, optax.sgd(1.0), keep_ema=False, extra=extra)
    state = jax.device_put(state, state_sharding(state, mesh))
    batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    options = {"parts": parts, "compute_dtype": compute, "reduce_dtype": reduce}
    run = jax.jit(lambda state, batch: gradients(loss_fn, state, batch, mesh=mesh, **options))
    return run, (state, batch)


@pytest.mark.parametrize(
    ("devices", "fsdp", "parts"), [(1, 1, 1), (1, 1, 4), (8, 1, 2), (8, 8, 1), (8, 4, 4), (4, 2, 2)]
)
def test_gradients_and_metrics_equal_numpy(devices, fsdp, parts):
    run, arguments = program(devices, fsdp, parts)
    grads, metrics = run(*arguments)
    params, batch = data()
    layer = params["blocks"]["0"]
    error = (batch["x"] @ layer["kernel"] + layer["bias"] - batch["y"]).astype(np.float64)
    got = grads["blocks"]["0"]
    np.testing.assert_allclose(got["kernel"], 2 * batch["x"].T @ error / error.size, rtol=1e-5)
    np.testing.assert_allclose(got["bias"], 2 * error.sum(0) / error.size, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.square(error).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], error.mean(), rtol=1e-5)
    for p, g in zip(*map(jax.tree.leaves, (arguments[0].params, grads)), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, p.ndim)


def exchanged(text):
    """Of a compiled program: {(collective, in a loop): [(type, numbers), ...]}."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, inside = {}, False
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        inside = header[1] in bodies if header else inside
        call = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", line)
        if call:
            for kind, shape in re.findall(r"(f32|bf16)\[([\d,]*)\]", call[1]):
                numbers = math.prod(map(int, shape.split(","))) if shape else 1
                if numbers > 1:  # means of metrics aside
                    found.setdefault((call[2], inside), []).append((kind, numbers))
    return found


KERNEL = INPUTS * OUTPUTS


@pytest.mark.parametrize("parts", [1, 4])
def test_a_replicated_kernel_is_summed_once_a_step(parts):
    run, arguments = program(8, 1, parts)
    found = exchanged(run.lower(*arguments).compile().as_text())
    assert found.keys() == {("all-reduce", False)}
    assert sorted(n for _, n in found["all-reduce", False]) == [OUTPUTS, KERNEL]


@pytest.mark.parametrize("parts", [1, 4])
def test_a_split_kernel_is_gathered_once_scattered_in_each_part_and_its_slice_summed_once(parts):
    run, arguments = program(8, 4, parts)
    found = exchanged(run.lower(*arguments).compile().as_text())
    in_parts = parts > 1
    assert found == {
        ("all-gather", False): [("f32", KERNEL)],
        ("reduce-scatter", in_parts): [("f32", KERNEL // 4)],
        ("all-reduce", False): found["all-reduce", False],
    }
    assert sorted(n for _, n in found["all-reduce", False]) == [OUTPUTS, KERNEL // 4]


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_gradients_of_matrices_are_summed_in_the_type_asked_for(fsdp, reduce):
    run, arguments = program(8, fsdp, 1, jnp.bfloat16, jnp.dtype(reduce))
    # Before the compiler: a CPU sums bfloat16 in float32, whatever it is asked for.
    text = run.lower(*arguments).as_text()
    sums = re.findall(
        r"stablehlo\.(?:all_reduce|reduce_scatter).*?-> tensor<(\d[\dx]*)x(b?f\d+)>", text, re.S
    )
    kinds = {kind for shape, kind in sums if "x" in shape}
    assert kinds == {{"float32": "f32", "bfloat16": "bf16"}[reduce]}
    assert {kind for shape, kind in sums if "x" not in shape} == {"f32"}  # the bias
    gathered = re.findall(r"stablehlo\.all_gather.*?-> tensor<[\dx]*(b?f\d+)>", text, re.S)
    assert gathered == ["bf16"] * (fsdp > 1)


def test_sums_in_float32_are_nearer_the_truth():
    params, batch = data()
    layer = params["blocks"]["0"]
    errors = {}
    for reduce in (jnp.float32, jnp.bfloat16):
        run, arguments = program(8, 1, 1, jnp.bfloat16, reduce)
        grads, _ = run(*arguments)
        error = batch["x"] @ layer["kernel"] + layer["bias"] - batch["y"]
        exact = 2 * batch["x"].T @ error / error.size
        errors[reduce] = np.linalg.norm(grads["blocks"]["0"]["kernel"] - exact)
    assert errors[jnp.float32] < 0.9 * errors[jnp.bfloat16]


def test_examples_may_carry_random_keys():
    def noisy(weights, extra, batch):
        noise = jax.vmap(jax.random.normal)(batch["key"])
        return (weights["w"] * noise).mean(), {}

    keys = jax.random.split(jax.random.key(0), 16)
    state = create_state({"w": jnp.ones(())}, optax.sgd(1.0), keep_ema=False)
    expected = jax.vmap(jax.random.normal)(keys).mean()
    for devices, parts in ((1, 1), (1, 4), (8, 2)):
        mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
        run = jax.jit(lambda s, b, m=mesh, n=parts: gradients(noisy, s, b, mesh=m, parts=n))
        grads, _ = run(state, {"key": keys})
        np.testing.assert_allclose(grads["w"], expected, rtol=1e-5)
