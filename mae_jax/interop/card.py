"""Model cards: what a stranger needs to know about a folder of weights."""

from collections.abc import Mapping

from etils import epath

from mae_jax.models.spec import ModelSpec
from mae_jax.storage.files import write_atomically

CARD_FILE = "README.md"
SHOWN_CLASSES = 20

GENERAL_LICENCE = (
    "The code that made these weights is Apache-2.0. The weights are their owner's, who names "
    "their licence here; the licence of the training images may bind it. "
    "If the weights come from the official MAE release (facebookresearch/mae) or were trained "
    "starting from it, they are CC-BY-NC 4.0: no commercial use, and their source must be named."
)


def write_card(
    directory: epath.Path, spec: ModelSpec, facts: Mapping[str, object], form: str, load: str
) -> None:
    """Writes a README.md: `form` is in what form the folder holds the model, `load` Python lines.
    `facts` of the training are in the order shown; `licence` replaces the general paragraph."""
    kind = "Masked autoencoder" if spec.has_decoder else "Encoder of a masked autoencoder"
    kind = "Vision Transformer image classifier" if spec.classes else kind
    kind = "Semantic segmentation model (Vision Transformer, UperNet)" if spec.segments else kind
    facts = dict(facts)
    licence = facts.pop("licence", GENERAL_LICENCE)
    described = {
        "input": f"{spec.image_size[0]} x {spec.image_size[1]} pixels, {spec.channels} channel(s), "
        f"scaled to [0, 1], then mean {_numbers(spec.mean)} and deviation {_numbers(spec.std)} "
        "taken out",
        "encoder": f"ViT, {spec.depth} blocks of width {spec.width}, {spec.heads} heads, patches "
        f"of {spec.patch_size} pixels, LayerNorm eps 1e-6, exact GELU",
    }
    if spec.decoder_depth:
        heads = spec.decoder_heads or "an unknown number of"
        shape = f"{spec.decoder_depth} blocks of width {spec.decoder_width}"
        described["decoder"] = f"{shape}, {heads} heads"
    if spec.decoder_kind == "linear":
        described["decoder"] = "none: one linear layer on the encoder's tokens"
    if spec.encoder_tokens:
        described["mask tokens"] = "in the encoder, in pretraining; not needed for whole images"
    if spec.target:
        described["reconstruction target"] = spec.target
    if spec.mask_ratio:
        described["mask ratio"] = f"{spec.mask_ratio:g}"
    if spec.mask_kind != "random":
        described["masks"] = spec.mask_kind
    if spec.segments:
        described["encoder"] += ", relative position biases and layer scales, no final norm"
        described["head"] = f"UperNet of {spec.segment_width} channels on the outputs of blocks "
        described["head"] += f"{', '.join(map(str, spec.segment_taps))} (from 0), "
        described["head"] += f"{spec.classes} classes, logits of stride {spec.patch_size / 4:g}"
        described["label maps"] = f"{spec.segment_ignore} does not count"
        if spec.segment_zero_is_other:
            described["label maps"] += "; nor does 0, class i of the model is i + 1"
        if spec.segment_stride:
            windows = f"{spec.image_size[0]} x {spec.image_size[1]}, {spec.segment_stride} apart"
            described["larger images"] = f"windows of {windows}, mean logits"
    elif spec.classes:
        source = {"mean": "the mean patch token", "cls": "the class token"}[spec.summary]
        described["head"] = f"{spec.classes} classes from {source}"
    if spec.class_names:
        more = ", ..." if len(spec.class_names) > SHOWN_CLASSES else ""
        described["classes"] = ", ".join(spec.class_names[:SHOWN_CLASSES]) + more
    trained = facts or {"not recorded": "the weights came from a file that does not say"}
    text = (
        f"# {kind}\n\n{kind}, {form}.\n\n"
        f"## Load\n\n```python\n{load}\n```\n\n"
        f"## Model\n\n{_list(described)}\n"
        f"## Training\n\n{_list(trained)}\n"
        "Method: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.\n\n"
        f"## Licence\n\n{licence}\n"
    )
    write_atomically(directory / CARD_FILE, text)


def _list(items: Mapping[str, object]) -> str:
    return "".join(f"- {key}: {value}\n" for key, value in items.items())


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)
