"""The one writer of files: each appears complete or not at all."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from mae_jax import UserError


def write_atomically(path: str | pathlib.Path, content: bytes | str) -> None:
    """Writes a file that is complete or absent, making its folder where needed."""
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def complete_or_absent(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path, whose file becomes `path` if the block ends without an error."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it is not one.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
