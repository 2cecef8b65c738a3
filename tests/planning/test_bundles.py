import sys

import pytest

from mae_jax.planning import bundles, cost, program
from mae_jax.planning.chips import CHIPS

COMPILE = """
import sys
import jax, jax.numpy as jnp
from mae_jax.planning.chips import parse_pod
device = parse_pod("v5e-1").topology().devices[0]
sharding = jax.sharding.SingleDeviceSharding(device)
square = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
compiled = jax.jit(jnp.exp, in_shardings=sharding).lower(square).compile()
open(sys.argv[1], "w").write(compiled.as_text())
"""


def test_bundles_are_counted_by_the_compiler_and_used(tmp_path, monkeypatch):
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "program"
    found = bundles.collect([sys.executable, "-c", COMPILE, str(file)], 120)
    read = program.read(file.read_text())
    assert set(found) & {i.name for i in read.instructions}
    (part,) = cost.estimate(read, CHIPS["v5e"], found).values()
    # Vector work is a fraction of the traffic here: 2,048 x 4,096 bytes in and out again.
    assert 0 < part.bundle_seconds < part.hbm_seconds
    assert part.seconds == pytest.approx(2 * 2048**2 * 4 / 819e9, rel=0.2)


WRITES = """
import os, pathlib, sys, time
folder = pathlib.Path(os.environ["LIBTPU_INIT_ARGS"].split("_to=")[1])
text = 'hlo_op_estimate {\\n  hlo_op_name: "fusion.7"\\n  estimated_cycles: 1234\\n}\\n'
(folder / "fusion.7_TPU_static_llo_profile.textproto").write_text(text)
(folder / "half_TPU_static_llo_profile.textproto").write_text("hlo_op_est")
"""


@pytest.mark.parametrize("end", ["os.abort()", "time.sleep(60)"])
def test_what_was_written_before_the_compiler_broke_off_counts(end):
    assert bundles.collect([sys.executable, "-c", WRITES + end], 3) == {"fusion.7": 1234}
