import json

import pytest

from mae_jax import UserError, bench
from mae_jax.bench import start

pytest.importorskip("skimage", reason="the embedded data needs scikit-image")
FIELDS = ("model.depth=1", "model.width=32", "model.heads=2", "model.image_size=32")
FIELDS += ("decoder.depth=1", "decoder.width=16", "decoder.heads=2", "batch_size=8")
FIELDS += ("pictures.count=2", "eval.batches=1", "data.threads=1")
COMMAND = ["start", "--config=quickstart", *(f"--config.{field}" for field in FIELDS)]


@pytest.mark.slow
def test_a_warm_start_is_shorter_and_every_part_is_told(capfd):
    bench.main([*COMMAND, "--rounds=1", "--json"])
    starts = json.loads(capfd.readouterr().out)
    (cold,), (warm,) = starts["cold"], starts["warm"]
    for one in (cold, warm):
        phases = ("imports", "open", "start", "restore", "pictures", "compile", "step")
        assert min(one["seconds"][phase] for phase in phases) > 0
        assert one["total"] == pytest.approx(sum(one["seconds"].values()) - one["seconds"]["CPU"])
    assert warm["total"] < cold["total"]


def test_the_table_has_medians_ranges_and_no_empty_rows(monkeypatch, capsys):
    made = []

    def measure(config, workdir):
        made.append(config.compile.cache_dir)
        n = float(len(made))
        return {"seconds": {"imports": n, "CPU": 9.0}, "total": n}

    monkeypatch.setattr(start, "measure", measure)
    bench.main([*COMMAND, "--rounds=3"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| s, median of 3 rounds (range) | cold | warm |"
    assert rows[0] == "| imports | 3.00 (1.00 to 5.00) | 4.00 (2.00 to 6.00) |"
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        "| **command to the end of the first step**",
        "| CPU time, user and system",
    ]
    assert made[0] == made[1] != made[2] == made[3]  # a new place for programs each round


def test_tracing_alone_tells_each_part(capsys):
    bench.main([*COMMAND, "--trace_only", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert list(told["seconds"])[-2:] == ["step traced and lowered", "total"]
    assert told["characters"] > 10_000


def test_a_run_that_ends_before_its_first_step_says_why():
    with pytest.raises(UserError, match=r"before its first step: .*data\.dir"):
        bench.main([*COMMAND, "--config.data.name=folder", "--rounds=1"])


def test_rounds_are_counted_from_one():
    with pytest.raises(UserError, match="--rounds=0: give at least 1"):
        bench.main([*COMMAND, "--rounds=0"])
