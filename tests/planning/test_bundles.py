import jax
import jax.numpy as jnp
import pytest

from mae_jax import UserError
from mae_jax.models.attention import attention, stacked_attention
from mae_jax.planning import bundles, cost, program
from mae_jax.planning.chips import CHIPS, parse_pod
from mae_jax.planning.program import Instruction, Kernel, Program


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="needs the TPU compiler")


@pytest.mark.parametrize(
    ("given", "name", "shape", "weights"),
    [
        # What the weights of all heads fill: of one [200, 256], of two that are stacked [56, 128].
        ((8, 197, 8, 32), "attention_{}", (64, 32, 197), 64 * 200 * 256),
        ((64, 50, 512), "stacked_attention_{}_64", (64, 50, 512), 256 * 56 * 128),
    ],
)
def test_kernels_of_a_compiled_program_are_counted(libtpu, given, name, shape, weights):
    pod = parse_pod("v5e-1")
    here = jax.sharding.SingleDeviceSharding(pod.topology().devices[0])
    x = jax.ShapeDtypeStruct(given, jnp.bfloat16, sharding=here)

    def loss(*x):
        out = stacked_attention(*x, 64) if len(given) == 3 else attention(*x, kind="kernel")
        return (out**2).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=here).lower(x, x, x)
    read = program.compile_and_read(lowered)[1]
    found = [i.kernel for i in read.instructions if i.kernel]
    assert found == [Kernel(name.format(way), shape, 16) for way in ("forward", "backward")]

    whole = bundles.counted(read, pod)
    forward, backward = (i.cycles for i in whole.instructions if i.kernel)
    # A register of 1,024 weights goes through the exponential in a cycle or more, and through
    # some ten other operations of which four are done at once.
    assert weights / 1024 < forward < backward < 25 * weights / 1024
    parts = cost.estimate(whole, pod.chip).values()
    assert sum(part.vector_seconds for part in parts) > (forward + backward) / pod.chip.clock


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [
        ("attention_forward", (128, 32, 197), (1024, 32, 197)),
        ("stacked_attention_forward_64", (64, 50, 1024), (512, 50, 1024)),
    ],
)
def test_eight_times_the_heads_take_eight_times_the_cycles(libtpu, name, few, many):
    few, many = (bundles.cycles(Kernel(name, shape, 16), CHIPS["v6e"]) for shape in (few, many))
    assert many / few == pytest.approx(8, rel=0.04)  # the first piece is waited for once


def test_chips_for_which_nothing_is_counted_are_refused(libtpu):
    kernel = Kernel("attention_forward", (64, 32, 197), 16)
    with pytest.raises(UserError, match=r"of attention_forward for v3: .* model\.attention=plain"):
        bundles.cycles(kernel, CHIPS["v3"])


def test_cycles_that_were_counted_are_the_least_that_an_instruction_takes():
    def seconds(**more):
        work = Instruction("k", "custom-call", "decoder attention", 2, **more)
        (part,) = cost.estimate(Program((work,)), CHIPS["v5e"]).values()
        return part.seconds

    assert seconds(cycles=1_500_000) == pytest.approx(2e-3)
    assert seconds(cycles=1_500_000, hbm_bytes=8) == pytest.approx(2e-3)
    assert seconds(cycles=1_500_000, hbm_bytes=819_000_000 * 3) == pytest.approx(6e-3, rel=1e-3)
