"""Exports onto a disk that is full, and after a kill."""

import os
import subprocess
import sys

import pytest
from program import ROOT, environment
from small_models import SMALL, random_params

from mae_jax import UserError, export
from mae_jax.interop.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights of 200 kB."""
    path = tmp_path_factory.mktemp("weights")
    export.export.export_official(random_params(), path, SMALL, {})
    return str(path)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with 64 kB, and a function that makes room on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    grow = ["mount", "-o", "remount,size=16m", str(disk)]
    yield disk, lambda: subprocess.run(grow, check=True)
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("format", export.FORMATS)
def test_a_full_disk_is_told_and_the_same_command_works_when_there_is_room(
    format, source, small_disk
):
    disk, make_room = small_disk
    for output in (disk / "new", disk):  # a mounted disk may itself be the folder
        with pytest.raises(UserError, match=rf"{output}.*could not be written.*make room"):
            export.run(source, format, str(output))
        assert list(disk.iterdir()) == []
    make_room()
    path = export.run(source, format, str(disk))
    assert path.exists()
    assert not any(entry.name.startswith(".") for entry in disk.rglob("*") if entry.is_file())
    if format != "stablehlo":
        assert open_checkpoint(disk).spec.depth == SMALL.depth


def test_the_command_ends_with_one_line(source, small_disk):
    disk, _ = small_disk
    command = [sys.executable, "-m", "mae_jax.export", f"--from={source}", "--format=timm"]
    result = subprocess.run(
        [*command, f"--output={disk / 'new'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {disk / 'new'}")
    assert "Traceback" not in result.stderr


def test_what_a_killed_export_left_is_written_again_and_other_folders_are_refused(source, tmp_path):
    (tmp_path / "killed" / ".incomplete" / "params").mkdir(parents=True)
    (tmp_path / "killed" / "README.md").write_text("half")
    export.run(source, "orbax", str(tmp_path / "killed"))
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "README.md",
        "description.json",
        "params",
    ]
    with pytest.raises(UserError, match="exists and is not empty"):
        export.run(source, "orbax", str(tmp_path / "killed"))
