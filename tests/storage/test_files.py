"""What is written is whole or not there, whatever the disk says."""

import contextlib
import json
import pathlib
import resource
import signal

import numpy as np
import pytest
from PIL import Image

from mae_jax import UserError
from mae_jax.storage import files


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def no_file_above(size):
    """Writing further into a file fails as on a full disk (EFBIG in place of ENOSPC)."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_file_that_does_not_fit_leaves_the_one_before(tmp_path):
    files.write_atomically(tmp_path / "new" / "a.txt", "before")
    with no_file_above(1000), pytest.raises(UserError, match=r"a\.txt: could not be .*make room"):
        files.write_atomically(tmp_path / "new" / "a.txt", b"x" * 5000)
    assert names(tmp_path) == ["new/a.txt"]
    assert (tmp_path / "new" / "a.txt").read_text() == "before"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match=r"a/b\.txt: could not be written"):
        files.write_atomically(tmp_path / "a" / "b.txt", "")


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def write():
        with files.complete_or_absent(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert names(tmp_path) == []


def test_pictures_and_json_come_back(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    files.write_png(tmp_path / "a.png", pixels)
    files.write_json(tmp_path / "a.json", {"a": [1, 2]})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 2]}


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_is_whole_or_as_it_was(tmp_path, exists):
    folder = tmp_path / "export"
    if exists:
        folder.mkdir()

    def write():
        with files.complete_or_absent_folder(folder) as partial:
            (partial / "weights").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert folder.exists() == exists
    assert names(tmp_path) == []
    for content in ("old", "new"):
        with files.complete_or_absent_folder(folder) as partial:
            (partial / "params").mkdir()
            (partial / "params" / content).write_text(content)
            (partial / "card").write_text(content)
    assert names(folder) == ["card", "params/new"]
    assert (folder / "card").read_text() == "new"


def test_a_folder_half_written_by_a_killed_program_is_told_and_begun_again(tmp_path):
    entered = files.complete_or_absent_folder(tmp_path)
    pathlib.Path(entered.__enter__(), "weights").write_text("half")  # and never left
    assert files.unfinished(tmp_path)
    with files.complete_or_absent_folder(tmp_path) as partial:
        (partial / "card").write_text("whole")
    assert not files.unfinished(tmp_path)
    assert names(tmp_path) == ["card"]


def test_lines_are_appended(tmp_path):
    for line in ("one", "two"):
        files.append_line(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_a_line_that_does_not_fit_is_an_error_with_a_remedy(tmp_path):
    with no_file_above(10), pytest.raises(UserError, match="make room"):
        files.append_line(tmp_path / "lines", "x" * 20)
