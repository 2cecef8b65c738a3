"""Images as patches, and back (paper section 3)."""

import jax


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into patches [B, L, p*p*C].

    Patches are in row-major order; inside a patch the order is (row, column, channel).
    """
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: jax.Array, patch_size: int, image_size: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify`: [B, L, p*p*C] -> [B, H, W, C]."""
    b, _, d = patches.shape
    p = patch_size
    h, w = image_size
    x = patches.reshape(b, h // p, w // p, p, p, d // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, d // (p * p))
