"""The encoder's taps, biases and scales; whole segmenters on any number of devices; their loss."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax import UserError
from mae_jax.distributed.mesh import BATCH_AXES, make_mesh
from mae_jax.distributed.sharding import in_compute_type, path_name, state_sharding
from mae_jax.models.inference import features_function, segment_function
from mae_jax.models.segmenter import default_taps, segmentation_loss, segmenter_variables
from mae_jax.models.spec import ModelSpec
from mae_jax.models.vit import ViT, relative_bias
from mae_jax.train import optimizers
from mae_jax.train.gradients import gradients
from mae_jax.train.state import create_state

SMALL = {"image_size": (8, 12), "patch_size": 4, "channels": 3, "width": 16, "depth": 4, "heads": 2}
SPEC = ModelSpec(**SMALL, classes=5, segment_taps=(0, 1, 1, 3), segment_width=8)
BEIT = {"relative_bias": True, "layer_scale": True, "final_norm": False}


def shaken(params, seed=3):
    """Parameters with noise added, so that none is zero or one."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noisy = [np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32) for x in leaves]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((8, 8, 12, 3), np.float32)


@pytest.fixture(scope="module")
def plain(images):
    return jax.jit(ViT(**SMALL).init)(jax.random.key(0), images)


@pytest.fixture(scope="module")
def segmenter(images):
    variables = jax.jit(SPEC.segmenter().init)(jax.random.key(0), images[:1])
    return shaken(variables["params"]), variables["statistics"]


# The encoder.


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 3), (5, 3)])
def test_relative_biases_are_at_the_index_of_beit(grid):
    h, w = grid
    table = np.random.default_rng(0).standard_normal(((2 * h - 1) * (2 * w - 1) + 3, 2), np.float32)
    got = relative_bias(jnp.asarray(table), grid)
    assert got.shape == (2, 1 + h * w, 1 + h * w)
    for query, key in np.ndindex(h * w, h * w):
        dy, dx = query // w - key // w, query % w - key % w
        expected = table[(dy + h - 1) * (2 * w - 1) + dx + w - 1]
        np.testing.assert_array_equal(got[:, 1 + query, 1 + key], expected)
    np.testing.assert_array_equal(got[:, 0, 0], table[-1])
    np.testing.assert_array_equal(got[:, 0, 1:], np.tile(table[-3][:, None], h * w))
    np.testing.assert_array_equal(got[:, 1:, 0], np.tile(table[-2][:, None], h * w))


def test_the_gradient_of_relative_biases_counts_pairs():
    count = jax.grad(lambda table: relative_bias(table, (2, 3)).sum())(jnp.zeros((18, 1)))[:, 0]
    expected = np.outer([1, 2, 1], [1, 2, 3, 2, 1]).ravel()  # pairs of patches by distance
    np.testing.assert_array_equal(count, [*expected, 6, 6, 1])


@pytest.mark.parametrize("stacking", ["unrolled", "scan"])
def test_at_step_0_taps_are_the_tokens_inside_a_plain_encoder(images, plain, stacking):
    taps = (0, 0, 3, 1)
    model = ViT(**SMALL, **BEIT, taps=taps, stacking=stacking)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    for leaf in jax.tree.leaves(plain["params"]["blocks"]):  # the same names, and more
        assert any(np.array_equal(leaf, x) for x in jax.tree.leaves(params["blocks"]))
    got = jax.jit(model.apply)({"params": params}, images)
    assert len(got) == 4
    for tap, tokens in zip(taps, got, strict=True):
        encoder = ViT(**SMALL | {"depth": tap + 1}, final_norm=False)
        blocks = {str(i): plain["params"]["blocks"][str(i)] for i in range(tap + 1)}
        expected = jax.jit(encoder.apply)({"params": {**plain["params"], "blocks": blocks}}, images)
        np.testing.assert_allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 2])
def test_every_stacking_and_remat_gives_the_same_taps_and_gradients(images, frozen):
    taps = (0, 2, 2, 3)
    how = {**BEIT, "taps": taps, "frozen_blocks": frozen}
    params = shaken(jax.jit(ViT(**SMALL, **how).init)(jax.random.key(0), images)["params"])
    path_scale = np.random.default_rng(1).uniform(0.5, 1.5, (4, 2, 8)).astype(np.float32)

    def run(**more):
        def loss(params):
            outputs = ViT(**SMALL, **how, **more).apply(
                {"params": params}, images, None, path_scale
            )
            weighted = [(i + 1) * jnp.square(x).mean() for i, x in enumerate(outputs)]
            return sum(weighted), outputs

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = run()
    norms = {path: np.abs(x["norm1"]["scale"]).max() for path, x in expected[1]["blocks"].items()}
    assert [norms[str(i)] > 0 for i in range(4)] == [i >= frozen for i in range(4)]
    for more in ({"stacking": "scan"}, {"stacking": "scan", "remat": "dots"}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            expected,
            run(**more),
        )


def test_bfloat16_rounds_neither_tables_nor_scales_before_they_are_used(images):
    model = ViT(**SMALL, **BEIT, dtype=jnp.bfloat16, stacking="scan", taps=(3,))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    text = str(jax.make_jaxpr(model.apply)(params, images))
    rows = (2 * 2 - 1) * (2 * 3 - 1) + 3
    assert re.search(rf"f32\[\d,{rows},2\]", text)
    assert not re.search(rf"bf16\[[\d,]*{rows},2\]", text)


def test_relative_biases_of_some_patches_are_refused(images):
    model = ViT(**SMALL, **BEIT)
    with pytest.raises(ValueError, match="whole images"):
        model.init(jax.random.key(0), images, jnp.zeros((8, 2), jnp.int32))


# The segmenter.


def losses_and_gradients(devices, fsdp, images, params, labels):
    mesh = make_mesh(-1, fsdp, jax.devices()[:devices])
    model = SPEC.segmenter(axis_names=BATCH_AXES)

    def loss_fn(weights, extra, batch):
        outputs, new = model.apply(
            {"params": weights}, batch["image"], batch["path"].T, batch["key"], mutable=["batch"]
        )
        return segmentation_loss(*outputs, batch["label"]), {"batch": new["batch"]}

    keys = jax.random.split(jax.random.key(5), len(images))
    path = np.random.default_rng(2).integers(0, 2, (len(images), 2, 4)).astype(np.float32)
    batch = {"image": images, "label": labels, "key": keys, "path": path}
    state = create_state(params, optax.sgd(1.0), keep_ema=False)
    state = jax.device_put(state, state_sharding(state, mesh))
    run = jax.jit(lambda s, b: gradients(loss_fn, s, b, mesh=mesh))
    return jax.device_get(run(state, batch))


@pytest.mark.slow
def test_any_number_of_devices_gives_the_loss_gradients_and_statistics_of_one(images, segmenter):
    labels = np.random.default_rng(1).integers(0, 5, (8, 8, 12)).astype(np.uint8)
    labels[:, :2] = 255
    arguments = (images, segmenter[0], labels)
    expected = losses_and_gradients(1, 1, *arguments)
    got = losses_and_gradients(8, 4, *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), got, expected)
    assert jax.tree.structure(got[1]["batch"]) == jax.tree.structure(segmenter[1])


@pytest.mark.parametrize("image_size", [(8, 8), (12, 20)])
def test_any_grid_in_training_and_evaluation(image_size):
    spec = dataclasses.replace(SPEC, image_size=image_size)
    model = spec.segmenter()
    images = np.random.default_rng(0).standard_normal((2, *image_size, 3), np.float32)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def run():
        variables = model.init(jax.random.key(0), images)
        training = model.apply({"params": variables["params"]}, images, None, keys)
        return training, model.apply(variables, images)

    h, w = spec.grid
    for logits, auxiliary in run():
        assert logits.shape == (2, 4 * h, 4 * w, 5)
        assert auxiliary.shape == (2, h, w, 5)
        assert np.isfinite(logits).all()
        assert np.isfinite(auxiliary).all()


def test_logits_are_float32_of_bfloat16_products_and_near_those_in_float32(images, segmenter):
    variables = {"params": segmenter[0], "statistics": segmenter[1]}
    exact, _ = jax.jit(SPEC.segmenter().apply)(variables, images)
    rough, auxiliary = jax.jit(SPEC.segmenter(dtype=jnp.bfloat16).apply)(variables, images)
    assert rough.dtype == auxiliary.dtype == jnp.float32
    assert np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)


def test_evaluation_does_not_depend_on_the_other_examples(images, segmenter):
    variables = {"params": segmenter[0], "statistics": segmenter[1]}
    apply = jax.jit(SPEC.segmenter().apply)
    np.testing.assert_allclose(
        apply(variables, images)[0][:1], apply(variables, images[:1])[0], atol=1e-5
    )


def test_pixels_have_the_best_class_of_interpolated_logits(segmenter):
    params = {**segmenter[0], "statistics": segmenter[1]}
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3)).astype(np.uint8)
    got = jax.jit(segment_function(SPEC))(params, images)
    assert got["logits"].shape == (2, 8, 12, 5)  # of stride 1, as patches of 4 pixels give
    np.testing.assert_array_equal(got["classes"], got["logits"].argmax(-1))
    assert jax.jit(features_function(SPEC))(params, images)["tokens"].shape == (2, 7, 16)


# The loss.


def test_the_loss_is_divided_by_all_pixels_and_adds_the_auxiliary_one():
    rng = np.random.default_rng(0)
    logits, auxiliary = (rng.standard_normal((2, 4, 6, 3), np.float32) for _ in range(2))
    labels = rng.integers(0, 3, (2, 4, 6)).astype(np.uint8)
    labels[0, :2] = 255

    def mean(logits):
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        own = np.take_along_axis(shares, np.minimum(labels, 2)[..., None].astype(int), -1)[..., 0]
        return (-np.log(own) * (labels != 255)).sum() / labels.size

    expected = mean(logits) + 0.4 * mean(auxiliary)
    np.testing.assert_allclose(segmentation_loss(logits, auxiliary, labels), expected, rtol=1e-5)
    other = segmentation_loss(logits, auxiliary, np.where(labels == 255, 9, labels), ignored=9)
    np.testing.assert_allclose(other, expected, rtol=1e-5)
    nothing = jax.grad(segmentation_loss)(logits, auxiliary, np.full_like(labels, 255))
    assert not nothing.any()


def test_the_loss_holds_the_pixels_of_one_image_at_a_time():
    def working_memory(images):
        shapes = [(images, 16, 16, 20), (images, 4, 4, 20), (images, 64, 64)]
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(segmentation_loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_image = 64 * 64 * 20 * 4  # bytes of its logits
    assert working_memory(8) < 6 * one_image
    assert working_memory(16) - working_memory(8) < one_image


# Descriptions and rules.


def test_the_pyramid_reads_blocks_at_even_distances():
    assert default_taps(12) == (3, 5, 7, 11)
    assert default_taps(24) == (7, 11, 15, 23)
    assert default_taps(1) == (0, 0, 0, 0)
    assert default_taps(2) == (0, 0, 0, 1)
    for depth in range(1, 40):
        taps = default_taps(depth)
        assert sorted(taps) == list(taps)
        assert 0 <= taps[0] <= taps[-1] == depth - 1


def test_a_description_survives_json_and_is_not_there_where_it_is_not_used():
    assert ModelSpec.from_json(SPEC.to_json()) == SPEC
    assert "segment" not in ModelSpec(**SMALL).to_json()


@pytest.mark.parametrize("width", [0, 24])
@pytest.mark.parametrize("taps", [(-1,), (0, 1, 2, 3)])
def test_a_description_from_a_config(width, taps):
    config = {
        "task": "segment",
        "model": {"variant": "ti", "image_size": 32, "patch_size": 8, "channels": 3}
        | {"width": 0, "depth": 6, "heads": 0},
        "data": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        "segment": {"taps": taps, "width": width, "stride": 20, "ignore": 255}
        | {"zero_is_other": True},
    }
    spec = ModelSpec.from_config(config, 150)
    assert spec.segment_taps == (default_taps(6) if taps == (-1,) else taps)
    assert spec.segment_width == (width or 192)
    assert (spec.segment_stride, spec.segment_zero_is_other, spec.classes) == (20, True, 150)
    assert not ModelSpec.from_config(config).segments  # the encoder alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segment_taps": (0, 1, 2)}, "four blocks"),
        ({"segment_taps": (0, 1, 2, 4)}, "0 to 3"),
        ({"segment_width": 0}, "width"),
        ({"classes": 0}, "classes"),
        ({"pool": "mean"}, "pool"),
        ({"image_size": (4, 12)}, "2 x 2"),
    ],
)
def test_descriptions_that_make_no_segmenter_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SPEC, **change)


def test_a_segmenter_is_no_classifier_and_others_are_no_segmenters():
    with pytest.raises(UserError, match="no classifier"):
        SPEC.classifier()
    with pytest.raises(UserError, match="no segmentation head"):
        ModelSpec(**SMALL).segmenter()


def test_rules_by_path_know_the_parameters_of_segmenters(segmenter):
    params, statistics = segmenter
    mesh = make_mesh(1, 8)
    shardings = state_sharding({"params": params, "statistics": statistics}, mesh)
    decays = optimizers.decays_in_fine_tuning(params)
    scales = optimizers.layer_scales(params, SPEC.depth, 0.5)
    cast = in_compute_type(params, jnp.bfloat16)

    def flat(tree):
        return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    split = {name for name, x in flat(shardings).items() if any(x.spec)}
    whole = ("layer_scale", "relative_bias", "norm", "statistics", "bias")
    assert not [name for name in split if any(word in name for word in whole)]
    assert "params/head/fuse/kernel" in split
    for name, decay in flat(decays).items():
        one_dimensional = re.search(r"(scale\d?|/bias|cls_token|pos_embed)$", name)
        assert decay == (not one_dimensional), name
    of_layers = flat(scales)
    assert of_layers["encoder/blocks/3/layer_scale1"] == 0.5
    assert of_layers["encoder/blocks/2/attn/relative_bias"] == 0.25
    assert of_layers["head/fuse/kernel"] == of_layers["pyramid/up2/kernel"] == 1
    for name, x in flat(cast).items():
        assert (x.dtype == jnp.bfloat16) == name.endswith("/kernel"), name
    head = {"head": {"kernel": np.zeros((2, 2), np.float32)}}  # of a classifier
    assert in_compute_type(head, jnp.bfloat16)["head"]["kernel"].dtype == np.float32


def test_variables_are_taken_apart(segmenter):
    params, statistics = segmenter
    variables = segmenter_variables({**params, "statistics": statistics})
    assert variables["params"].keys() == params.keys()
    assert variables["statistics"] is statistics
