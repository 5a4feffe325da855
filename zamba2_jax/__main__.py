"""`python -m zamba2_jax`."""

import sys

from zamba2_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
