"""`python -m mae_jax.bench`: see the package."""

from mae_jax.cli import start

if __name__ == "__main__":
    raise SystemExit(start("bench"))
