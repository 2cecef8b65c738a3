"""`python -m mae_jax.distributed.plan`: the old spelling of `python -m mae_jax.plan`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mae_jax.plan", run_name="__main__")
