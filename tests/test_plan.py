import json
import subprocess
import sys

import jax
import pytest

from mae_jax import UserError, plan
from mae_jax.config import default_config
from mae_jax.distributed.mesh import make_mesh
from mae_jax.planning.chips import parse_pod
from mae_jax.tasks import create_task
from mae_jax.train.step import lower_step
from tests.planning.plans import plan as made

TINY = ["--config=quickstart"]
TINY += [
    f"--config.{field}"
    for field in (
        *("batch_size=16", "compute_dtype=bfloat16", "epochs=10", "steps=0"),
        *("model.width=32", "model.depth=1", "model.heads=2"),
        *("decoder.width=32", "decoder.depth=1", "decoder.heads=2"),
    )
]


@pytest.fixture
def no_compiler(monkeypatch):
    """Fails where a refusal would cost minutes."""

    def compile_(*args):
        raise AssertionError("compiled")

    monkeypatch.setattr(plan.Planner, "compile", compile_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology=v5e-100"], "near it: v5e-64"),
        (["--slices=0"], "'0' is no integer from 1"),
        (["--topology=v3-32", "--slices=2"], "slices of v3 cannot be joined"),
        (["--price=cheap"], "--price: 'cheap' is no number above 0"),
        (["--price=-1"], "'-1' is no number above 0"),
        (["--decode_ms=0"], "'0' is no number above 0"),
        (["--topology=tpu7x-8", "--price=spot"], "none is known for tpu7x"),
        (["--search", "--compare=v5e-4"], "give one of them"),
        (["--compare=v5e-4,v5e-8", "--slices=2"], "leave out --topology and --slices"),
        (["--compare=v5e-4,v9-4"], "'v9-4' names no TPU"),
        (["--topology=v5e-256"], "batch_size = 16 does not divide over 256"),
        (["--compare=v5e-4,v5e-256"], "batch_size = 16 does not divide over 256"),
        (["--config.mesh.fsdp=3"], "mesh.data = -1 by mesh.fsdp = 3"),
        (["--topology=2xv5e-4", "--config.mesh.fsdp=8"], "mesh.fsdp = 8 does not fit into a slice"),
        (["--config.batch_size=x"], "batch_size = 'x'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(no_compiler, options, message):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    with pytest.raises(UserError) as error:
        plan.main([*TINY, *options])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_step_compiles_for_an_absent_pod(tiny_config, capsys, monkeypatch):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    tiny_config.compute_dtype = "bfloat16"
    tiny_config.mesh.fsdp = 2
    tiny_config.epochs, tiny_config.steps = 10.0, 0
    monkeypatch.setattr("mae_jax.config.load_config", lambda recipe: tiny_config)
    compiled = []

    class Lowered:
        def __init__(self, *step):
            self._lowered = lower_step(*step)

        def compile(self, **options):
            compiled.append(self._lowered.compile(**options))
            return compiled[0]

    monkeypatch.setattr(plan, "lower_step", Lowered)
    arguments = ["--config=tiny", "--topology=v5e-4", "--examples=1600", "--price=2", "--json"]
    assert plan.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    memory = compiled[0].memory_analysis()
    assert figures["peak_bytes"] == memory.peak_memory_in_bytes > figures["state_bytes"] > 0
    mesh = make_mesh(2, 2, list(parse_pod("v5e:2x2").topology().devices))
    task = create_task(tiny_config, 1600, None, mesh)
    assert figures["fits"] is True
    assert (figures["devices"], figures["hosts"], figures["steps"]) == (4, 1, 1000)
    assert (figures["data"], figures["fsdp"]) == (2, 2)
    seconds = figures["step_seconds"]
    assert 0 < seconds["hidden"] <= seconds["exposed"]
    rounding = 1 + 1e-12  # sums in another order
    assert seconds["hidden"] <= seconds["scheduled"] * rounding
    assert seconds["scheduled"] <= seconds["exposed"] * rounding
    waiting = figures["waiting_seconds"]
    assert seconds["scheduled"] == pytest.approx(figures["compute_seconds"] + waiting)
    assert seconds["exposed"] == pytest.approx(
        figures["compute_seconds"] + figures["communication_seconds"]
    )
    assert figures["hours"] == pytest.approx(1000 * seconds["scheduled"] / 3600)
    assert figures["dollars"] == pytest.approx(2 * 4 * figures["hours"])
    kinds = {(one["kind"], one["over"]) for one in figures["collectives"]}
    assert ("all-gather", "ici") in kinds
    flops = 16 * task.train_flops_per_image
    assert figures["mfu"] == pytest.approx(flops / seconds["scheduled"] / (4 * 197e12))
    params = jax.tree.leaves(jax.eval_shape(task.init).params)
    gathered = sum(2 * x.size for x in params if x.ndim > 1)
    assert figures["collective_bytes"] > gathered / 2  # of what each gathers from the other half


@pytest.mark.slow
def test_a_step_that_does_not_fit_ends_with_three_and_advice():
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    command = [sys.executable, "-m", "mae_jax.plan", *TINY, "--topology=v5e:2x2"]
    command += ["--config.batch_size=4000000"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    figures = json.loads(done.stdout)
    assert figures["fits"] is False
    assert figures["peak_bytes"] > figures["available_bytes"]
    assert any("accumulate=2" in one for one in figures["advice"])
    assert "needs" in done.stderr


def test_repeated_crops_share_the_time_to_decode_and_jitter_takes_its_own():
    config = default_config()
    assert plan.decode_ms(config) == pytest.approx(3.6)
    config.data.resize, config.data.repeat = "fast", 4
    assert plan.decode_ms(config) == pytest.approx(0.7)
    config.augment.color_jitter = 0.4
    assert plan.decode_ms(config) == pytest.approx(3.7)


@pytest.mark.slow
def test_pods_side_by_side_compile_once_for_as_many_images_on_a_chip(capsys, monkeypatch):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    compiled, compile_ = [], plan.Planner.compile
    counted = lambda self, *what: compiled.append(what) or compile_(self, *what)  # noqa: E731
    monkeypatch.setattr(plan.Planner, "compile", counted)
    pods = "v5e-4,v5e-16,2xv5e-4"
    options = ["--images_per_chip=4", "--decode_ms=0.001", "--price", "--json"]
    assert plan.main([*TINY, f"--compare={pods}", *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    plans = {one["topology"]: one for one in figures["plans"]}
    assert set(plans) == set(pods.split(","))
    assert len(compiled) == 2
    assert plans["v5e-16"]["modelled_from"] == "v5e-4"
    assert plans["v5e-16"]["compute_seconds"] == plans["v5e-4"]["compute_seconds"]
    assert plans["v5e-16"]["communication_seconds"] > plans["v5e-4"]["communication_seconds"]
    assert any(one["over"] == "dcn" for one in plans["2xv5e-4"]["collectives"])
    assert figures["topology"] == min(plans.values(), key=lambda one: one["dollars"])["topology"]
    assert figures["topology"] in figures["reason"]


@pytest.mark.parametrize(("peak", "status"), [(10.0, 0), (99.0, 3)])
def test_a_search_ends_with_its_best_plan(monkeypatch, capsys, peak, status):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")

    def compile_(self, layout, pod):
        return made(pod.name, layout, peak=peak, compute=0.2 + 0.1 / layout.fsdp)

    monkeypatch.setattr(plan.Planner, "compile", compile_)
    options = ["--config.batch_size=4096", "--topology=v5e-256", "--search"]
    assert plan.main([*TINY, *options, "--json"]) == status
    figures = json.loads(capsys.readouterr().out)
    assert figures["fits"] is (status == 0)
    assert figures == figures["plans"][0] | {k: figures[k] for k in ("plans", "reason")}
    assert figures["topology"] == "v5e-256"
    assert figures["fsdp"] == (256 if status == 0 else 1)
    assert ("shortest run" if status == 0 else "none") in figures["reason"]
    assert plan.main([*TINY, *options]) == status
    assert "v5e-256" in capsys.readouterr().out
