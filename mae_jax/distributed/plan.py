"""`python -m mae_jax.distributed.plan`: the old spelling of `python -m mae_jax.plan`."""

from mae_jax.cli import start

if __name__ == "__main__":
    raise SystemExit(start("plan"))
