"""How transformers prepares images for a model: `preprocessor_config.json`."""

from typing import Any

from etils import epath

from mae_jax.models.spec import ModelSpec
from mae_jax.storage.files import write_json

_PIL_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as image-processor configs write it


def write_image_processor(directory: epath.Path, spec: ModelSpec, kind: str, **own: Any) -> None:
    """Writes it for the processor class `kind`, with that class's `own` fields besides."""
    processor = {
        "image_processor_type": kind,
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        **own,
        "size": {"height": spec.image_size[0], "width": spec.image_size[1]},
        "resample": _PIL_BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }
    write_json(directory / "preprocessor_config.json", processor)
