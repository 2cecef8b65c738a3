import jax
import jax.numpy as jnp
import pytest

from mae_jax import UserError
from mae_jax.models.attention import attention
from mae_jax.planning import bundles, cost, program
from mae_jax.planning.chips import CHIPS, parse_pod
from mae_jax.planning.program import Instruction, Kernel, Program

HEADS, TOKENS, WIDTH = 64, 197, 32
ROWS_AND_LANES = 200 * 256  # what the weights of a head fill


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="needs the TPU compiler")


def test_kernels_of_a_compiled_program_are_counted(libtpu):
    pod = parse_pod("v5e-1")
    here = jax.sharding.SingleDeviceSharding(pod.topology().devices[0])
    x = jax.ShapeDtypeStruct((8, TOKENS, HEADS // 8, WIDTH), jnp.bfloat16, sharding=here)
    gradients = jax.grad(lambda *x: (attention(*x, kind="kernel") ** 2).sum(), argnums=(0, 1, 2))
    read = program.compile_and_read(jax.jit(gradients, out_shardings=here).lower(x, x, x))[1]
    shape = (HEADS, WIDTH, TOKENS)
    found = [i.kernel for i in read.instructions if i.kernel]
    assert found == [Kernel(f"attention_{way}", shape, 16) for way in ("forward", "backward")]

    whole = bundles.counted(read, pod)
    forward, backward = (i.cycles for i in whole.instructions if i.kernel)
    # A register of 1,024 weights goes through the exponential in a cycle or more, and through
    # some ten other operations of which four are done at once.
    registers = HEADS * ROWS_AND_LANES / 1024
    assert registers < forward < backward < 15 * registers
    parts = cost.estimate(whole, pod.chip).values()
    assert sum(part.vector_seconds for part in parts) > (forward + backward) / pod.chip.clock


def test_twice_the_heads_take_twice_the_cycles(libtpu):
    few, many = (
        bundles.cycles(Kernel("attention_forward", (heads, WIDTH, TOKENS), 16), CHIPS["v6e"])
        for heads in (128, 1024)
    )
    assert many / few == pytest.approx(8, rel=0.02)


def test_chips_for_which_nothing_is_counted_are_refused(libtpu):
    kernel = Kernel("attention_forward", (HEADS, WIDTH, TOKENS), 16)
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
