"""`python -m mae_jax COMMAND ...`."""

from mae_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
