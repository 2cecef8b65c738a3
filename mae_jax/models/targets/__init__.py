"""What the decoder is asked to predict (paper table 1d): one file a family, one line a target."""

from mae_jax.models.targets.base import Target
from mae_jax.models.targets.hog import HOG
from mae_jax.models.targets.pixels import NormPixel, Pixel
from mae_jax.models.targets.principal import PCA
from mae_jax.models.targets.token import Token

TARGETS: dict[str, type[Target]] = {
    "pixel": Pixel,
    "norm_pixel": NormPixel,
    "pca": PCA,
    "hog": HOG,
    "token": Token,
}
