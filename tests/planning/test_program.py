# ruff: noqa: E501  (the lines of a compiled program are long)
import pytest

from mae_jax.planning import program
from mae_jax.planning.program import Collective, Product

# As libtpu writes it, shortened: two copies under way, a loop of 24, a product in a fusion, an
# update in place, a sum over devices in two halves, a chain of fusions beside one gather.
TEXT = """HloModule jit_step, is_scheduled=true

%fused (p0: bf16[64,1024], p1: bf16[1024,4096]) -> bf16[64,4096] {
  %p0 = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(1)
  %dot = bf16[64,4096]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(MAE)/encoder/blocks/Block/mlp/dot_general"}
  ROOT %gelu = bf16[64,4096]{1,0:T(8,128)(2,1)} tanh(%dot), metadata={op_name="jit(step)/optimizer/tanh"}
}

%part (q0: f32[24,8,128], q1: s32[]) -> f32[1,8,128] {
  %q0 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %q1 = s32[]{:T(128)} parameter(1)
  ROOT %row = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%q0, %q1), dynamic_slice_sizes={1,8,128}
}

%write (r0: f32[24,8,128], r1: f32[1,8,128], r2: s32[]) -> f32[24,8,128] {
  %r0 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %r1 = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %r2 = s32[]{:T(128)} parameter(2)
  ROOT %put = f32[24,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%r0, %r1, %r2)
}

%body (p: (s32[], f32[24,8,128])) -> (s32[], f32[24,8,128]) {
  %p = (s32[]{:T(128)S(6)}, f32[24,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %all = f32[24,8,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = f32[1,8,128]{2,1,0:T(8,128)S(1)} fusion(%all, %i), kind=kLoop, calls=%part, backend_config={"window_config":{"estimated_cycles":"10"}}
  %new = f32[24,8,128]{2,1,0:T(8,128)} fusion(%all, %one, %i), kind=kLoop, calls=%write, backend_config={"window_config":{"estimated_cycles":"5"}}
  %g = f32[4,8,128]{2,1,0:T(8,128)} all-gather(%one), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %t = (s32[]{:T(128)S(6)}, f32[24,8,128]{2,1,0:T(8,128)}) tuple(%i, %new)
}

%condition (p.1: (s32[], f32[24,8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)S(6)}, f32[24,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%p.1), index=0
  %limit = s32[]{:T(128)} constant(24)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%begin (s0: bf16[128,512]) -> (bf16[128,512], bf16[512,512], u32[]) {
  %s0 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%s0), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %start = (bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[512,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%beside (u0: bf16[128,512], u1: bf16[512,512], u2: f32[8,128]) -> (f32[8,128], bf16[128,512], bf16[512,512]) {
  %u0 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %u1 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %u2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %ag.2 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%u0), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="7"}
  %twice = f32[8,128]{1,0:T(8,128)} add(%u2, %u2)
  ROOT %out = (f32[8,128]{1,0:T(8,128)}, bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[512,512]{1,0:T(8,128)(2,1)}) tuple(%twice, %u0, %ag.2)
}

ENTRY %main (a: bf16[64,1024], b: bf16[1024,4096], c: f32[24,8,128], d: bf16[128,512], e: f32[8,128], z: f32[50,64]) -> f32[8,128] {
  %a = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[1024,4096]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[24,8,128]{2,1,0:T(8,128)} parameter(2)
  %d = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(3)
  %e = f32[8,128]{1,0:T(8,128)} parameter(4)
  %z = f32[50,64]{1,0:T(8,128)} parameter(5)
  %fetch = (bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %piece = ((bf16[64,1024]{1,0:T(8,128)(2,1)}), bf16[16,1024]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:16], [0:1024]}
  %there = bf16[1024,4096]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %mlp = bf16[64,4096]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %there), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)S(6)}, f32[24,8,128]{2,1,0:T(8,128)}) tuple(%zero, %c)
  %loop = (s32[]{:T(128)S(6)}, f32[24,8,128]{2,1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  %ags = (bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[512,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%d), kind=kCustom, calls=%begin
  %ags.0 = bf16[128,512]{1,0:T(8,128)(2,1)} get-tuple-element(%ags), index=0
  %ags.1 = bf16[512,512]{1,0:T(8,128)(2,1)} get-tuple-element(%ags), index=1
  %agm = (f32[8,128]{1,0:T(8,128)}, bf16[128,512]{1,0:T(8,128)(2,1)}, bf16[512,512]{1,0:T(8,128)(2,1)}) fusion(%ags.0, %ags.1, %e), kind=kCustom, calls=%beside
  %f = f32[8,128]{1,0:T(8,128)} get-tuple-element(%agm), index=0
  %away = bf16[64,4096]{1,0:T(8,128)(2,1)} copy(%mlp)
  %sum = f32[8,128]{1,0:T(8,128)} all-reduce-start(%f), replica_groups={}, to_apply=%add
  %turn = f32[50,64]{0,1:T(8,128)} copy(%z)
  ROOT %summed = f32[8,128]{1,0:T(8,128)} all-reduce-done(%sum)
}
"""


@pytest.fixture(scope="module")
def lines():
    return {i.name: i for i in program.read(TEXT).instructions}


def test_a_loop_counts_as_often_as_it_runs(lines):
    assert lines["one"].times == lines["g"].times == 24
    assert program.read(TEXT).estimated_cycles == 1000 + 24 * 15


def test_products_are_found_in_fusions(lines):
    assert lines["mlp"].products == (Product(1, 64, 1024, 4096),)
    assert program.read(TEXT).flops == 2 * 64 * 1024 * 4096
    assert lines["mlp"].registers == {"tanh": 64 * 4096 / 1024}


def test_a_fusion_belongs_to_the_part_of_its_product_and_a_copy_to_its_users(lines):
    assert lines["mlp"].part == "encoder MLP"
    assert lines["fetch"].part == lines["there"].part == "encoder MLP"
    assert lines["away"].part == "encoder MLP"
    assert lines["g"].part == program.COLLECTIVES
    assert lines["turn"].part == program.REST


def test_traffic_is_what_lies_in_hbm_padding_included(lines):
    assert lines["fetch"].hbm_bytes == 2 * 1024 * 4096  # read there, written on the chip
    assert lines["piece"].hbm_bytes == 2 * 16 * 1024
    assert lines["mlp"].hbm_bytes == 2 * 64 * 1024  # the other factor and the result do not
    assert lines["mlp"].vmem_bytes == 2 * (64 * 1024 + 1024 * 4096 + 64 * 4096)
    assert lines["turn"].hbm_bytes == 4 * (56 * 128 + 64 * 128)  # [50, 64] in tiles of 8 x 128
    assert lines["turn"].registers == {"copy-32": 64 * 128 / 1024}
    assert lines["fetch"].starts
    assert lines["there"].waits_for == "fetch"
    assert lines["there"].hbm_bytes == 0


def test_slices_and_updates_touch_their_part_only(lines):
    row = 4 * 8 * 128
    assert lines["one"].hbm_bytes == row  # read; written on the chip
    assert lines["new"].hbm_bytes == row  # written; read on the chip


def test_what_goes_on_beside_several_fusions_is_one_exchange(lines):
    assert lines["agm"].collective is None
    # Neither buffer that the exchange goes on in is traffic of this fusion.
    assert lines["agm"].hbm_bytes == 2 * 4 * 8 * 128
    assert program.read(TEXT).collectives() == {
        Collective("all-gather", 4 * 4 * 8 * 128, "ici", ((0, 1, 2, 3), (4, 5, 6, 7))): 24,
        Collective("all-gather", 2 * 512 * 512, "ici", ((0, 2, 4, 6), (1, 3, 5, 7))): 1,
        Collective("all-reduce", 4 * 8 * 128, "ici", ()): 1,
    }


def test_what_runs_while_an_exchange_is_under_way_is_beside_it(lines):
    assert lines["agm"].beside == ("ags",)
    assert lines["turn"].beside == ("sum",)
    for name in ("ags", "mlp", "away", "sum", "summed", "one", "g"):
        assert lines[name].beside == ()


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "expected"),
    [
        (
            *("bf16[64,1024]", "bf16[1024,512]", "f32[64,512]"),
            "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            Product(1, 64, 1024, 512),
        ),
        (
            *("bf16[8,50,16,64]", "bf16[8,70,16,64]", "f32[8,16,50,70]"),
            "lhs_batch_dims={0,2}, lhs_contracting_dims={3}, rhs_batch_dims={0,2}, "
            "rhs_contracting_dims={3}, operand_precision={highest,highest}",
            Product(8 * 16, 50, 64, 70, passes=6),
        ),
        (  # the same as libtpu writes it
            *("bf16[32,50,16,64]", "bf16[32,50,16,64]", "f32[32,16,50,50]"),
            "window={size=32x16 stride=31x15 lhs_dilate=32x16}, dim_labels=0b1f_0o1i->01bf",
            Product(32 * 16, 50, 64, 50),
        ),
        (  # heads of the result are columns
            *("bf16[32,50,1024,1]", "bf16[1024,1,16,64]", "bf16[32,50,16,64]"),
            "window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            Product(1, 32 * 50, 1024, 16 * 64),
        ),
        (  # heads are summed over
            *("bf16[32,50,16,64]", "bf16[64,16,1024,1]", "f32[32,50,1024,1]"),
            "window={size=1x16}, dim_labels=0b1f_i1o0->0bf1",
            Product(1, 32 * 50, 16 * 64, 1024),
        ),
        (  # the gradient of a weight: sum over examples
            *("bf16[32,1024,50]", "bf16[32,50,4096]", "f32[1024,4096,1]"),
            "window={size=32}, dim_labels=0bf_0io->bf0",
            Product(1, 1024, 32 * 50, 4096),
        ),
    ],
)
def test_products_as_compilers_write_them(left, right, out, attributes, expected):
    opcode = "convolution" if "dim_labels" in attributes else "dot"
    text = f"""HloModule m

ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %y = {out} {opcode}(%a, %b), {attributes}
}}
"""
    (instruction,) = program.read(text).instructions
    assert instruction.products == (expected,)


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(step)/shard_map/jvp(MAE)/encoder/blocks/Block/attn/attention/sub", None),
        ("jit(step)/transpose(jvp(MAE))/decoder/blocks/Block/norm2/div", "decoder norms"),
        ("jit(step)/jvp(MAE)/decoder/blocks/Block/add", "decoder norms"),
        ("jit(step)/jvp(MAE)/decoder/blocks/Block/attn/dot_general", "decoder projections"),
        ("jit(step)/jvp(MAE)/encoder/masks/gather", "masks"),
        ("jit(step)/jvp(MAE)/decoder/dot_general", "decoder embedding"),
        ("jit(step)/jvp(MAE)/target/sqrt", "target"),
        ("jit(step)/jvp(images)/rev", "images"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/jvp(Classifier)/head/dot_general", "head"),
        ("jit(step)/add", "rest"),
    ],
)
def test_names_say_the_part_of_the_model(op_name, part):
    assert program.part_of(op_name) == (part or "encoder attention")


@pytest.mark.parametrize(
    "branches",
    [
        "conditional(%p, %a, %a), true_computation=%small, false_computation=%large",
        "conditional(%p, %a, %a), branch_computations={%small, %large}",
        "call(%a), to_apply=%large",
    ],
)
def test_of_branches_the_longest_counts(branches):
    body = """ (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0:T(8,128)} parameter(0)
"""
    dot = "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    read = program.read(f"""HloModule m

%small{body}  ROOT %y = f32[64,64]{{1,0:T(8,128)}} add(%x, %x)
}}

%large{body}  ROOT %z = f32[64,64]{{1,0:T(8,128)}} {dot}
}}

ENTRY %main (p: pred[], a: f32[64,64]) -> f32[64,64] {{
  %p = pred[] parameter(0)
  %a = f32[64,64]{{1,0:T(8,128)}} parameter(1)
  ROOT %c = f32[64,64]{{1,0:T(8,128)}} {branches}
}}
""")
    assert [i.name for i in read.instructions] == ["z"]
