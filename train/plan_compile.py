"""Compiles the training step for a TPU slice and prints what came of it as a line of JSON; `train.plan` starts it.

The options of `train.plan` come as JSON on stdin. A process of its own, because the compiler may take all memory there
is, and because JAX must be told of the platform before it is imported.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax

from train.plan import PlanOptions, batch_shapes, bytes_by_kind, make_step
from zamba2_jax.compiled_program import collectives, kernels, program_bytes, refusal
from zamba2_jax.sharding import make_mesh
from zamba2_jax.tpu_slices import CompilerBusyError, devices, parse_slice, usable_bytes


def main() -> None:
    options = PlanOptions(**{name: _tuples(value) for name, value in json.load(sys.stdin).items()})
    try:
        outcome = compile_step(options)
    except CompilerBusyError as error:
        outcome = {"status": "busy", "error": str(error)}
    except (ValueError, ImportError) as error:
        outcome = {"status": "invalid", "error": str(error)}
    print(json.dumps(outcome))


def compile_step(options: PlanOptions) -> dict[str, Any]:
    """Compiles it.

    Returns:
        "status": "ok", "does not fit" or "error"; "seconds" of tracing and compiling; "usable_bytes" of a chip, or
        None; "bytes" per chip that the program needs; "kinds" of them; "kernels", "collectives" (a list of dicts),
        "unread_loops"; "error": the compiler's words.
    """
    chips = devices(parse_slice(options.topology).topology)
    mesh = make_mesh(options.mesh, chips)
    outcome: dict[str, Any] = {"usable_bytes": usable_bytes(chips[0]), "error": None}
    program = make_step(options, mesh)
    batch = program.abstract_batch(batch_shapes(options))
    outcome["kinds"] = bytes_by_kind(program, batch)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = program.train_step.lower(program.state, program.frozen, batch).compile()
    except Exception as error:  # whatever the compiler says is the result
        outcome["seconds"] = time.perf_counter() - start
        refused = refusal(str(error))
        if refused is None:
            return outcome | {
                "status": "error",
                "error": f"{type(error).__name__}: {' '.join(str(error).split())[:800]}",
            }
        return outcome | {
            "status": "does not fit",
            "bytes": refused.needed_bytes,
            "usable_bytes": refused.usable_bytes,
            "error": refused.text,
        }
    outcome["seconds"] = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    found = collectives(text)
    return outcome | {
        "status": "ok",
        "bytes": program_bytes(memory),
        "code_bytes": memory.generated_code_size_in_bytes,
        "kernels": kernels(text),
        "collectives": [vars(kind) for kind in found.kinds],
        "unread_loops": found.unread_loops,
    }


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
