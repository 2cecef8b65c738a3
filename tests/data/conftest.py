import pathlib

import pytest

SHARED = pathlib.Path(__file__).parents[2].parent / "shared" / "tfds"


@pytest.fixture
def shared_tfds():
    if not SHARED.is_dir():
        pytest.skip(f"no datasets at {SHARED}")
    return str(SHARED)
