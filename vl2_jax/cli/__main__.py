"""`python -m vl2_jax.cli` is `vl2`."""

from vl2_jax.cli import main

main()
