"""Fine-tuning augmentations on the device: random erasing, mixup and cutmix, soft targets.

Pure functions of their keys, so a batch comes out the same however many devices share it.
"""

import math

import jax
import jax.numpy as jnp

# Random erasing as timm's RandomErasing does it by default (Zhong et al., arXiv 1708.04896).
ERASE_AREA = (0.02, 1 / 3)  # share of the picture
ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width
ERASE_TRIES = 10


def soft_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Labels, int [B], smoothed by s: float32 [B, K], 1 - s + s / K at the label, else s / K."""
    one_hot = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    return one_hot * (1 - smoothing) + smoothing / classes


def random_erasing(images: jax.Array, keys: jax.Array, probability: float) -> jax.Array:
    """Replaces a box of some images by noise, N(0, 1) in every value (timm's mode `pixel`).

    The box's area is uniform, its aspect ratio log-uniform, its place uniform. Where none of ten is
    smaller than the picture in both directions, nothing is erased. `images`: float [B, H, W, C],
    normalised, like the result; `keys`: [B]; `probability`: that an image is erased.
    """
    return jax.vmap(_erase, in_axes=(0, 0, None))(images, keys, probability)


def _erase(image: jax.Array, key: jax.Array, probability: float) -> jax.Array:
    height, width, _ = image.shape
    box_key, noise_key = jax.random.split(key)
    # Drawn at once: every call of jax.random is long to compile.
    u = jax.random.uniform(box_key, (2 * ERASE_TRIES + 3,))
    u_area, u_aspect, (u_erase, u_top, u_left) = jnp.split(u, (ERASE_TRIES, 2 * ERASE_TRIES))
    low, high = math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])
    aspect = jnp.exp(low + (high - low) * u_aspect)
    area = height * width * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * u_area)
    # All tries at once; the first that fits counts.
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    h, w = h[first], w[first]
    top, left = _integer(u_top, height - h + 1), _integer(u_left, width - w + 1)
    erased = (u_erase < probability) & fits[first]
    inside = _box_mask(height, width, top, top + h, left, left + w)  # [H, W]
    noise = jax.random.normal(noise_key, image.shape, image.dtype)  # [H, W, C]
    return jnp.where((erased & inside)[:, :, None], noise, image)


def mix(
    images: jax.Array,
    targets: jax.Array,
    keys: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    probability: float,
    switch_probability: float,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with a partner, by mixup (arXiv 1710.09412) or cutmix (1905.04899).

    Neighbours in the batch form groups. A group draws one of the two ways and one lambda, and is
    mixed with itself reversed: timm's mode `batch`, where the group is the batch of one GPU (16 to
    32 images in the reference). Gives images and targets of the same shapes and dtypes: lambda of
    each example's own, 1 - lambda of its partner's; under cutmix, lambda is the share of the
    picture outside the box.

    Args:
      images, targets, keys: float [B, H, W, C], distributions [B, K], and one key per group.
      mixup_alpha, cutmix_alpha: lambda ~ Beta(alpha, alpha); 0 switches one of the ways off.
      probability: that a group is mixed at all.
      switch_probability: of cutmix, where both ways are on.
      group: images in a group; even, and a divisor of B.
    """
    _, height, width, channels = images.shape
    cutmix_share = switch_probability if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)

    def weights(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a group keeps of its own: of each pixel [H, W], and of the targets, a scalar."""
        lam_key, u_key = jax.random.split(key)
        u_mixed, u_cutmix, u_y, u_x = jax.random.uniform(u_key, (4,))
        mixed, cutmix = u_mixed < probability, u_cutmix < cutmix_share
        alpha = jnp.where(cutmix, cutmix_alpha, mixup_alpha)
        # Lambda 1 keeps everything, and makes an empty box.
        lam = jnp.where(mixed, jax.random.beta(lam_key, alpha, alpha), 1.0)
        y, x = _integer(u_y, height), _integer(u_x, width)
        top, bottom, left, right = cutmix_box(lam, y, x, height, width)
        outside = ~_box_mask(height, width, top, bottom, left, right)  # [H, W]
        share_outside = 1 - (bottom - top) * (right - left) / (height * width)
        return jnp.where(cutmix, outside, lam), jnp.where(cutmix, share_outside, lam)

    own, lam = jax.vmap(weights)(keys)  # [G, H, W], [G]

    def blend(x: jax.Array, own: jax.Array) -> jax.Array:
        return (own * x + (1 - own) * x[:, ::-1]).astype(x.dtype)

    # Where devices hold whole groups, partners are on the same device.
    grouped = images.reshape(-1, group, height, width, channels)  # [G, g, H, W, C]
    mixed = blend(grouped, own[:, None, :, :, None])
    mixed_targets = blend(targets.reshape(-1, group, targets.shape[1]), lam[:, None, None])
    return mixed.reshape(images.shape), mixed_targets.reshape(targets.shape)


def cutmix_box(
    lam: jax.Array, y: jax.Array, x: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The box of cutmix: 1 - lam of the picture's area and its shape, cut off at the borders.

    About the pixel (y, x): top, bottom, left, right, int scalars; bottom and right are one past the
    last pixel.
    """
    side = jnp.sqrt(1 - lam)
    h, w = (height * side).astype(jnp.int32), (width * side).astype(jnp.int32)
    top, bottom = jnp.clip(jnp.stack([y - h // 2, y + (h + 1) // 2]), 0, height)
    left, right = jnp.clip(jnp.stack([x - w // 2, x + (w + 1) // 2]), 0, width)
    return top, bottom, left, right


def _integer(u: jax.Array, n: jax.Array | int) -> jax.Array:
    """Of u uniform in [0, 1): uniform in 0, 1, ..., n - 1; n below 2^23."""
    return (u * n).astype(jnp.int32)


def _box_mask(height: int, width: int, *box: jax.Array) -> jax.Array:
    """True inside the box of (top, bottom, left, right): bool [H, W]."""
    top, bottom, left, right = box
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return (top <= y) & (y < bottom) & (left <= x) & (x < right)
