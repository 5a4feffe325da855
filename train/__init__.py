"""Training programs over zamba2_jax: `python -m train`."""
