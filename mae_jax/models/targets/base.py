"""What every target has: sizes, values, loss, and where there is one the way back to pixels."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

LOSSES = ("l2", "l1")


@dataclasses.dataclass(frozen=True)
class Target:
    """What the decoder predicts of each patch of images [B, H, W, C] (float, normalised).

    A target may keep a state: float32 arrays that no gradient changes, such as a basis or the
    weights of a tokenizer. They lie with the parameters under `target_state`, frozen, and so in
    checkpoints and in exports that hold a decoder. `state` below is None without one.
    """

    patch_size: int
    channels: int
    # l2, squared, or l1, absolute; no choice where a target's `loss` is its own.
    error: str = dataclasses.field(default="l2", kw_only=True)
    note: ClassVar[str] = ""  # what a reader must know of pictures of its predictions
    fitted: ClassVar[bool] = False  # whether `fit` makes the state, before a run's first step

    @classmethod
    def of(cls, spec: Any) -> "Target":
        """The target of the model that a `ModelSpec` describes."""
        return cls(spec.patch_size, spec.channels, error=spec.loss)

    @property
    def outputs(self) -> int:
        """How many numbers the decoder predicts for a patch."""
        return self.patch_size**2 * self.channels

    def init_state(self) -> Any:
        """The state of a new model: a dict of arrays, to be fitted or loaded; None for none."""
        return None

    def macs(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds of matrix products for the values of one image [H, W]; few are none."""
        return 0

    def fit(self, batches: Iterable[np.ndarray]) -> Any:
        """The state that fits training crops, batches [B, H, W, C] float32, normalised: as many as
        it takes of an epoch. On the host, in every process."""
        raise NotImplementedError

    def values(self, images: jax.Array, state: Any) -> Any:
        """What is to be predicted: arrays [B, L, ...]."""
        raise NotImplementedError

    def loss(self, predictions: jax.Array, values: Any) -> jax.Array:
        """The error of predictions [B, L, outputs] in each patch: [B, L]; here by `error`."""
        size = jnp.abs if self.error == "l1" else jnp.square
        return size(predictions - values).mean(axis=-1)

    def to_pixels(
        self, predictions: jax.Array, images: jax.Array, mask: jax.Array, state: Any
    ) -> jax.Array | None:
        """Predictions as patches of pixels [B, L, p*p*C]; None where there is no way back. Shown
        are those that are removed (`mask` [B, L] is 1)."""
        return None
