"""The kernel of attention, interpreted, is plain attention; compiled for TPUs it keeps less."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mae_jax import UserError
from mae_jax.models import stacked_attention_kernel
from mae_jax.models.attention import attention, stacked_attention
from mae_jax.models.attention_kernel import VMEM_BYTES, WORKING_BYTES, pieces
from mae_jax.models.vit import VARIANTS, Blocks
from mae_jax.planning.chips import parse_pod
from mae_jax.tasks import create_task
from tests.models.on_tpu import lowered_gradients


def arrays(dtype, images=2, tokens=197, heads=3, d=32):
    """Queries, keys, values and a cotangent [B, N, heads, head_dim]."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [2 * jax.random.normal(key, (images, tokens, heads, d)).astype(dtype) for key in keys]


def with_gradients(kind, q, k, v, cotangent):
    """Values and gradients; `kind` "stacked" is the kernel of few tokens."""

    def compute(*factors):
        if kind != "stacked":
            return attention(*factors, kind=kind)
        flat = (x.reshape(*x.shape[:2], -1) for x in factors)
        return stacked_attention(*flat, q.shape[-1]).reshape(q.shape)

    out, backward = jax.vjp(compute, q, k, v)
    return [out, *backward(cotangent)]


def far(x, exact):
    """The largest difference, as a share of the largest number."""
    x, exact = (np.asarray(a, np.float64) for a in (x, exact))
    return np.abs(x - exact).max() / np.abs(exact).max()


def by_numpy(q, k, v, cotangent):
    """Values and gradients in float64, written out."""
    q, k, v, cotangent = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, cotangent))
    scale = q.shape[-1] ** -0.5
    weights = np.exp(q @ k.swapaxes(2, 3) * scale)
    weights /= weights.sum(-1, keepdims=True)  # [B, heads, N, N]
    by_weights = cotangent @ v.swapaxes(2, 3)
    by_logits = weights * (by_weights - (weights * by_weights).sum(-1, keepdims=True)) * scale
    by_query, by_key = by_logits @ k, by_logits.swapaxes(2, 3) @ q
    all_four = weights @ v, by_query, by_key, weights.swapaxes(2, 3) @ cotangent
    return [x.swapaxes(1, 2) for x in all_four]


FEW = {"tokens": 50, "heads": 4, "d": 64}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("kernel", {"tokens": 197}),
        ("kernel", {"tokens": 129, "d": 64}),
        ("kernel", {"tokens": 257, "images": 1, "heads": 5}),
        # Several pieces of several rounds.
        ("kernel", {"tokens": 145, "images": 16, "heads": 4, "d": 8}),
        ("stacked", FEW),
        ("stacked", FEW | {"images": 64, "heads": 2}),
        ("stacked", {"tokens": 99, "heads": 2, "d": 128}),
        ("stacked", {"tokens": 128, "heads": 4}),
        ("stacked", {"tokens": 3, "heads": 8, "d": 16}),
    ],
)
def test_values_and_gradients_in_float32_are_those_of_numpy(kind, shape):
    given = arrays(jnp.float32, **shape)
    for mine, exact in zip(with_gradients(kind, *given), by_numpy(*given), strict=True):
        assert far(mine, exact) < 1e-5


@pytest.mark.parametrize(("kind", "shape"), [("kernel", {}), ("stacked", FEW)])
def test_in_bfloat16_it_errs_no_more_than_plain_attention(kind, shape):
    given = arrays(jnp.bfloat16, **shape)
    exact = by_numpy(*(x.astype(jnp.float32) for x in given))
    kernel, plain = (with_gradients(name, *given) for name in (kind, "plain"))
    for mine, theirs, true in zip(kernel, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype == jnp.bfloat16
        assert far(mine, true) < 1.5 * far(theirs, true)


@pytest.mark.parametrize(("kind", "shape"), [("kernel", {}), ("stacked", FEW)])
def test_large_logits_do_not_overflow(kind, shape):
    q, k, v, cotangent = arrays(jnp.float32, **shape)
    out, *_ = with_gradients(kind, 200 * q, k, v, cotangent)
    assert far(out, attention(200 * q, k, v)) < 1e-4


@pytest.mark.parametrize(
    ("variant", "tokens", "kernel"),
    [
        ("b", 50, "stacked_attention_forward_64"),
        ("l", 128, "stacked_attention_forward_64"),
        ("l", 129, "attention_forward"),
        ("h", 50, None),  # heads of 80 do not share registers
        ("h", 257, "attention_forward"),
        ("ti", 50, None),  # three heads are one register and a half
    ],
)
def test_each_number_of_tokens_has_its_kernel(variant, tokens, kernel):
    shape = VARIANTS[variant]
    model = Blocks(1, shape.heads, jnp.float32, attention="kernel")
    x = jax.ShapeDtypeStruct((2, tokens, shape.width), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    text = str(jax.make_jaxpr(model.apply)(params, x))
    assert ("pallas_call" in text) == (kernel is not None)
    assert kernel is None or f"name={kernel}\n" in text


@pytest.mark.parametrize("grid", [(7, 7), (14, 14)])
def test_relative_biases_are_refused(grid):
    x = jax.ShapeDtypeStruct((2, 1 + grid[0] * grid[1], 128), jnp.float32)
    model = Blocks(1, 2, jnp.float32, bias_grid=grid, attention="kernel")
    with pytest.raises(ValueError, match="no relative biases"):
        jax.eval_shape(model.init, jax.random.key(0), x)


@pytest.mark.parametrize("units", [1, 7, 24, 768, 1024])
@pytest.mark.parametrize("size", [(32, 197), (64, 197), (32, 257), (64, 577), (64, 1025)])
def test_pieces_divide_the_heads_and_fit_into_the_chip(units, size):
    d, n = size
    together, rounds = pieces(units, d, n, 2)
    assert units % (together * rounds) == 0
    lanes = -(-n // 128) * 128
    assert together == 1 or 16 * together * n * n <= WORKING_BYTES
    read_and_written = 2 * 7 * 2 * together * rounds * d * lanes
    assert rounds == 1 or read_and_written <= VMEM_BYTES - WORKING_BYTES


@pytest.mark.parametrize("images", [1, 7, 24, 64, 1024])
@pytest.mark.parametrize("size", [(50, 64, 2), (50, 64, 4), (128, 64, 2), (128, 32, 4)])
def test_pieces_of_few_tokens_divide_the_images_and_fit_into_the_chip(images, size):
    n, d, itemsize = size
    together, rounds = stacked_attention_kernel.pieces(images, n, d, itemsize)
    assert images % (together * rounds) == 0
    queries = -(-128 // d * n // 128) * 128
    assert together == 1 or 16 * together * n * queries <= WORKING_BYTES
    read_and_written = 2 * 7 * together * rounds * n * 128 * itemsize
    assert rounds == 1 or read_and_written <= VMEM_BYTES - WORKING_BYTES


@pytest.mark.parametrize("tokens", [(8, 145, 32), (8, 50, 128)])
def test_blocks_split_over_devices_compute_the_same_either_way(tokens):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    x = jax.random.normal(jax.random.key(1), tokens)
    params = Blocks(2, 2, jnp.float32).init(jax.random.key(0), x[:1])

    def gradients(kind):
        model = Blocks(2, 2, jnp.float32, attention=kind)

        def on_one_device(params, x):
            by_all = jax.grad(lambda p: (model.apply(p, x) ** 2).mean())(params)
            return jax.lax.pmean(by_all, "data")

        specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
        return jax.jit(jax.shard_map(on_one_device, mesh=mesh, **specs))(params, x)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients("kernel"), gradients("plain"))


def test_other_devices_are_refused_by_name(tiny_config):
    tiny_config.model.attention = "kernel"
    mesh = Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(UserError, match=r"model\.attention=kernel is for TPUs .* cpu: leave it"):
        create_task(tiny_config, 100, None, mesh)


def test_tpus_that_cannot_run_it_are_refused_by_name(tiny_config):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    tiny_config.model.attention = "kernel"
    mesh = Mesh(np.array(parse_pod("v3-8").topology().devices), ("data",))
    with pytest.raises(UserError, match=r"from v4 on; these devices are TPU v3: leave it plain"):
        create_task(tiny_config, 100, None, mesh)


def test_pallas_is_not_imported_for_plain_attention():
    check = "import sys, mae_jax.main; sys.exit('jax.experimental.pallas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [(32, 197, 512), (256, 50, 1024)])
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_compiled_for_a_tpu_it_keeps_no_weights(name, tokens):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")

    def temporaries(kind):
        lowered = lowered_gradients(parse_pod(name), tokens, 16, attention=kind)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    images, n, _ = tokens
    weights = images * 16 * n * -(-n // 128) * 128 * 2  # in bfloat16, the last axis padded
    assert temporaries("plain") - temporaries("kernel") > weights
