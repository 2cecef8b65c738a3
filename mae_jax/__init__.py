"""Masked Autoencoders (arXiv 2111.06377) in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae_jax.pretrained import Model

__version__ = "0.3.0"


class UserError(ValueError):
    """Something a user can mend; the message names the field or file and the remedy. Commands show
    it alone and exit with status 2; other errors, ours, show a traceback."""

    exit_code = 2


class TryAgainError(RuntimeError):
    """The same command may well succeed, or continue, when it is started again: exit status 42."""

    exit_code = 42


class PeerError(RuntimeError):
    """What ended another process of the run, with the status it ended with."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def load(path: str, **overrides: Any) -> "Model":
    """A pretrained model, to encode, reconstruct and classify pictures with.

    Args:
      path: weights in any format that is read: a workdir, an export of this project, official
        `.pth`, timm, a Hugging Face folder. UserError: unreadable, or they lack something.
      overrides: what the weights do not tell of themselves, fields of `models.spec.ModelSpec` such
        as `heads`, `decoder_heads`, `target`, `image_size`, `mean`, `std`, `class_names`.
    """
    from mae_jax.pretrained import Model  # jax is imported only now

    return Model(path, **overrides)
