"""Model cards: what a stranger needs to know about a folder of weights."""

from collections.abc import Mapping

from mae_jax.interop.description import Description

OWN_WEIGHTS_LICENCE = (
    "The code that made these weights is Apache-2.0. The weights are their owner's, who names "
    "their licence here; the licence of the training images may bind it."
)
OFFICIAL_WEIGHTS_LICENCE = (
    "If the weights come from the official MAE release (facebookresearch/mae) or were trained "
    "starting from it, they are CC-BY-NC 4.0: no commercial use, and their source must be named."
)


def model_card(
    d: Description, facts: Mapping[str, object], *, content: str, how_to_load: str
) -> str:
    """The text of a README.md.

    Args:
      facts: what is known of the training, in the order to be shown, such as
        {"data": "imagenet2012", "steps": 250000}. `licence` replaces the general paragraph.
      content: what the folder holds, one sentence.
      how_to_load: Python lines.
    """
    facts = dict(facts)
    licence = facts.pop("licence", f"{OWN_WEIGHTS_LICENCE} {OFFICIAL_WEIGHTS_LICENCE}")
    described = {
        "input": f"{d.image_size[0]} x {d.image_size[1]} pixels, {d.channels} channel(s), scaled "
        f"to [0, 1], then mean {_numbers(d.mean)} and deviation {_numbers(d.std)} taken out",
        "encoder": f"ViT, {d.depth} blocks of width {d.width}, {d.heads} heads, patches of "
        f"{d.patch_size} pixels, LayerNorm eps 1e-6, exact GELU",
    }
    if d.decoder_depth:
        described["decoder"] = (
            f"{d.decoder_depth} blocks of width {d.decoder_width}, {d.decoder_heads} heads"
        )
    if d.target:
        described["reconstruction target"] = d.target
    if d.mask_ratio:
        described["mask ratio"] = f"{d.mask_ratio:g}"
    if d.classes:
        source = "the mean patch token" if d.pool == "mean" else "the class token"
        described["head"] = f"{d.classes} classes from {source}"
    trained = {str(key): str(value) for key, value in facts.items()}
    if not trained:
        trained = {"not recorded": "the weights came from a file that does not say"}
    return (
        f"# {content.split(',')[0].rstrip('.')}\n\n{content}\n\n"
        f"## Load\n\n```python\n{how_to_load.strip()}\n```\n\n"
        f"## Model\n\n{_list(described)}\n"
        f"## Training\n\n{_list(trained)}\n"
        "Method: Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377.\n\n"
        f"## Licence\n\n{licence}\n"
    )


def _list(items: Mapping[str, str]) -> str:
    return "".join(f"- {key}: {value}\n" for key, value in items.items())


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values)
