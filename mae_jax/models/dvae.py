"""The discrete VAE of DALL-E (arXiv 2102.12092, openai/DALL-E): what `target=token` predicts.

The encoder is DALL-E's at any width; the decoder mirrors it, which DALL-E's does not quite. Float32
with exact products whatever the model computes in: a bfloat16 product changes codes.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

GROUPS = 4  # of blocks; between two of them the picture is halved
STRIDE = 2 ** (GROUPS - 1)  # pixels a code stands for, down and across
WIDTHS = tuple(2**group for group in range(GROUPS))  # of the groups, times the tokenizer's


class DVAEShape(NamedTuple):
    """What tells one tokenizer's architecture from another's; the defaults are DALL-E's encoder."""

    codes: int = 8192
    width: int = 256  # of the first group, divisible by 4
    blocks: int = 2  # in each group
    decoder: int = 0  # 1: codes can be made pictures


def map_pixels(pixels: jax.Array) -> jax.Array:
    """Pixels in [0, 1] as the dVAE takes and gives them: 0.8 x + 0.1."""
    return 0.8 * pixels + 0.1


def unmap_pixels(mapped: jax.Array) -> jax.Array:
    """The inverse of `map_pixels`, clipped to [0, 1]."""
    return jnp.clip((mapped - 0.1) / 0.8, 0, 1)


def conv(width: int, side: int, name: str) -> nn.Conv:
    """A convolution of side x side pixels that keeps the picture's size."""
    return nn.Conv(width, (side, side), name=name, precision="highest")


class Block(nn.Module):
    """x + gain * four convolutions of x, the first three at a quarter of the width."""

    width: int
    gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x  # [B, H, W, width of the block before]
        for number, (width, side) in enumerate([(self.width // 4, 3)] * 3 + [(self.width, 1)], 1):
            y = conv(width, side, f"conv_{number}")(nn.relu(y))
        if x.shape[-1] != self.width:
            x = conv(self.width, 1, "id_path")(x)
        return x + self.gain * y


class Encoder(nn.Module):
    """Logits of codes."""

    shape: DVAEShape

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Mapped pixels [B, H, W, C], sides divisible by 8 -> logits [B, H / 8, W / 8, codes]."""
        blocks, width = self.shape.blocks, self.shape.width
        x = conv(width, 7, "input")(x)
        for group, times in enumerate(WIDTHS, 1):
            if group > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for block in range(1, blocks + 1):
                name = f"group_{group}_block_{block}"
                x = Block(times * width, (GROUPS * blocks) ** -2, name=name)(x)
        return conv(self.shape.codes, 1, "output")(nn.relu(x))


class Decoder(nn.Module):
    """Pictures from codes."""

    shape: DVAEShape
    channels: int

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        """Shares of codes [B, h, w, codes], each position's summing to 1 -> mapped pixels [B, 8 h,
        8 w, C]."""
        blocks, width = self.shape.blocks, self.shape.width
        x = conv(WIDTHS[-1] * width, 1, "input")(codes)
        for group, times in enumerate(reversed(WIDTHS), 1):
            if group > 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
            for block in range(1, blocks + 1):
                name = f"group_{group}_block_{block}"
                x = Block(times * width, (GROUPS * blocks) ** -2, name=name)(x)
        return conv(self.channels, 1, "output")(nn.relu(x))


class DVAE(nn.Module):
    """Encoder and, where the shape has one, decoder."""

    shape: DVAEShape
    channels: int

    def setup(self) -> None:
        self.encoder = Encoder(self.shape)
        if self.shape.decoder:
            self.decoder = Decoder(self.shape, self.channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, H / 8, W / 8, codes] of mapped pixels [B, H, W, C]; the decoder is run too, so
        that `init` makes its parameters."""
        logits = self.encoder(x)
        if self.shape.decoder:
            self.decoder(logits)
        return logits

    def encode(self, x: jax.Array) -> jax.Array:
        """Logits [B, H / 8, W / 8, codes] of mapped pixels [B, H, W, C]."""
        return self.encoder(x)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Mapped pixels [B, 8 h, 8 w, C] of shares of codes [B, h, w, codes]."""
        return self.decoder(codes)


def encoder_macs(shape: DVAEShape, channels: int, height: int, width: int) -> int:
    """Multiply-adds of the encoder for one picture, counted by its kernels at their resolution."""
    return _macs(Encoder(shape), (1, height, width, channels), height * width, down=True)


def decoder_macs(shape: DVAEShape, channels: int, height: int, width: int) -> int:
    """The same of the decoder, for a picture [height, width]."""
    codes = (1, height // STRIDE, width // STRIDE, shape.codes)
    return _macs(Decoder(shape, channels), codes, height * width, down=False)


def _macs(module: nn.Module, inputs: tuple[int, ...], pixels: int, down: bool) -> int:
    x = jax.ShapeDtypeStruct(inputs, jnp.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    total = 0
    for name, part in tree.items():
        first, last = ("input", "output") if down else ("output", "input")
        level = 0 if name == first else GROUPS - 1
        if name not in (first, last):
            level = int(name.split("_")[1]) - 1
            level = level if down else GROUPS - 1 - level
        kernels = (leaf.size for leaf in jax.tree.leaves(part) if leaf.ndim == 4)
        total += sum(kernels) * pixels // 4**level
    return total
