import pytest

PROGRAM = """HloModule jit_step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8] fusion(%p), backend_config={"estimated_cycles":"10"}
  %g = f32[64] all-gather(%x), dimensions={0}, backend_config={"estimated_cycles":"5"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(24)
  %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %f = f32[8] fusion(%a), backend_config={"estimated_cycles":"1000"}
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %r = f32[8] all-reduce-start(%f), to_apply=%add
  %d = f32[8] all-reduce-done(%r)
}
"""


def test_cycles_and_collectives_of_a_loop_count_as_often_as_it_runs(monkeypatch):
    from mae_jax import plan

    cycles, collectives = plan.read_program(PROGRAM)
    assert cycles == 1000 + 24 * 15
    assert collectives == {"all-gather": 24, "all-reduce": 1}


def test_a_step_compiles_for_an_absent_pod(tiny_config, monkeypatch):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    from mae_jax import plan

    tiny_config.compute_dtype = "bfloat16"
    tiny_config.mesh.fsdp = 2
    report = plan.plan(tiny_config, "v5e:2x2")
    assert report["devices"] == "4 TPU v5 lite"
    assert report["mesh"] == "data 2 x fsdp 2"
    assert report["images a device"] == 4
    assert float(report["estimated cycles a step"].split()[0]) > 0
