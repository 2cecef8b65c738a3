import json
import subprocess
import sys

import pytest

from mae_jax import results
from mae_jax.config import default_config
from mae_jax.results import SCORES, header, read_results, table, write_results


def supervised(**fields):
    config = default_config()
    config.task, config.init_from = "finetune", "runs/mae"
    config.epochs, config.batch_size = 100.0, 1024
    config.update_from_flattened_dict(fields)
    return config


def finished(workdir, top1, config=None, steps=20):
    """A workdir as a finished run leaves it."""
    workdir.mkdir()
    lines = [
        {"step": 10, "train/loss": 2.0, "train/images_per_second": 100.0},
        {"step": 10, "eval/loss": 9.0, "eval/top1": 0.99, "eval/top5": 1.0, "eval/examples": 50.0},
        {"step": 15, "train/loss": 2.0, "train/images_per_second": 3000.0},
        {"step": 20, "train/loss": 1.0, "train/images_per_second": 200.0},
        {"step": 20, "eval/loss": 1.5, "eval/top1": top1, "eval/top5": 0.9, "eval/examples": 50.0},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config or supervised()
    return write_results(workdir, config, train_examples=2048, steps=steps, parameters=86_000_000)


def test_results_hold_the_last_evaluation_and_what_was_run(tmp_path):
    finished(tmp_path / "run", 0.8357)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    expected = {
        "task": "finetune",
        "variant": "b",
        "patch_size": 16,
        "image_size": [224, 224],
        "init_from": "runs/mae",
        "trainable_blocks": -1.0,
        "epochs": 100.0,
        "batch_size": 1024,
        "seed": 0,
        "data": "imagenet2012",
        "steps": 20,
        "top1": 0.8357,
        "top5": 0.9,
        "loss": 1.5,
        "examples": 50,
        "images_per_second": 200.0,
        "parameters": 86_000_000,
    }
    assert {name: result[name] for name in expected} == expected
    assert result["markdown_header"] == header(SCORES)
    assert result["markdown"] == (
        "| finetune | ViT-B/16, 224 px | runs/mae | all | imagenet2012 | 100 | 20 | 1024 | 83.57 "
        "| 90.00 | 1.5000 | 200 | 0 |"
    )


def test_a_run_of_steps_counts_its_epochs(tmp_path):
    assert finished(tmp_path / "run", 0.5, supervised(steps=20))["epochs"] == 20 * 1024 / 2048


def test_without_an_evaluation_of_the_last_step_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="no evaluation of the last step, 40"):
        finished(tmp_path / "run", 0.5, steps=40)
    assert not (tmp_path / "run" / "results.json").exists()


def test_runs_that_differ_by_seed_alone_are_one_row(tmp_path):
    # The four ViT-B fine-tuning runs of the reference.
    scores = {0: 0.8363, 1: 0.8366, 2: 0.8352, 3: 0.8346}
    for seed, top1 in scores.items():
        finished(tmp_path / str(seed), top1, supervised(seed=seed))
    lines = table([read_results(tmp_path / str(seed)) for seed in scores]).splitlines()
    assert "\n".join(lines[:2]) == header(SCORES)
    assert len(lines) == 3
    assert "| 83.57 ± 0.09 (4) | 90.00 ± 0.00 (4) | 1.5000 | 200 | 0, 1, 2, 3 |" in lines[2]


def test_runs_that_only_look_alike_stay_apart_and_the_difference_is_told(tmp_path):
    fields = [{"optim.base_lr": 1e-3}, {"optim.base_lr": 5e-4}, {"optim.base_lr": 5e-4, "seed": 1}]
    runs = [finished(tmp_path / str(i), 0.5, supervised(**f)) for i, f in enumerate(fields)]
    lines = table(runs).splitlines()
    assert len(lines) == 2 + 2 + 1 + 2
    assert "50.00 | 90.00" in lines[2]
    assert "50.00 ± 0.00 (2)" in lines[3]
    assert lines[5:] == ["Row 1: optim.base_lr=0.001", "Row 2: optim.base_lr=0.0005"]


def test_how_a_run_was_carried_out_does_not_set_it_apart(tmp_path):
    one = finished(tmp_path / "1", 0.5, supervised(log_every=1))
    two = finished(tmp_path / "2", 0.6, supervised(seed=1, **{"mesh.fsdp": 8}))
    assert "55.00 ± 7.07 (2)" in table([one, two])


def test_partial_evaluations_and_other_folders_are_set_apart(tmp_path):
    fields = [{}, {"eval.batches": 2}, {"data.dir": "elsewhere"}]
    runs = [finished(tmp_path / str(i), 0.5, supervised(**f)) for i, f in enumerate(fields)]
    lines = table(runs).splitlines()
    assert [line.split("|")[9].strip() for line in lines[2:5]] == ["50.00"] * 3


def test_rows_name_models_starts_and_trained_blocks(tmp_path):
    fields = {
        "a": {"task": "linear_probe", "model.variant": "l"},
        "b": {"task": "scratch", "init_from": "", "model.variant": "ti", "model.width": 32},
        "c": {"trainable_blocks": 0.5, "model.image_size": (128, 64), "model.patch_size": 8},
    }
    runs = [finished(tmp_path / name, 0.5, supervised(**f)) for name, f in fields.items()]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in table(runs).splitlines()]
    assert rows[2:] == [
        ["linear_probe", "ViT-L/16, 224 px", "runs/mae", "0"],
        ["scratch", "ViT-Ti/16, 224 px (width 32)", "scratch", "all"],
        ["finetune", "ViT-B/8, 128x64 px", "runs/mae", "0.5"],
    ]


def test_the_command_prints_the_table_and_counts_a_workdir_once(tmp_path, capsys):
    run = finished(tmp_path / "run", 0.5)
    results.main([str(tmp_path / "run"), str(tmp_path / "run") + "/"])
    assert capsys.readouterr().out == f"{header(SCORES)}\n{run['markdown']}\n"


def command(*workdirs):
    command = [sys.executable, "-m", "mae_jax.results", *workdirs]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_workdir_without_results_is_left_out_and_told(tmp_path):
    run = finished(tmp_path / "run", 0.5)
    done = command(tmp_path / "run", tmp_path / "unfinished")
    assert done.returncode == 0
    assert done.stdout == f"{header(SCORES)}\n{run['markdown']}\n"
    assert done.stderr.startswith(f"left out: {tmp_path / 'unfinished'}")
    alone = command(tmp_path / "unfinished")
    assert alone.returncode == 2
    assert "none of these workdirs" in alone.stderr


def test_broken_results_end_the_command_with_their_name(tmp_path):
    finished(tmp_path / "run", 0.5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"top1":')
    done = command(tmp_path / "run", tmp_path / "broken")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'broken'}")
    assert "Traceback" not in done.stderr


def test_the_time_of_any_run_is_told_one_under_way_or_pretraining_too(tmp_path):
    run = finished(tmp_path / "run", 0.5)
    (tmp_path / "mae").mkdir()
    times = {"began": 100.0, "until": 200.0, "starts": 3, "step": 40, "total_steps": 800}
    times |= {"steps_repeated": 7, "goodput": 0.8, "seconds": {"step": 80.0, "repeated": 20.0}}
    (tmp_path / "mae" / "time.json").write_text(json.dumps(times))
    time = [
        f"{tmp_path / 'mae'}: 40 of 800 steps, 3 start(s), 01:40 in all, goodput 80.0%, last heard",
        "  step           01:20  80.0%  training steps, each once",
        "  repeated       00:20  20.0%  7 steps made again, ",
    ]
    done = command(tmp_path / "run", tmp_path / "mae")
    assert done.stdout.startswith(f"{header(SCORES)}\n{run['markdown']}\n\n")
    for line, expected in zip(done.stdout.splitlines()[4:], time, strict=True):
        assert line.startswith(expected)
    alone = command(tmp_path / "mae")
    assert alone.returncode == 0
    assert alone.stdout == done.stdout.partition("\n\n")[2]
