"""The one description of a model: it builds the model, and it is what files of weights carry."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax import UserError
from mae_jax.models.classifier import Classifier
from mae_jax.models.dvae import STRIDE
from mae_jax.models.mae import MAE, Decoder, LinearHead
from mae_jax.models.masking import KINDS, Masking, sample_masking
from mae_jax.models.segmenter import DROPOUT, Segmenter, default_taps
from mae_jax.models.targets import TARGETS
from mae_jax.models.targets.base import LOSSES
from mae_jax.models.vit import VARIANTS, ViT

# Mean and deviation of ImageNet's pixels in [0, 1]: what MAE models are trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

METADATA_KEY = "mae_jax"
POOLS = ("", "mean", "cls", "normed_mean")
DECODERS = ("blocks", "linear")
# Of no use without a decoder, as `mask_ratio` and `target` are, which tell where weights come from.
OF_A_DECODER = ("decoder_width", "decoder_depth", "decoder_heads", "decoder_kind")
OF_A_DECODER = (*OF_A_DECODER, "encoder_tokens", "mask_kind", "mask_unit", "loss")
MASK_FIELDS = ("kind", "ratio", "unit")  # of `config.mask`
SEGMENT_FIELDS = ("stride", "ignore", "zero_is_other")  # of `config.segment`, beside the model's


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model, as far as its builders, its weights and their users need to know it."""

    image_size: tuple[int, int]  # height and width in pixels
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    decoder_width: int = 0
    decoder_depth: int = 0  # 0: no decoder
    decoder_heads: int = 0  # 0: no decoder, or nobody knows
    target: str = ""  # a name in `models.targets.TARGETS`; empty where unknown
    mask_ratio: float = 0.0  # share of patches removed in pretraining; 0 where unknown
    mean: tuple[float, ...] = IMAGENET_MEAN  # of pixels in [0, 1], one value per channel
    std: tuple[float, ...] = IMAGENET_STD
    pool: str = ""  # what the head reads, see `models.classifier.Classifier`; empty: no head
    classes: int = 0  # outputs of the head
    class_names: tuple[str, ...] = ()  # in the order of the classes; empty where nobody knows
    tokenizer: tuple[int, ...] = ()  # a `models.dvae.DVAEShape`, where the target is its codes
    encoder_tokens: bool = False  # pretrained with mask tokens in the encoder
    decoder_kind: str = "blocks"  # linear: one layer on the encoder's tokens, no other decoder
    mask_kind: str = "random"  # a name in `models.masking.KINDS`
    mask_unit: int = 0  # pixels, the side of the squares that are removed; 0: a patch
    loss: str = "l2"  # of what the decoder predicts
    segment_taps: tuple[int, ...] = ()  # blocks, from 0, that a segmentation head reads; or no head
    segment_width: int = 0  # channels of that head; it has `classes` and no `pool`
    segment_stride: int = 0  # pixels between the windows in which larger images are scored
    segment_ignore: int = 255  # the label of pixels that do not count
    segment_zero_is_other: bool = False  # label maps count classes from 1, 0 does not count

    def __post_init__(self) -> None:
        p, width, heads = self.patch_size, self.decoder_width, self.decoder_heads
        if any(side % p for side in self.image_size):
            raise UserError(f"image_size {self.image_size} is not divisible by patch_size {p}")
        if self.heads < 1 or self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by heads {self.heads}")
        if heads and width % heads:
            raise UserError(f"decoder_width {width} is not divisible by decoder_heads {heads}")
        if self.target not in ("", *TARGETS):
            raise UserError(f"target {self.target!r}: choose one of {', '.join(TARGETS)}")
        if self.pool not in POOLS:
            raise UserError(f"pool {self.pool!r}: choose one of {', '.join(POOLS[1:])}")
        names = {"decoder_kind": DECODERS, "mask_kind": KINDS, "loss": LOSSES}
        for field, known in names.items():
            if (value := getattr(self, field)) not in known:
                raise UserError(f"{field} {value!r}: choose one of {', '.join(known)}")
        if not len(self.mean) == len(self.std) == self.channels:
            needed = f"one value for each of {self.channels} channel(s)"
            raise UserError(f"mean {self.mean} and std {self.std} need {needed}")
        if self.class_names and len(self.class_names) != self.classes:
            raise UserError(f"{len(self.class_names)} class names for {self.classes} classes")
        if self.segments:
            self._check_segmenter()

    def _check_segmenter(self) -> None:
        taps, last = self.segment_taps, self.depth - 1
        if len(taps) != 4 or not all(0 <= tap <= last for tap in taps):
            raise UserError(f"segment taps {taps}: give four blocks, each one of 0 to {last}")
        if self.segment_width < 1 or self.classes < 1 or self.pool:
            head = f"width {self.segment_width}, {self.classes} classes, pool {self.pool!r}"
            raise UserError(f"segmentation head of {head}: give a width and classes, no pool")
        if min(self.grid) < 2:
            raise UserError(f"segmentation needs 2 x 2 patches at least, an image has {self.grid}")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], classes: int = 0, class_names: Sequence[str] = ()
    ) -> "ModelSpec":
        """The model of a run's config, live or from JSON; without `classes` the encoder alone."""
        model, data = config["model"], config["data"]
        shape = VARIANTS[model["variant"]]
        size = model["image_size"]
        size = (size,) if isinstance(size, int) else size
        task = config.get("task", "pretrain")
        own: dict[str, Any] = {}
        if task == "pretrain":
            decoder, mask = config["decoder"], config["mask"]
            own = {"target": config["target"], "loss": config.get("loss", "l2")}
            own |= {f"mask_{name}": x for name, x in mask.items() if name in MASK_FIELDS}
            own["encoder_tokens"] = mask.get("encoder_tokens", False)
            own["decoder_kind"] = decoder.get("kind", "blocks")
            if own["decoder_kind"] == "blocks":
                own |= {f"decoder_{name}": decoder[name] for name in ("width", "depth", "heads")}
        elif task == "tokenizer":
            dvae = config["dvae"]
            own = {"tokenizer": (dvae["codes"], dvae["width"], dvae["blocks"], 1)}
            model = {**model, "patch_size": STRIDE}
        elif classes and task == "segment":
            segment = config["segment"]
            taps, head_width = tuple(segment["taps"]), segment["width"]
            default = default_taps(model["depth"] or shape.depth)
            own = {"segment_taps": default if taps == (-1,) else taps}
            own["segment_width"] = head_width or model["width"] or shape.width
            own |= {f"segment_{name}": segment[name] for name in SEGMENT_FIELDS}
            own |= {"classes": classes, "class_names": tuple(class_names)}
        elif classes:
            pool = config["head"]["pool"]
            if task == "linear_probe" and pool == "mean":
                pool = "normed_mean"  # a probe reads pretrained features as they are
            own = {"pool": pool, "classes": classes, "class_names": tuple(class_names)}
        return cls(
            image_size=(size[0], size[-1]),
            patch_size=model["patch_size"],
            channels=model["channels"],
            width=model["width"] or shape.width,
            depth=model["depth"] or shape.depth,
            heads=model["heads"] or shape.heads,
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            **own,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def has_decoder(self) -> bool:
        """Whether there is something that predicts patches."""
        return self.decoder_depth > 0 or self.decoder_kind == "linear"

    @property
    def segments(self) -> bool:
        """Whether there is a segmentation head, on an encoder with relative biases, layer scales
        and no final norm."""
        return bool(self.segment_taps)

    @property
    def summary(self) -> str:
        """The feature that stands for an image, `cls` or `mean`: what the head reads, else cls."""
        return "mean" if self.pool.endswith("mean") else "cls"

    def without_decoder(self) -> "ModelSpec":
        """The encoder, with its head where there is one."""
        unused = {name: getattr(ModelSpec, name) for name in OF_A_DECODER}
        return dataclasses.replace(self, **unused)

    def masking(self, keys: jax.Array) -> Masking:
        """Masks as in pretraining, one for each of `keys` [B]; not of `mask_kind` file."""
        return sample_masking(self.mask_kind, keys, self.grid, self.mask_ratio, self.unit_patches)

    @property
    def unit_patches(self) -> int:
        """The side, in patches, of the squares that are removed."""
        return max(1, self.mask_unit // self.patch_size)

    # Models. `how` they are computed (dtype, stacking, remat ...) are further attributes of `ViT`
    # and, where it shares them, `Decoder`.

    def encoder(self, *, depth: int = 0, **how: Any) -> ViT:
        """The encoder, or its first `depth` blocks, and the final norm if the model has one."""
        # A head that reads the mean token has a norm of its own instead of the encoder's.
        norm = self.pool != "mean" and not self.segments
        if self.segments:
            how = {"relative_bias": True, "layer_scale": True, **how}
        size = (self.image_size, self.patch_size, self.channels)
        return ViT(*size, self.width, depth or self.depth, self.heads, final_norm=norm, **how)

    def mae(self, **how: Any) -> MAE:
        """The encoder and decoder; UserError if there is none or something is not known of it."""
        if not self.has_decoder:
            raise UserError("these weights have no decoder: take a full checkpoint")
        if self.decoder_depth and not self.decoder_heads:
            raise UserError("tensors do not tell their decoder's heads; give decoder_heads")
        if not self.target:
            raise UserError(
                "not known what the decoder predicts: give target=norm_pixel (official *_full.pth) "
                "or target=pixel (official mae_visualize_*.pth)"
            )
        target = TARGETS[self.target].of(self)
        if self.decoder_kind == "linear":
            decoder = LinearHead(target.outputs, how.get("dtype", jnp.float32))
        else:
            shape = (self.decoder_width, self.decoder_depth, self.decoder_heads)
            decoder = Decoder(self.grid, target.outputs, *shape, **how)
        return MAE(self.encoder(**how), decoder, target, self.encoder_tokens)

    def classifier(self, *, head_std: float = 2e-5, **how: Any) -> Classifier:
        """The encoder with its head; position tables are parameters. UserError without a head."""
        if not self.classes:
            raise UserError("these weights have no head: fine-tune or probe them first")
        if self.segments:
            raise UserError("these weights label pixels, not images: they have no classifier")
        encoder = self.encoder(position_params=True, **how)
        return Classifier(encoder, self.classes, self.pool, head_std)

    def segmenter(
        self, *, axis_names: tuple[str, ...] = (), dropout: float = DROPOUT, **how: Any
    ) -> Segmenter:
        """The encoder with its segmentation head; UserError without one. `axis_names` and `dropout`
        are those of `Segmenter`."""
        if not self.segments:
            raise UserError("these weights have no segmentation head: train one (task segment)")
        encoder = self.encoder(position_params=True, taps=self.segment_taps, **how)
        return Segmenter(
            encoder, self.classes, self.segment_width, encoder.dtype, axis_names, dropout
        )

    def abstract_params(self) -> dict[str, Any]:
        """Shapes of the parameters, the position tables among them, and of a segmenter's running
        `statistics`."""
        key = jax.random.key(0)
        images = jax.ShapeDtypeStruct((1, *self.image_size, self.channels), jnp.float32)
        if self.has_decoder:  # shapes depend neither on heads nor on the mask
            known = {"decoder_heads": self.decoder_heads or 1, "target": self.target or "pixel"}
            model = dataclasses.replace(self, **known).mae(position_params=True)
            ids = jnp.zeros((1, self.grid[0] * self.grid[1]), jnp.int32)
            return jax.eval_shape(model.init, key, images, Masking(ids[:, :1], ids, ids))["params"]
        if self.segments:
            variables = jax.eval_shape(self.segmenter().init, key, images)
            return {**variables["params"], "statistics": variables["statistics"]}
        if self.classes:
            return jax.eval_shape(self.classifier().init, key, images)["params"]
        encoder = self.encoder(position_params=True)
        return {"encoder": jax.eval_shape(encoder.init, key, images)["params"]}

    # Files.

    def to_json(self) -> str:
        """For `from_json`; a field that is younger than others is there only where it is used."""
        fields = dataclasses.asdict(self)
        for name in list(fields)[list(fields).index("class_names") :]:
            if fields[name] == getattr(ModelSpec, name):  # its default
                del fields[name]
        return json.dumps(fields)

    def to_metadata(self) -> dict[str, str]:
        """The header of a safetensors file; transformers 4 opens none without `format: pt`."""
        return {"format": "pt", METADATA_KEY: self.to_json()}

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """The inverse of `to_json`."""
        try:
            items = json.loads(text).items()
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in items})
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UserError(
                f"the model's description cannot be read ({error}); it is damaged, or of a newer "
                "version of mae_jax: update"
            ) from error
