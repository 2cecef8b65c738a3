"""The shipped sweeps: every member is a config that can run, and the base is in each of them."""

import pytest

from mae_jax.config import recipe_folder
from mae_jax.sweeps import prepare

FOLDER = recipe_folder() / "ablations"
TABLES = {"decoder_depth", "decoder_width", "mask_token", "target", "augmentation", "mask_kind"}
FIGURES = {"mask_ratio", "schedule", "partial"}
FILES = sorted(TABLES | FIGURES)


def test_the_papers_ablations_are_there():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("base", ["paper", "small", "tiny"])
def test_every_member_is_valid_on_every_base(tmp_path, base):
    sweeps = prepare(tmp_path, base, files=FILES)
    ((label, reason),) = sweeps.refused
    assert label == "target token seed 0"
    assert "give tokenizer=FILE" in reason


def test_the_papers_baseline_is_one_run_of_all_sweeps(tmp_path):
    # 84.9 fine-tuned and 73.5 probed is the default of the paper's table 1.
    sweeps = prepare(tmp_path, "paper", files=FILES)
    found = [
        (name, member["runs"]["0"])
        for name, sweep in sweeps.record.items()
        for member in sweep["members"]
        if member["paper"] == {"finetune": 84.9, "linear_probe": 73.5}
    ]
    assert {name for name, _ in found} == set(FILES) - {"partial"}
    pretrained = {runs["pretrain"] for _, runs in found}
    assert len(pretrained) == 1
    assert pretrained.pop().startswith("pretrain-seed0-")
    partial = sweeps.record["partial"]["members"]
    assert partial[0]["runs"]["0"]["linear_probe"] == found[0][1]["linear_probe"]
    assert partial[-1]["runs"]["0"]["finetune"] == found[0][1]["finetune"]
    assert [member["x"] for member in partial] == [0, 0.5, 1, 2, 4, 6, 12, 18, 24]


def test_what_a_run_computes_names_its_folder(tmp_path):
    def names(**options):
        sweeps = prepare(tmp_path, "tiny", files=["mask_ratio"], only=["75"], **options)
        return [run.folder.name for run in sweeps.runs]

    assert names() == names(given={"config": {"data.threads": "3", "mask.ratio": "0.5"}})
    assert not set(names()) & set(names(seeds=[1]))
    other_probe = names(given={"linear_probe": {"steps": "9"}})
    assert other_probe[:2] == names()[:2]
    assert other_probe[2] != names()[2]
    wider = names(given={"config": {"model.width": "64"}})  # the follow-ups' model, too
    assert not set(names()) & set(wider)


def test_a_tokenizer_is_for_the_member_that_reads_it(tmp_path):
    given = {"config": {"tokenizer": "codes.bin"}}
    sweeps = prepare(tmp_path, "tiny", files=["target", "schedule"], given=given)
    assert sweeps.refused == []
    read = [run.config.target for run in sweeps.runs if run.config.tokenizer]
    assert read == ["token"]
    assert prepare(tmp_path, "tiny", files=["schedule"]).rows.keys() < sweeps.rows.keys()
    plain = {run.folder.name for run in prepare(tmp_path, "tiny", files=["schedule"]).runs}
    assert plain < {run.folder.name for run in sweeps.runs}


def test_a_grid_has_all_combinations(tmp_path):
    grids = ["data.scale=0.2,1;0.5,1", "mask.ratio=0.5,0.75,0.9"]
    sweeps = prepare(tmp_path, "quickstart", grids=grids)
    assert len(sweeps.rows) == 6
    runs = [run.config for run in sweeps.runs]
    assert {(tuple(c.data.scale), c.mask.ratio) for c in runs} == {
        (scale, ratio) for scale in ((0.2, 1.0), (0.5, 1.0)) for ratio in (0.5, 0.75, 0.9)
    }


def test_ones_own_files_are_sweep_and_base(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def members(base):\n"
        "    yield {'name': 'half', 'pretrain': {'steps': base.steps // 2}, 'finetune': None}\n"
    )
    (tmp_path / "base.py").write_text(
        "BASE = {'pretrain': ('quickstart', {'steps': 30}), 'finetune': ('finetune', {})}"
    )
    sweeps = prepare(tmp_path, str(tmp_path / "base.py"), files=[str(tmp_path / "mine.py")])
    (run,) = sweeps.runs
    assert run.config.steps == 15
