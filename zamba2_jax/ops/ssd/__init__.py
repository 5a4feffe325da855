"""The state-space recurrence of Mamba2 (state-space duality, SSD).

Read `reference.py` first: it is the definition. `associative.py` and `chunked.py` compute the same thing faster,
`api.py` checks arguments and chooses.
"""

from zamba2_jax.ops.ssd.api import advance_state, ssd, ssd_step
from zamba2_jax.ops.ssd.steps import RawSteps, time_step

__all__ = ["RawSteps", "advance_state", "ssd", "ssd_step", "time_step"]
