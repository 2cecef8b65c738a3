"""The house rule that keeps rooms apart: imports point one way."""

import ast
import pathlib

import pytest

import mae_jax

PACKAGE = pathlib.Path(mae_jax.__file__).parent

# What the modules of a room may import, beside their own room, the standard library and others'
# packages. `config` is read by whoever starts work, and handed down as plain arguments.
ALLOWED = {
    "models": set(),
    "storage": set(),
    "data": {"storage", "models"},
    "augment": {"storage", "models"},
    "distributed": {"storage", "models"},
    "interop": {"storage", "models"},
    "planning": {"distributed", "storage", "models"},
    "train": {"planning", "data", "augment", "distributed", "interop", "storage", "models"},
    "pictures": {"data", "augment", "distributed", "interop", "storage", "models", "train"},
    "evaluators": {"data", "augment", "distributed", "interop", "storage", "models", "train"},
    "tasks": {
        *("config", "evaluators", "pictures", "train"),
        *("data", "augment", "distributed", "interop", "storage", "models"),
    },
}


def imported_rooms(path: pathlib.Path) -> set[str]:
    """First names below `mae_jax` that a module imports, wherever in the file it does."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts = [name.split(".") for name in names]
        rooms |= {p[1] for p in parts if p[0] == "mae_jax" and len(p) > 1}
    return rooms - {"UserError", "TryAgainError", "PeerError", "__version__"}


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_of_a_room_point_one_way(room):
    for path in sorted((PACKAGE / room).rglob("*.py")):
        if path.name == "plan.py" and room == "distributed":
            continue  # the old spelling of a command
        stray = imported_rooms(path) - ALLOWED[room] - {room}
        assert not stray, f"{path.relative_to(PACKAGE)} imports {sorted(stray)}"


def test_every_folder_is_a_room_with_a_rule():
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert folders - {"bench"} == set(ALLOWED)
