"""The page about a sweep or a run, against runs written by hand."""

import html.parser
import json
import re
import statistics
import sys

import numpy as np
import pytest

from mae_jax import UserError, report
from mae_jax.config import default_config
from mae_jax.storage.files import write_json, write_png
from mae_jax.sweeps import keep_record, prepare

pytest.importorskip("matplotlib", reason="the report draws with matplotlib")


def write_run(folder, config, top1=None, losses=(1.0, 0.5), done=True):
    """What a finished run leaves, or one that is half through."""
    write_json(folder / "config.json", config.to_dict())
    lines = [
        {"step": 10 * (i + 1), "train/loss": loss, "train/images_per_second": 100.0 * (i + 1)}
        for i, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    step = 20 if done else 10
    times = {"began": 0.0, "until": 1.0, "starts": 1, "step": step, "total_steps": 20}
    times |= {"steps_repeated": 0, "goodput": 0.5, "seconds": {"step": 3600.0, "away": 1800.0}}
    write_json(folder / "time.json", times)
    if config.task == "pretrain":
        write_png(folder / "reconstructions/step_00000020.png", np.zeros((40, 2000, 3), np.uint8))
    if not done:
        (folder / "log.txt").write_text("10:00:00 step 10/20\nerror: no room on the disk\n")
    elif top1 is None:
        (folder / "export").mkdir()
    else:
        result = {"top1": top1, "top5": 1.0, "loss": 0.1, "examples": 100}
        result |= {"images_per_second": 100.0, "config": config.to_dict()}
        write_json(folder / "results.json", result)


@pytest.fixture
def sweep(tmp_path):
    """Of mask ratios 0.75 has two seeds, 0.5 one, 0.9 is half through, the rest not begun."""
    sweeps = prepare(
        tmp_path,
        "tiny",
        files=["mask_ratio", "partial", "mask_token", "decoder_depth"],
        seeds=[0, 1],
    )
    keep_record(tmp_path, sweeps.record)
    top1 = {"75": (0.70, 0.80), "50": (0.60, None)}
    for member, values in top1.items():
        for seed, value in enumerate(values):
            for task, run in sweeps.rows[f"mask_ratio {member} seed {seed}"].items():
                if value is not None:
                    own = None if task == "pretrain" else value - 0.3 * (task == "linear_probe")
                    write_run(run.folder, run.config, own)
    run = sweeps.rows["mask_ratio 90 seed 0"]["pretrain"]
    write_run(run.folder, run.config, done=False)
    return tmp_path


def written(folder):
    report.main([str(folder)])
    return (folder / "report/report.md").read_text(), (folder / "report/index.html").read_text()


def row(markdown, head, start):
    """Cells of a row by its first cell, in the first table whose head starts so."""
    table = markdown.split(f"| {head} |")[1].split("\n\n")[0]
    line = next(line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_are_those_of_the_runs_beside_the_papers(sweep):
    markdown, _ = written(sweep)
    spread = f"{100 * statistics.stdev([0.7, 0.8]):.2f}"
    assert row(markdown, "masked, %", "75") == [
        *("75", f"75.00 ± {spread} (2)", "84.9", f"45.00 ± {spread} (2)", "73.5")
    ]
    fine, paper, probed, paper_probed = row(markdown, "masked, %", "50")[1:]
    assert (fine, paper, paper_probed) == ("60.00; unfinished: pretrain: not begun", "84.9", "69.9")
    assert probed.startswith("30.00")
    # One pretraining of one hour and a half, half of it between starts; 100 and 200 images/s.
    assert row(markdown, "member", "50")[1:3] == ["1", "150"]


def test_a_sweep_of_pretraining_alone_shows_its_loss(tmp_path):
    sweeps = prepare(tmp_path, "quickstart", grids=["mask.ratio=0.5,0.75"])
    keep_record(tmp_path, sweeps.record)
    for run, loss in zip(sweeps.runs, (0.25, 0.5), strict=True):
        write_run(run.folder, run.config)
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 20, "eval/loss": loss}) + "\n")
    markdown, _ = written(tmp_path)
    assert row(markdown, "mask.ratio", "0.5") == ["0.5", "0.2500"]
    assert row(markdown, "mask.ratio", "0.75") == ["0.75", "0.5000"]


def test_unfinished_members_are_marked(sweep):
    markdown, _ = written(sweep)
    assert row(markdown, "masked, %", "10")[1] == "pretrain: not begun"
    cell = "pretrain: step 10 of 20 (error: no room on the disk), pretrain: not begun"
    assert row(markdown, "masked, %", "90")[1] == cell
    assert "Base tiny. 9 of 60 runs are finished." in markdown


def test_the_page_is_whole_and_needs_no_other_file(sweep):
    _, page = written(sweep)
    open_tags = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            assert not {"href", "srcset"} & attributes.keys()
            assert attributes.get("src", "data:").startswith("data:")
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Parser().feed(page)
    assert open_tags == []
    assert "url(" not in page
    assert "@import" not in page


def test_markdown_names_the_pictures_that_are_there(sweep):
    markdown, page = written(sweep)
    named = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert set(named) == {path.name for path in (sweep / "report").glob("*.png")}
    assert len(named) == page.count("<img ")
    assert {"mask_ratio.png", "mask_ratio_loss.png", "partial.png"} <= set(named)


def test_a_run_has_a_page_of_its_own(tmp_path):
    config = default_config()
    config.mask.ratio = 0.6
    write_run(tmp_path, config)
    markdown, _ = written(tmp_path)
    assert "Task pretrain, done." in markdown
    assert row(markdown, "field", "mask.ratio") == ["mask.ratio", "0.6", "0.75"]
    assert "| target |" not in markdown  # at its default
    assert (tmp_path / "report/curves.png").exists()


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither sweep\.json"):
        report.main([str(tmp_path)])


def test_without_matplotlib_the_extra_is_named(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"mae_jax\[report\]"):
        report.main([str(sweep)])
