"""What a file of weights is: the facts about a model that its tensors alone do not tell."""

import dataclasses
import json
import math
import re

from mae_jax import UserError
from mae_jax.interop.names import Tensors, is_decoder
from mae_jax.models.targets import TARGETS
from mae_jax.models.vit import VARIANTS

# Mean and deviation of ImageNet's pixels in [0, 1]: what MAE models are trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

METADATA_KEY = "mae_jax"
POOLS = ("", "mean", "cls")

# Heads follow from the width in every published model.
_HEADS = {shape.width: shape.heads for shape in VARIANTS.values()}
_DECODER_HEADS = {512: 16}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model, as far as weights and their users need to know it.

    Attributes:
      image_size: height and width in pixels.
      decoder_depth: 0 where there is no decoder.
      target: a name in `models.targets.TARGETS`; empty where nothing is known of the decoder.
      mask_ratio: share of patches removed in pretraining; 0 where unknown.
      mean, std: statistics of pixels in [0, 1] taken out of the input, one value per channel.
      pool: what a classifier's head reads. `mean`: the mean patch token through `fc_norm`;
        `cls`: the class token after the final norm; empty: there is no head.
      classes: outputs of the head, 0 where there is none.
    """

    image_size: tuple[int, int]
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_heads: int = 0
    target: str = ""
    mask_ratio: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pool: str = ""
    classes: int = 0

    def __post_init__(self) -> None:
        if any(side % self.patch_size for side in self.image_size):
            raise UserError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.target not in ("", *TARGETS):
            raise UserError(f"target {self.target!r}: choose one of {', '.join(TARGETS)}")
        if self.pool not in POOLS:
            raise UserError(f"pool {self.pool!r}: choose one of {', '.join(POOLS)}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise UserError(
                f"mean {self.mean} and std {self.std} need one value for each of "
                f"{self.channels} channel(s)"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def to_metadata(self) -> dict[str, str]:
        """String values for the header of a safetensors file.

        `format: pt` is what transformers 4 needs to open a file.
        """
        return {"format": "pt", METADATA_KEY: json.dumps(dataclasses.asdict(self))}

    @staticmethod
    def from_json(text: str) -> "Description":
        """The inverse of the entry `to_metadata` writes.

        Raises:
          UserError: it was written by another version, or damaged.
        """
        try:
            fields = json.loads(text)
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return Description(**fields)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UserError(
                f"the description of the model cannot be read ({error}); it is damaged, or of a "
                "newer version of mae_jax: update"
            ) from error


def infer(
    tensors: Tensors, where: str, fallback: Description | None = None, **known: object
) -> Description:
    """Reads a description off official tensors.

    Args:
      fallback: a model whose heads, image shape and statistics are taken where nothing else tells
        them: the one the weights are loaded into.
      known: fields that the file's config tells, or its user; they are believed, and a tensor of
        another shape is an error.

    Raises:
      UserError: `where` is not a ViT or MAE of ours, or something cannot be known.
    """
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        if name not in tensors:
            raise UserError(
                f"{where}: no tensor {name}, so this is not a ViT of MAE. It holds {_some(tensors)}"
            )
    kernel = tensors["patch_embed.proj.weight"].shape
    if len(kernel) != 4 or kernel[2] != kernel[3]:
        raise UserError(f"{where}: patch_embed.proj.weight is {kernel}, not [D, C, p, p]")
    found: dict[str, object] = {
        "patch_size": kernel[2],
        "channels": kernel[1],
        "width": kernel[0],
        "depth": _depth(tensors, "blocks"),
    }
    patches = tensors["pos_embed"].shape[1] - 1
    if "image_size" not in known:
        side = math.isqrt(patches)
        if side**2 == patches:  # first, so that fitting it to a rectangle is reported
            found["image_size"] = (side * kernel[2], side * kernel[2])
        elif fallback and fallback.grid[0] * fallback.grid[1] == patches:
            found["image_size"] = tuple(n * kernel[2] for n in fallback.grid)
        else:
            raise UserError(
                f"{where}: {patches} patches are not a square and the file does not say how they "
                "lie; give image_size as height,width"
            )
    if "heads" not in known:
        found["heads"] = _heads(kernel[0], _HEADS, "heads", where, fallback)
    if "mask_token" in tensors:
        width = tensors["mask_token"].shape[-1]
        found["decoder_width"] = width
        found["decoder_depth"] = _depth(tensors, "decoder_blocks")
        if "decoder_heads" not in known:
            found["decoder_heads"] = _heads(width, _DECODER_HEADS, "decoder_heads", where, fallback)
    if "head.weight" in tensors:
        found["classes"] = tensors["head.weight"].shape[0]
        found["pool"] = "mean" if "fc_norm.weight" in tensors else "cls"
    for field, value in found.items():
        if known.get(field, value) != value:
            raise UserError(
                f"{where}: {field} is {value} in the tensors and {known[field]} in what is said "
                "of them"
            )
    merged = {**found, **known}
    if merged["channels"] != 3 and not {"mean", "std"} <= merged.keys():
        if fallback and fallback.channels == kernel[1]:
            merged |= {"mean": fallback.mean, "std": fallback.std}
        elif fallback:  # other channels are adapted; nothing is computed with these
            merged |= {"mean": (0.0,) * kernel[1], "std": (1.0,) * kernel[1]}
        else:
            raise UserError(
                f"{where}: {kernel[1]} input channel(s), and the file does not say how they are "
                "normalised; give mean and std, one value per channel"
            )
    description = Description(**merged)
    if patches != description.grid[0] * description.grid[1]:
        raise UserError(
            f"{where}: pos_embed has {patches} patches, an image of {description.image_size} in "
            f"patches of {description.patch_size} has {description.grid}"
        )
    return description


def expected_shapes(d: Description, *, final_norm: bool = True) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor of the described model."""
    patches = d.grid[0] * d.grid[1]
    values = d.patch_size**2 * d.channels
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d.width),
        "pos_embed": (1, 1 + patches, d.width),
        "patch_embed.proj.weight": (d.width, d.channels, d.patch_size, d.patch_size),
        "patch_embed.proj.bias": (d.width,),
        **_stack_shapes("blocks", d.depth, d.width),
    }
    if final_norm:
        shapes |= _norm_shapes("norm", d.width)
    if d.decoder_depth:
        shapes |= {
            "mask_token": (1, 1, d.decoder_width),
            "decoder_pos_embed": (1, 1 + patches, d.decoder_width),
            **_dense_shapes("decoder_embed", d.width, d.decoder_width),
            **_stack_shapes("decoder_blocks", d.decoder_depth, d.decoder_width),
            **_norm_shapes("decoder_norm", d.decoder_width),
            **_dense_shapes("decoder_pred", d.decoder_width, values),
        }
    if d.pool == "mean":
        shapes |= _norm_shapes("fc_norm", d.width)
    if d.classes:
        shapes |= _dense_shapes("head", d.width, d.classes)
    return shapes


def _dense_shapes(name: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _stack_shapes(stack: str, depth: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        shapes |= _norm_shapes(f"{stack}.{i}.norm1", width)
        shapes |= _dense_shapes(f"{stack}.{i}.attn.qkv", width, 3 * width)
        shapes |= _dense_shapes(f"{stack}.{i}.attn.proj", width, width)
        shapes |= _norm_shapes(f"{stack}.{i}.norm2", width)
        shapes |= _dense_shapes(f"{stack}.{i}.mlp.fc1", width, 4 * width)
        shapes |= _dense_shapes(f"{stack}.{i}.mlp.fc2", 4 * width, width)
    return shapes


def _depth(tensors: Tensors, stack: str) -> int:
    numbers = {int(m.group(1)) for n in tensors if (m := re.match(rf"{stack}\.(\d+)\.", n))}
    return max(numbers, default=-1) + 1


def _heads(
    width: int, table: dict[int, int], field: str, where: str, fallback: Description | None
) -> int:
    if width in table:
        return table[width]
    if fallback and width == getattr(fallback, "decoder_width" if "decoder" in field else "width"):
        return getattr(fallback, field)
    raise UserError(
        f"{where}: the number of attention heads cannot be read off tensors of width {width}; give "
        f"{field}"
    )


def _some(tensors: Tensors) -> str:
    names = sorted(tensors, key=is_decoder)
    shown = ", ".join(names[:4])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 4 else ''})"
