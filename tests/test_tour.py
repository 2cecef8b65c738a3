"""The tour: its cells run on a run of the quickstart, and its stored outputs are whole."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from program import ROOT, environment, run

from mae_jax.data.demo import PHOTOGRAPHS
from mae_jax.interop.export import export_encoder
from mae_jax.models.spec import ModelSpec

NOTEBOOK = ROOT / "docs" / "tour.ipynb"
CODE = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]

# Runs cells as Jupyter does: names are shared, `display` shows a picture.
RUN_CELLS = """
import json, sys
shown = []
names = {"display": shown.append}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"cell {number}", "exec"), names)
print("shown:", *(f"{picture.width}x{picture.height}" for picture in shown))
"""


@pytest.mark.slow
def test_the_tour_runs_beside_a_run_of_the_quickstart(tmp_path):
    pytest.importorskip("skimage", reason="the tour's pictures are scikit-image's")
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    trained = run(runs / "quickstart", **{"steps": 2, "checkpoint.every": 2})
    assert trained.returncode == 0, trained.stderr
    names = tuple(name for name, *_ in PHOTOGRAPHS)
    spec = ModelSpec((32, 32), 8, 3, 32, 2, 4, pool="mean", classes=8, class_names=names)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), spec.abstract_params()
    )
    for folder in (docs, runs / "finetune" / "export"):
        folder.mkdir(parents=True)
    export_encoder(params, runs / "finetune" / "export", spec, {})
    result = subprocess.run(
        [sys.executable, "-c", RUN_CELLS],
        input=json.dumps(["".join(cell["source"]) for cell in CODE]),
        env=environment() | {"PYTHONPATH": str(ROOT)},
        cwd=docs,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    # Pictures of 32 px, three times as large: two images; three ratios of two rows, each with its
    # three pictures beside each other; two pairs.
    side = 3 * 32
    sizes = [(2, 1), *[(6, 1)] * 3, *[(2, 1)] * 2]
    assert lines[-1].split()[1:] == [f"{side * w}x{side * h}" for w, h in sizes]
    assert sum("masked: loss" in line for line in lines) == 3
    assert "tokens   (2, 17, 32) float32" in lines
    assert "chance             12.5%" in lines
    classified = [line for line in lines if line.startswith(("chelsea.png", "motorcycle_left.png"))]
    assert len(classified) == 2
    assert all(any(name in line for name in names) for line in classified)


def test_the_tour_carries_its_outputs():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == 6
    text = json.dumps([{**o, "data": {**o.get("data", {}), "image/png": ""}} for o in outputs])
    assert not [root for root in ("/home/", "/root/", "/tmp/", "/Users/") if root in text]
    assert str(ROOT) not in NOTEBOOK.read_text()
    assert NOTEBOOK.stat().st_size < 1_000_000
