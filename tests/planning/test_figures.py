import dataclasses
import json

import pytest
from plans import plan

from mae_jax.planning.chips import GIB
from mae_jax.planning.figures import Layout, advice, out_of_memory
from mae_jax.planning.table import compared, describe


def test_figures_of_a_run_by_hand():
    made = plan(price=1.5, price_source="as given")
    figures = made.as_json()
    assert figures["fits"] is True
    steps = {"hidden": 0.2, "scheduled": 0.25, "exposed": 0.25}
    assert figures["step_seconds"] == pytest.approx(steps)
    assert figures["mfu"] == pytest.approx(1e14 / 0.25 / (256 * 197e12))
    assert figures["hours"] == pytest.approx(2.5)
    assert figures["chip_hours"] == pytest.approx(640)
    assert figures["dollars"] == pytest.approx(960)
    assert figures["images_per_second_per_host"] == pytest.approx(4096 / 0.2 / 64)
    assert figures["cores_needed_per_host"] == pytest.approx(320 * 4e-3)
    assert figures["decodable_per_host"] == pytest.approx(112 / 4e-3)
    assert figures["collective_bytes"] == 1_000_000
    assert (figures["peak_bytes"], figures["available_bytes"]) == (10 * GIB, round(15.75 * GIB))
    assert json.loads(json.dumps(figures)).keys() == figures.keys()


def test_a_step_whose_exchange_takes_longest_cannot_hide_it():
    figures = plan(exchange=0.3, waiting_seconds=0.1).as_json()
    steps = {"hidden": 0.3, "scheduled": 0.3, "exposed": 0.5}
    assert figures["step_seconds"] == pytest.approx(steps)


def test_a_run_takes_as_long_as_its_steps_are_scheduled():
    made = plan(waiting_seconds=0.02)
    assert made.as_json()["step_seconds"]["scheduled"] == pytest.approx(0.22)
    assert made.mfu == pytest.approx(1e14 / 0.22 / (256 * 197e12))
    assert made.hours == made.hours_with_data == pytest.approx(2.2)
    assert "220 ms a step as the compiler schedules it (200 with all exchange" in describe(made)
    assert "220 (200 to 250)" in compared([made])


def test_hosts_that_are_too_slow_set_the_pace():
    slow = plan(decode_ms=1000.0)  # 64 images a step and host, on 112 cores
    assert slow.starves
    assert slow.hours_with_data == pytest.approx(36_000 * 64 / 112 / 3600)
    assert slow.hours == pytest.approx(2.5)
    assert "too few: the devices wait, 5.71 h" in describe(slow)
    assert not plan(decode_ms=300.0).starves
    assert plan("v5e-1").cores_per_host == 112 / 4


def test_a_person_reads_what_fits_and_what_it_takes():
    text = describe(plan(price=1.5, price_source="as given"))
    for line in (
        "v5e-256: 256 chips TPU v5 lite; hosts 64; slices of 16x16, 2 of 2 sides rings",
        "fits: 10.00 of 15.75 GiB a device at its peak, 5.75 GiB (37%) to spare",
        "250 ms a step as the compiler schedules it (200 with all exchange hidden behind compute, "
        "250 with none)",
        "36,000 steps: 2.5 h, 640 chip-hours",
        "$960 at $1.5 a chip-hour (as given): an estimate",
        "each host decodes 320 images/s: 1.28 of its 112 cores at 4 CPU-ms an image",
        "all 112 decode 28,000 images/s; hosts of 112 28,000, 180 45,000, 224 56,000",
    ):
        assert line in text
    rows = [line.split() for line in text.splitlines() if line.startswith("encoder MLP")]
    assert rows[0][2:4] == ["150.00", "75%"]


@pytest.mark.parametrize(
    ("error", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (17.25G) exceeds available HBM (15.75G).",
            17.25 + 4,  # the state stays beside them
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.30G of 15.75G hbm",
            21.3,
        ),
        ("RESOURCE_EXHAUSTED: ... (512.00M) for HLO temporaries (2.00T) exceeds ...", 2052),
    ],
)
def test_out_of_memory_is_an_answer(error, gib):
    made = out_of_memory(plan(parts={}), error)
    assert made.peak_bytes == pytest.approx(gib * GIB, rel=1e-6)
    assert not made.fits
    assert f"does not fit: needs {gib:.1f} of 15.75 GiB: try --config." in describe(made)
    figures = made.as_json()
    assert figures["fits"] is False
    assert figures["step_seconds"] == dict.fromkeys(("hidden", "scheduled", "exposed"))
    assert figures["mfu"] is figures["hours"] is figures["collective_bytes"] is None


def test_little_room_is_said():
    assert "memory     barely fits: 15.50 of 15.75 GiB" in describe(plan(peak=15.5))
    assert "barely" not in describe(plan(peak=14.9))


def test_another_failure_of_the_compiler_is_none():
    assert out_of_memory(plan(), "INTERNAL: Mosaic failed to compile") is None


def test_advice_splits_a_large_state_as_far_as_it_takes():
    large = plan(peak=27.5, state_bytes=20 * GIB)  # 7.5 of working memory, and 8.25 for the state
    assert large.advice[0].startswith("--config.mesh.data=-1 --config.mesh.fsdp=4 ")
    assert "20.0 GiB" in large.advice[0]
    assert any("remat=dots" in one for one in large.advice)
    assert any("accumulate=2 (8 in place of 16 images" in one for one in large.advice)


def test_advice_saves_working_memory_where_that_is_what_lacks():
    layout = Layout(4096, 1, "full", 256, 1)
    wide = plan(peak=30.0, state_bytes=1 * GIB, layout=layout)
    assert wide.advice[0].startswith("--config.optim.accumulate=2")
    assert not any("fsdp" in one or "remat" in one for one in wide.advice)
    alone = dataclasses.replace(layout, batch_size=256)
    assert advice(plan(peak=30.0, state_bytes=GIB, layout=alone)) == ("a chip with more memory",)


def test_plans_side_by_side():
    lines = compared([plan(price=1.0), plan("v6e-64", peak=40)]).splitlines()
    head, first, second = (line.split() for line in lines)
    assert head[:2] == ["pod", "images"]
    assert (first[0], first[1], first[-4]) == ("v5e-256", "16", "640")
    assert "does not fit" in lines[2]
    assert second[1] == "64"
