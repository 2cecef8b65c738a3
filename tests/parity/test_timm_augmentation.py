"""Fine-tuning augmentations do what timm's do: the MAE recipe is written in timm's terms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_models import import_timm
from PIL import Image

from mae_jax.augment import mixing
from mae_jax.augment.pixels import example_keys
from mae_jax.data import randaugment

torch = pytest.importorskip("torch", reason="parity is measured against PyTorch")
timm = import_timm()
auto_augment = pytest.importorskip("timm.data.auto_augment")
timm_mixup = pytest.importorskip("timm.data.mixup")
random_erasing = pytest.importorskip("timm.data.random_erasing")

FILL = (124, 116, 104)
RECIPE = "rand-m9-mstd0.5-inc1"
LEVELS = (0, 0.3, 2.5, 5, 7.3, 9, 10)


def picture(height, width, seed):
    """Smooth colours with noise: ranges, edges and means of its own in each channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [80 + 60 * np.sin(9 * x + 3 * y), 120 + 90 * x * y, 60 + 150 * (x > y)]
    image = np.stack(waves, 2) + 12 * rng.standard_normal((height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


PICTURES = {"wide": picture(40, 56, 0), "tall": picture(61, 33, 1), "square": picture(48, 48, 2)}


# RandAugment


@pytest.mark.parametrize("name", sorted(randaugment.PLAIN_OPS | randaugment.INCREASING_OPS))
@pytest.mark.parametrize("sign", [1, -1])
def test_every_op_gives_timms_pixels_at_every_level(name, sign, monkeypatch):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v: sign * v)
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    for (kind, image), level in itertools.product(PICTURES.items(), LEVELS):
        level_to_arg = auto_augment.LEVEL_TO_ARG[name]
        args = level_to_arg(level, {}) if level_to_arg else ()
        if name.startswith("Posterize") and args == (0,):
            expected = np.zeros_like(image)  # refused by ImageOps.posterize since Pillow 13
        else:
            op = auto_augment.NAME_TO_OP[name]
            expected = np.asarray(op(Image.fromarray(image), *args, **options))
        got = randaugment.apply(name, image, level, sign, FILL)
        np.testing.assert_array_equal(got, expected, err_msg=f"{kind}, level {level}")


@pytest.mark.parametrize("name", sorted(randaugment.INCREASING_OPS))
def test_every_op_gives_timms_pixels_of_one_channel(name, monkeypatch):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v: -v)
    level_to_arg, image = auto_augment.LEVEL_TO_ARG[name], PICTURES["wide"][:, :, 1]
    args = level_to_arg(9, {}) if level_to_arg else ()
    op = auto_augment.NAME_TO_OP[name]
    options = {"fillcolor": 114, "resample": Image.Resampling.BICUBIC}
    expected = np.asarray(op(Image.fromarray(image), *args, **options))
    got = randaugment.apply(name, image[:, :, None], 9, -1, (114,))
    np.testing.assert_array_equal(got[:, :, 0], expected)


@pytest.mark.parametrize("spec", [RECIPE, "rand-m7-n3", "rand-mstd1-inc1", "rand"])
def test_notation_means_what_it_means_to_timm(spec):
    theirs = auto_augment.rand_augment_transform(spec, {"img_mean": FILL})
    ours = randaugment.parse_randaugment(spec, FILL)
    assert theirs.num_layers == ours.count
    assert theirs.choice_weights is None
    assert {op.prob for op in theirs.ops} == {randaugment.APPLY_PROBABILITY}
    assert {op.magnitude for op in theirs.ops} == {ours.magnitude}
    assert {op.magnitude_std for op in theirs.ops} == {ours.deviation}
    assert {op.magnitude_max for op in theirs.ops} == {None}  # the end of the scale
    assert auto_augment._LEVEL_DENOM == randaugment.MAX_LEVEL
    assert sorted(op.name for op in theirs.ops) == sorted(ours.ops)


# Mixup and cutmix, both sides given the same draws

CLASSES, SMOOTHING = 7, 0.1
RECIPE_MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
UNIFORM = {"mixed": 0.4, "cutmix": 0.7, "y": 0.31, "x": 0.62}


def mixed_by_both(monkeypatch, lam, u, *, probability=1.0, switch=0.5, **alphas):
    """((images, targets) of ours, the same of timm) when all that is random is lam and `u`."""
    alphas = RECIPE_MIX | alphas
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 10, 14, 3)).astype(np.float32)
    labels = np.array([3, 0, 6, 3, 1, 2])

    drawn = jnp.array([u["mixed"], u["cutmix"], u["y"], u["x"]])
    asked = []
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: drawn)
    monkeypatch.setattr(
        jax.random, "beta", lambda key, a, b: asked.append((a, b)) or jnp.float32(lam)
    )
    ours = mixing.mix(
        jnp.asarray(images),
        mixing.soft_targets(jnp.asarray(labels), CLASSES, SMOOTHING),
        jnp.zeros((1, 2), jnp.uint32),  # one group: timm's batch
        **alphas,
        probability=probability,
        switch_probability=switch,
        group=len(images),
    )
    monkeypatch.undo()

    rand = [u["mixed"]] + [u["cutmix"]] * all(alphas.values())
    centre = [u["y"], u["x"]]
    their_alphas = []
    random = timm_mixup.np.random
    monkeypatch.setattr(random, "rand", lambda: rand.pop(0))
    monkeypatch.setattr(random, "beta", lambda a, b: their_alphas.append((a, b)) or lam)
    monkeypatch.setattr(
        random, "randint", lambda low, high, size: low + int(centre.pop(0) * (high - low))
    )
    mixup = timm_mixup.Mixup(
        **alphas,
        prob=probability,
        switch_prob=switch,
        mode="batch",
        label_smoothing=SMOOTHING,
        num_classes=CLASSES,
    )
    x, y = mixup(torch.tensor(images.transpose(0, 3, 1, 2).copy()), torch.tensor(labels))
    monkeypatch.undo()
    if their_alphas:
        np.testing.assert_allclose(np.asarray(asked[0]), their_alphas[0])
    return ours, (x.numpy().transpose(0, 2, 3, 1), y.numpy())


@pytest.mark.parametrize("lam", [0.0, 0.13, 0.5, 0.81, 0.997, 1.0])
@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_mixing_with_given_draws_is_timms(monkeypatch, way, lam):
    u = UNIFORM | {"cutmix": 0.2 if way == "cutmix" else 0.8}
    (images, targets), (their_images, their_targets) = mixed_by_both(monkeypatch, lam, u)
    if way == "cutmix":
        np.testing.assert_array_equal(images, their_images)
    else:
        np.testing.assert_allclose(images, their_images, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(targets, their_targets, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("y", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("x", [0.0, 0.5, 0.9999])
def test_cutmix_box_is_cut_off_at_the_borders_as_timms(monkeypatch, y, x):
    u = UNIFORM | {"cutmix": 0.0, "y": y, "x": x}
    (images, targets), (their_images, their_targets) = mixed_by_both(monkeypatch, 0.4, u)
    np.testing.assert_array_equal(images, their_images)
    np.testing.assert_allclose(targets, their_targets, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("u_mixed", [0.29, 0.31])
@pytest.mark.parametrize("u_cutmix", [0.79, 0.81])
@pytest.mark.parametrize("off", [{}, {"mixup_alpha": 0.0}, {"cutmix_alpha": 0.0}])
def test_which_way_is_taken_is_decided_as_timm_does(monkeypatch, u_mixed, u_cutmix, off):
    u = UNIFORM | {"mixed": u_mixed, "cutmix": u_cutmix}
    ours, theirs = mixed_by_both(monkeypatch, 0.3, u, probability=0.3, switch=0.8, **off)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


# Random erasing: other random numbers, the same distribution


def boxes_of(images):
    """[N, 4] of the images with one: share of the picture, log aspect, top and left over room."""
    rows = []
    for image in images:
        y, x = np.nonzero(image)
        if len(y):
            h, w = np.ptp(y) + 1, np.ptp(x) + 1
            place = y.min() / (image.shape[0] - h), x.min() / (image.shape[1] - w)
            rows.append([h * w / image.size, np.log(h / w), *place])
    return np.array(rows)


def kolmogorov_smirnov(a, b):
    """The largest difference of two samples' distribution functions, in its standard unit."""
    values = np.sort(np.concatenate([a, b]))
    cdf = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    return np.abs(cdf[0] - cdf[1]).max() * np.sqrt(len(a) * len(b) / (len(a) + len(b)))


@pytest.mark.parametrize("shape", [(40, 60), (12, 70)])
def test_random_erasing_has_timms_distribution(shape):
    n, probability = 3000, 0.7
    keys = example_keys(jax.random.key(5), 0, jnp.arange(n))
    options = {"xla_backend_optimization_level": 0}  # quick to compile
    run = jax.jit(mixing.random_erasing, compiler_options=options)
    ours = np.asarray(run(jnp.zeros((n, *shape, 1)), keys, probability))[..., 0]
    erase = random_erasing.RandomErasing(probability, mode="pixel", device="cpu")
    random_erasing.random.seed(6)
    torch.manual_seed(7)
    theirs = erase(torch.zeros(n, 1, *shape)).numpy()[:, 0]

    boxes, their_boxes = boxes_of(ours), boxes_of(theirs)
    # Difference of two counts of n draws each.
    share = len(their_boxes) / n
    assert abs(len(boxes) - len(their_boxes)) < 4 * np.sqrt(2 * n * share * (1 - share))
    for i, name in enumerate(("share", "log aspect", "top", "left")):
        # Above 1.95 for one pair in a thousand of the same distribution.
        assert kolmogorov_smirnov(boxes[:, i], their_boxes[:, i]) < 1.95, name
        error = np.hypot(*(x[:, i].std() / np.sqrt(len(x)) for x in (boxes, their_boxes)))
        assert abs(boxes[:, i].mean() - their_boxes[:, i].mean()) < 4 * error, name
    values = [x[x != 0][:100_000] for x in (ours, theirs)]
    assert kolmogorov_smirnov(*values) < 1.95
