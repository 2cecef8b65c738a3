"""The one writer of files: each appears complete or not at all.

A path is on disk or in a Google Cloud Storage bucket (`gs://BUCKET/...`), and `to_path` makes it:
nobody outside this file renames, appends or makes folders. A bucket cannot append, nor rename a
folder; but an object there appears whole: what goes there is made on disk and sent. What the system
refuses (no room, no permission) is a `UserError` that names the path; what may pass is tried again,
then a `TryAgainError`.
"""

import contextlib
import errno
import functools
import importlib.util
import io
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mae_jax import TryAgainError, UserError
from mae_jax.storage.retry import is_transient, retried

PathLike = str | os.PathLike

_PARTIAL = ".incomplete"  # holds what `complete_or_absent_folder` has not finished
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def to_path(place: PathLike) -> epath.Path:
    """A place on disk, made absolute, or in a bucket; UserError: buckets cannot be used here."""
    text = os.fspath(place)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    if scheme != "gs" or not rest:
        raise UserError(f"{text}: buckets are written gs://BUCKET/FOLDER; no others are known")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets need more packages: pip install 'mae_jax[gcs]'")
    _never_remember_listings()
    return epath.Path(text)


@functools.cache
def _never_remember_listings() -> None:
    import fsspec.config

    # What another process wrote is to be seen.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def in_bucket(path: PathLike) -> bool:
    """Whether a path is in a bucket, not on disk."""
    return os.fspath(path).startswith("gs://")


@contextlib.contextmanager
def local_copy(path: PathLike) -> Iterator[PathLike]:
    """Gives a file on disk with the content of `path`: itself, or one for as long as the block."""
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, epath.Path(path).name)
        _bucket().get_file(os.fspath(path), copy)
        yield copy


def versions(paths: Sequence[PathLike]) -> list[str | None]:
    """What changes with a file's content, of each; None: it is not there. In a bucket one listing
    of each folder tells."""
    folders = {os.path.dirname(path) for path in map(os.fspath, paths) if in_bucket(path)}
    listed: dict[str, str] = {}
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            entries = _bucket().ls(folder, detail=True)
            listed |= {f"gs://{e['name']}": f"{e['size']} {e.get('generation')}" for e in entries}

    def on_disk(path: PathLike) -> str | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        return f"{status.st_size} {status.st_mtime_ns}"

    return [listed.get(os.fspath(p)) if in_bucket(p) else on_disk(p) for p in paths]


def _bucket() -> Any:
    """What reads and writes whole objects."""
    import fsspec

    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def explain_failure(path: PathLike) -> Iterator[None]:
    """Turns an OSError of writing to `path` into a UserError with the remedy."""
    try:
        yield
    except OSError as error:
        if is_transient(error):
            raise TryAgainError(f"{path}: {error.strerror or error}") from error
        remedy = "see that its folder is there and can be written to"
        if error.errno in _NO_ROOM or os.strerror(errno.ENOSPC) in str(error):
            remedy = "make room there and start again"
        elif error.errno in _NOT_ALLOWED:
            remedy = "choose a place that you may write to"
        shown = str(path).replace(f"/{_PARTIAL}", "")
        reason = error.strerror or error
        raise UserError(f"{shown}: could not be written ({reason}); {remedy}") from error


@retried
def write_atomically(path: PathLike, content: bytes | str) -> None:
    """Writes a file that is complete or absent, making its folder where needed."""
    with complete_or_absent(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: PathLike, value: Any) -> None:
    """Writes a JSON file for people and programs."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_png(path: PathLike, pixels: np.ndarray) -> None:
    """Writes a picture [H, W, 3] uint8."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    write_atomically(path, content.getvalue())


@contextlib.contextmanager
def complete_or_absent(path: PathLike) -> Iterator[epath.Path]:
    """Gives a temporary path, whose file becomes `path` if the block ends without an error."""
    path = to_path(path)
    if in_bucket(path):
        with explain_failure(path), tempfile.TemporaryDirectory() as folder:
            temporary = epath.Path(folder) / path.name
            yield temporary
            _bucket().put_file(os.fspath(temporary), os.fspath(path))
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explain_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def complete_or_absent_folder(path: PathLike) -> Iterator[epath.Path]:
    """Gives a temporary folder, whose content replaces that of `path` if the block ends well.

    Other names in `path` stay. After a kill it is `unfinished`; the next attempt starts afresh.
    """
    path = to_path(path)
    partial = path / _PARTIAL  # inside, as `path` may be a mounted disk of its own
    if in_bucket(path):
        with explain_failure(path), tempfile.TemporaryDirectory() as folder:
            yield epath.Path(folder)
            partial.write_text("")
            for entry in epath.Path(folder).iterdir():
                _remove(path / entry.name)
                _bucket().put(os.fspath(entry), os.fspath(path / entry.name), recursive=True)
            partial.unlink()
        return
    with explain_failure(path):
        new = not path.exists()
        _remove(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            for entry in list(partial.iterdir()):
                _remove(path / entry.name)
                entry.rename(path / entry.name)
        finally:
            _remove(partial)
            if new and not any(path.iterdir()):
                path.rmdir()


def unfinished(path: PathLike) -> bool:
    """Whether a folder is what a killed `complete_or_absent_folder` left."""
    return (to_path(path) / _PARTIAL).exists()


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


@retried
def append_line(path: PathLike, line: str) -> None:
    """Adds a line to a text file; it is with the system when this returns."""
    path = to_path(path)
    if in_bucket(path):  # written anew: a run's metrics are a few MB
        before = b""
        with contextlib.suppress(FileNotFoundError):
            before = read_bytes(path)
        with complete_or_absent(path) as temporary:  # tried again here, and here alone
            temporary.write_bytes(before + f"{line}\n".encode())
        return
    with explain_failure(path), path.open("a") as file:
        file.write(line + "\n")


def read_bytes(path: PathLike) -> bytes:
    """What is in a file, all of it as one writer left it.

    A path's own `read_bytes` asks a bucket for the size first and then for so many bytes: of an
    object that is replaced in between it gives a piece.
    """
    if in_bucket(path):
        return _bucket().cat_file(os.fspath(path))
    return to_path(path).read_bytes()


@retried
def read_json(path: PathLike) -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none."""
    try:
        content = json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


@retried
def read_json_lines(path: PathLike) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; without those half-written, none without a file."""
    objects, content = [], b""
    with contextlib.suppress(FileNotFoundError):
        content = read_bytes(path)
    for line in content.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # a process died here
            objects.append(json.loads(line))
    return [x for x in objects if isinstance(x, dict)]
