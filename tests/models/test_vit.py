import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models import vit
from mae_jax.models.attention import attention
from mae_jax.models.masking import sample_masking
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import Blocks, ViT, group, product, sincos_position_table
from mae_jax.planning import program
from mae_jax.planning.chips import parse_pod
from tests.models.on_tpu import lowered_gradients

SMALL = {"image_size": (8, 12), "patch_size": 4, "channels": 2, "width": 32, "depth": 3, "heads": 4}


@pytest.mark.parametrize(
    ("width", "side", "total"),
    [
        (768, 14, 69594.4938),
        (1024, 14, 92849.1979),
        (1280, 16, 149578.4058),
        (512, 14, 46340.3331),
        (512, 16, 59700.6785),
    ],
)
def test_position_table_has_the_reference_values(width, side, total):
    table = sincos_position_table(width, (side, side))
    assert table.shape == (1 + side**2, width)
    np.testing.assert_allclose(table.sum(dtype=np.float64), total, atol=1e-3)
    assert not table[0].any()
    # Columns come first: moving one patch right changes channel 0, one down channel D/2.
    np.testing.assert_allclose(table[2, 0], 0.841471, atol=1e-6)
    np.testing.assert_allclose(table[1 + side, 0], 0, atol=1e-6)
    np.testing.assert_allclose(table[1 + side, width // 2], 0.841471, atol=1e-6)


@pytest.mark.parametrize(("contracted", "kernel"), [(1, (5, 2, 3)), (2, (4, 5, 3)), (1, (5, 7))])
def test_products_have_the_values_and_gradients_of_tensordot(contracted, kernel):
    inputs = (2, 3, 4, 5)
    shapes = inputs, kernel, inputs[:-contracted] + kernel[contracted:]
    rng = np.random.default_rng(0)
    x, w, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    ours = lambda x, w: (product(x, w, jnp.float32, contracted) * weights).sum()  # noqa: E731
    theirs = lambda x, w: (jnp.tensordot(x, w, contracted) * weights).sum()  # noqa: E731
    np.testing.assert_allclose(ours(x, w), theirs(x, w), rtol=1e-5)
    for got, expected in zip(*(jax.grad(f, (0, 1))(x, w) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("platform", "as_matrices"), [("cpu", True), ("tpu", False)])
def test_products_backwards_are_plain_matrices_on_cpus_alone(platform, as_matrices):
    gradient = jax.grad(lambda x, w: product(x, w, jnp.float32).sum(), (0, 1))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 5, 8), (8, 3))]
    lowered = jax.jit(gradient).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 2  # those of the other platform are not there
    assert all(("tensor<20x" in line) == as_matrices for line in products)


def test_attention_equals_numpy():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 8))
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v)
    got = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_softmax_runs_in_float32_under_bfloat16():
    text = str(jax.make_jaxpr(attention)(*[jnp.zeros((1, 4, 2, 8), jnp.bfloat16)] * 3))
    (line,) = (line for line in text.splitlines() if " exp " in line)
    assert "f32" in line


@pytest.fixture(scope="module")
def small():
    images = jax.random.normal(jax.random.key(1), (2, 8, 12, 2))
    params = ViT(**SMALL).init(jax.random.key(0), images)
    return images, params


def test_every_stacking_and_remat_gives_the_same_values_and_gradients(small):
    images, params = small

    weights = jax.random.normal(jax.random.key(2), (2, 7, 32))

    def run(stacking, remat):
        model = ViT(**SMALL, stacking=stacking, remat=remat)
        return jax.jit(
            jax.value_and_grad(lambda params: (model.apply(params, images) * weights).sum())
        )(params)

    value, grads = run("unrolled", "none")
    for stacking, remat in itertools.product(("unrolled", "scan"), ("none", "dots", "full")):
        other_value, other_grads = run(stacking, remat)
        np.testing.assert_allclose(value, other_value, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, other_grads
        )


@pytest.mark.parametrize("stacking", ["unrolled", "scan"])
def test_remat_lowers_the_memory_of_the_compiled_gradients(stacking):
    x = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)

    def working_memory(remat):
        model = Blocks(6, 2, jnp.float32, stacking, remat)
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        grad = jax.grad(lambda params, x: jnp.square(model.apply(params, x)).mean())
        # The default order of a CPU program is not one that saves memory; an accelerator's is.
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        compiled = jax.jit(grad).lower(params, x).compile(compiler_options=options)
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = (working_memory(remat) for remat in ("none", "dots", "full"))
    assert dots < 0.75 * none
    assert full < dots


def test_encoding_all_patches_by_id_equals_encoding_whole_images(small):
    images, params = small
    model = ViT(**SMALL)
    whole = model.apply(params, images)  # [B, 1 + L, D]
    order = np.asarray([[3, 1, 0, 5, 4, 2], [0, 2, 4, 1, 3, 5]])
    shuffled = model.apply(params, images, jnp.asarray(order))
    np.testing.assert_allclose(shuffled[:, 0], whole[:, 0], atol=1e-5)
    for row in range(2):
        np.testing.assert_allclose(shuffled[row, 1:], whole[row, 1 + order[row]], atol=1e-5)


def test_bfloat16_compute_keeps_float32_parameters(small):
    _, params = small
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_a_float32_residual_stream_halves_the_error_of_bfloat16_compute():
    # 12 blocks, relative to float32. PyTorch's autocast, whose stream is float32 too, comes to
    # 5.2e-3 on these weights and images, and to 9.5e-3 with a stream of bfloat16.
    shape = {"image_size": (64, 64), "patch_size": 8, "channels": 3, "width": 192, "depth": 12}
    exact = ViT(**shape, heads=3)
    rough = {
        residual: jax.jit(ViT(**shape, heads=3, dtype=jnp.bfloat16, residual_dtype=residual).apply)
        for residual in (jnp.float32, jnp.bfloat16)
    }
    errors = {residual: [] for residual in rough}
    for seed in range(3):
        images = jax.random.normal(jax.random.key(10 + seed), (4, 64, 64, 3))
        params = exact.init(jax.random.key(seed), images)
        expected = np.asarray(exact.apply(params, images))
        for residual, apply in rough.items():
            got = apply(params, images)
            assert got.dtype == residual
            difference = np.asarray(got, np.float32) - expected
            errors[residual].append(np.linalg.norm(difference) / np.linalg.norm(expected))
    assert np.mean(errors[jnp.float32]) <= 5e-3
    assert np.mean(errors[jnp.bfloat16]) > 8e-3


def test_the_residual_stream_is_of_its_type_through_encoder_and_decoder(small):
    """Every sum of two [B, N, D] arrays of a step, forwards."""
    images, _ = small
    spec = ModelSpec(
        **SMALL | {"depth": 1, "mean": (0.5, 0.5), "std": (0.5, 0.5)},
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        target="pixel",
    )
    model = spec.mae(dtype=jnp.bfloat16, residual_dtype=jnp.float32)
    masking = sample_masking("random", jax.random.split(jax.random.key(0), 2), spec.grid, 0.5)
    params = model.init(jax.random.key(0), images, masking)
    text = str(jax.make_jaxpr(model.apply)(params, images, masking))
    for shape in ("2,3,32", "2,4,32", "2,7,16"):
        sums = [line for line in text.splitlines() if re.search(rf":\w+\[{shape}\] = add ", line)]
        assert sums
        assert not [line for line in sums if f"bf16[{shape}] = add" in line]


def test_images_of_another_shape_are_refused(small):
    _, params = small
    with pytest.raises(ValueError, match=r"\(8, 8, 2\).*\(8, 12, 2\)"):
        ViT(**SMALL).apply(params, jnp.zeros((1, 8, 8, 2)))


def test_initial_weights_have_the_reference_bounds():
    model = ViT(image_size=(32, 32), patch_size=16, channels=3, width=768, depth=1, heads=12)
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    block = params["blocks"]["0"]
    for tensor, bound in [
        (params["patch_embed"]["kernel"], 0.0625),
        (params["patch_embed"]["bias"], 1 / np.sqrt(768)),
        (block["attn"]["qkv"]["kernel"], np.sqrt(6 / (4 * 768))),
        (block["attn"]["proj"]["kernel"], np.sqrt(6 / (2 * 768))),
        (block["mlp"]["fc1"]["kernel"], np.sqrt(6 / (5 * 768))),
        (block["mlp"]["fc2"]["kernel"], np.sqrt(6 / (5 * 768))),
    ]:
        assert np.abs(tensor).max() <= bound * (1 + 1e-6)  # float32
        # Uniform within the bound: standard deviation bound / sqrt(3).
        np.testing.assert_allclose(np.std(tensor), bound / np.sqrt(3), rtol=0.05)
    assert not block["attn"]["qkv"]["bias"].any()
    np.testing.assert_allclose(np.std(params["cls_token"]), 0.02, rtol=0.1)


def test_equal_blocks_are_traced_once(monkeypatch):
    calls, attend = [], vit.attention

    def counted(*factors):
        calls.append(factors[0].shape)
        return attend(*factors)

    model = Blocks(depth=5, heads=2, dtype=jnp.float32)
    x = jnp.ones((2, 3, 8))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    monkeypatch.setattr(vit, "attention", counted)
    text = jax.jit(model.apply).lower(variables, x).as_text()
    assert len(calls) == 1
    assert text.count("stablehlo.exponential") == 5  # and the program still has each of them


@pytest.mark.parametrize(
    ("images", "tokens", "shape"),
    [
        (64, 50, (2, 32)),
        (96, 50, (2, 48)),
        (128, 65, (2, 64)),
        (32, 50, (32,)),  # tokens are the longer axis as it is
        (64, 197, (64,)),
        (53, 50, (53,)),  # a prime number
        (4096, 50, (4096,)),  # there would be more groups than tokens
    ],
)
def test_images_are_grouped_where_they_outnumber_tokens(images, tokens, shape):
    assert group(images, tokens) == shape


@pytest.mark.parametrize("stacking", ["unrolled", "scan"])
def test_grouped_images_have_the_same_tokens_and_gradients(stacking):
    def run(local):
        model = Blocks(3, 2, jnp.float32, stacking, frozen=1, taps=(0, 2), local=local)

        def loss(params):
            first, last = model.apply(params, x, paths)
            return (first * last).sum(), (first, last)

        return jax.value_and_grad(loss, has_aux=True)(params)

    x = jax.random.normal(jax.random.key(0), (24, 17, 16))  # in groups of 12
    paths = jax.random.bernoulli(jax.random.key(1), 0.8, (3, 2, 24)) / 0.8
    params = Blocks(3, 2, jnp.float32).init(jax.random.key(2), x[:1])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, run(True), run(False))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1"])
def test_grouped_images_are_copied_less_by_a_tpu(name):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")

    def copied(local):
        lowered = lowered_gradients(parse_pod(name), (64, 50, 768), 12, local=local)
        read = program.compile_and_read(lowered)[1]
        return sum(
            count
            for i in read.instructions
            for kind, count in i.registers.items()
            if kind.startswith("copy")
        )

    assert copied(True) < 0.8 * copied(False)
