"""Hands weights to others: `python -m mae_jax.export --from=RUN --format=timm --output=FOLDER`.

`--from` is a workdir, or weights in any format that is read (official MAE, timm, Hugging Face, our
own exports). `--output` is a new folder; it receives the weights and a model card.
"""

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from mae_jax.interop import export, serving
from mae_jax.interop.checkpoint import Checkpoint, open_checkpoint
from mae_jax.interop.description import WeightsError
from mae_jax.models.targets import TARGETS

_EXPORTERS: dict[str, export.Exporter] = {
    "timm": export.export_encoder,
    "official": export.export_official,
    "hf": export.export_hugging_face,
    "orbax": export.export_orbax,
}
FORMATS = (*_EXPORTERS, "stablehlo")

_FROM = flags.DEFINE_string("from", None, "Workdir, file or folder of weights")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "What to write")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must not exist or be empty")
_TARGET = flags.DEFINE_enum(
    "target", None, list(TARGETS), "What the decoder predicts, for files that do not say"
)
_LICENCE = flags.DEFINE_string("licence", None, "Licence of the weights, for the model card")


def run(
    source: str, format: str, output: str, *, known: Mapping[str, Any], licence: str | None
) -> pathlib.Path:
    """Exports `source`; returns the path of the weights.

    Raises:
      WeightsError, FileNotFoundError: see `open_checkpoint`; or the format cannot hold the model.
      FileExistsError: `output` holds something.
    """
    directory = pathlib.Path(output)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"--output={output}: exists and is not empty; choose another folder")
    checkpoint = open_checkpoint(source, **known)
    facts: dict[str, Any] = dict(checkpoint.facts)
    if licence:
        facts["licence"] = licence
    return write(checkpoint, format, directory, facts)


def write(
    checkpoint: Checkpoint, format: str, directory: pathlib.Path, facts: Mapping[str, Any]
) -> pathlib.Path:
    """Writes an open checkpoint in `format`."""
    if format == "stablehlo":
        return serving.export_stablehlo(checkpoint, directory, facts)
    return _EXPORTERS[format](checkpoint.params(), directory, checkpoint.description, facts)


def main(argv: list[str]) -> None:
    """Entry point; bad input ends with its message and exit status 2, not with a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    known = {"target": _TARGET.value} if _TARGET.value else {}
    try:
        path = run(_FROM.value, _FORMAT.value, _OUTPUT.value, known=known, licence=_LICENCE.value)
    except (WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {path} and its model card {path.parent / export.CARD_FILE}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["from", "format", "output"])
    app.run(main)
