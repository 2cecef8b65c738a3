"""Hands weights to others.

    python -m mae_jax.export --from=RUN --format=timm --output=FOLDER

`--from` is a workdir, or weights in any format that is read (official MAE, timm, Hugging Face, our
own exports). `--output` is a new folder; it receives the weights and a model card.
"""

if __name__ == "__main__":
    from mae_jax.cli import start

    raise SystemExit(start("export"))

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mae_jax import UserError, cli
from mae_jax.interop import export, serving
from mae_jax.interop.card import CARD_FILE
from mae_jax.storage.files import complete_or_absent_folder, to_path, unfinished

_EXPORTERS: dict[str, export.Exporter] = {
    "timm": export.export_encoder,
    "official": export.export_official,
    "hf": export.export_hugging_face,
    "orbax": export.export_orbax,
}
FORMATS = (*_EXPORTERS, "stablehlo")


def run(
    source: str,
    format: str,
    output: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> epath.Path:
    """Exports `source` in `format`, one of `FORMATS`; returns the path of the weights.

    `overrides`: see `open_checkpoint`; `licence`: of the weights, for the card. UserError, with
    nothing left in `output`: see `open_checkpoint`; the format cannot hold the model, `output`
    holds something, or cannot be written.
    """
    directory = to_path(output)
    empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not empty and not unfinished(directory):
        raise UserError(f"--output={output}: exists and is not empty; choose another folder")
    checkpoint = cli.open_weights(source, overrides)
    facts = dict(checkpoint.facts)
    if licence:
        facts["licence"] = licence
    with complete_or_absent_folder(directory) as folder:
        if format == "stablehlo":
            path = serving.export_stablehlo(checkpoint, folder, facts)
        else:
            exporter = _EXPORTERS[format]
            path = exporter(checkpoint.params(), folder, checkpoint.spec, facts)
    return directory / path.name


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = cli.Parser("export", __doc__)
    parser.add_argument("--from", dest="source", required=True, help="workdir, file or folder")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--licence", help="of the weights, for the model card")
    cli.add_overrides(parser)
    args = parser.parse_args(argv)
    path = run(
        args.source,
        args.format,
        args.output,
        overrides=cli.overrides(args),
        licence=args.licence,
    )
    print(f"wrote {path} and its model card {path.parent / CARD_FILE}")
