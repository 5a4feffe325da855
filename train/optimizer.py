"""AdamW as language models are trained with it, and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from train.options import StepOptions

# Parameters that are no matrices: rates, time steps, norms. A decay would pull them to zero, which means nothing there.
_WITHOUT_DECAY = ("A_log", "D", "dt_bias", "scale", "bias")


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter `name`, such as "model.layers.0.mamba.A_log"."""
    return name.rsplit(".", 1)[-1] not in _WITHOUT_DECAY


def make_optimizer(options: StepOptions) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam, decoupled weight decay: everything but the learning rate.

    The rate is a function of the step (`make_schedule`), and multiplied in by the step itself: nothing in the
    optimiser's state then says how long the run was once meant to be.
    """
    parts = []
    if options.max_grad_norm > 0:
        parts.append(optax.clip_by_global_norm(options.max_grad_norm))
    parts.append(optax.scale_by_adam(options.adam_beta1, options.adam_beta2, options.adam_epsilon))
    if options.weight_decay > 0:

        def mask(params: Mapping[str, jax.Array]) -> dict[str, bool]:
            return {name: decays(name) for name in params}

        parts.append(optax.add_decayed_weights(options.weight_decay, mask))
    return optax.chain(*parts)


def make_schedule(options: StepOptions) -> Callable[[jax.Array], jax.Array]:
    """The learning rate by the number of updates made before, () int32 -> () float32.

    "cosine": `warmup_steps` of linear warmup, then half a cosine from `learning_rate` down to `min_learning_rate_ratio`
    of it at `steps`. A run that goes on with more steps is put on the longer curve where it stands: its rate jumps up
    once. "wsd" (warmup, stable, decay; arXiv 2404.06395): constant after the warmup, and in the last `decay_steps`
    linear down to the same end. It is the schedule to go on with: from a checkpoint before the decay nothing jumps.
    """
    peak = options.learning_rate
    end = peak * options.min_learning_rate_ratio
    warmup, steps = options.resolved_warmup_steps, options.steps
    # The first update has the rate peak / warmup, not 0, and the one after the warmup the peak.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if options.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), options.min_learning_rate_ratio)
    else:
        decay = options.resolved_decay_steps
        rest = optax.linear_schedule(peak, end, max(decay, 1), transition_begin=max(steps - warmup - decay, 0))
    both = rest if warmup == 0 else optax.join_schedules([rising, rest], [warmup])
    return lambda step: jnp.asarray(both(step), jnp.float32)
