"""What commands that read weights share: options for what a file does not tell, and its notes."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from mae_jax.interop.checkpoint import Checkpoint, open_checkpoint
from mae_jax.models.targets import TARGETS


def numbers(text: str) -> tuple[float, ...]:
    """`0.5,0.75` as numbers."""
    return tuple(float(x) for x in text.split(","))


def image_size(text: str) -> tuple[int, int]:
    """`224` or `192,256` as height and width."""
    sides = [int(x) for x in text.split(",")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text}: one side, or height,width")
    return sides[0], sides[-1]


@dataclasses.dataclass(frozen=True)
class _Option:
    type: Any
    help: str
    choices: tuple[str, ...] | None = None


# Fields of `interop.description.Description`.
_OPTIONS = {
    "heads": _Option(int, "attention heads of the encoder"),
    "decoder_heads": _Option(int, "attention heads of the decoder"),
    "image_size": _Option(image_size, "side, or height,width, the weights were trained at"),
    "target": _Option(str, "what the decoder predicts", tuple(TARGETS)),
    "mean": _Option(numbers, "mean of the input's channels, of pixels in [0, 1]"),
    "std": _Option(numbers, "deviation of the input's channels"),
}


def add_known(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `known` reads."""
    group = parser.add_argument_group("what the weights do not tell of themselves")
    for name, option in _OPTIONS.items():
        group.add_argument(f"--{name}", type=option.type, choices=option.choices, help=option.help)


def known(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Description` that were given."""
    given = {name: getattr(arguments, name) for name in _OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def open_weights(path: str, known: Mapping[str, Any] | None) -> Checkpoint:
    """`open_checkpoint`, and what its reader should know of the weights on stderr."""
    checkpoint = open_checkpoint(path, **(known or {}))
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    return checkpoint
