"""What one process does with a directory of compiled programs. `test_executables` runs this twice, in processes of
their own with two (virtual) devices, and reads the line of JSON that it prints."""

import json
import logging

import jax
import numpy as np
from flax import nnx

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, executables
from zamba2_jax.generation import programs
from zamba2_jax.sharding import make_mesh, param_shardings

CONFIG = Zamba2Config(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    layers_block_type=["hybrid"],
    n_mamba_heads=4,
    mamba_d_state=6,
    num_attention_heads=4,
    adapter_rank=3,
)
PROMPT = np.random.default_rng(0).integers(3, 64, (2, 9))
CALL = {"max_new_tokens": 6, "eos_token_id": None}


def make_model():
    return Zamba2ForCausalLM(CONFIG, rngs=nnx.Rngs(0))


class Streamer:
    def put(self, value):
        pass

    def end(self):
        pass


def main():
    graph, state = nnx.split(make_model())
    mesh = make_mesh("tensor=2")
    places = {
        "here": state,
        "elsewhere": jax.device_put(state, jax.devices()[1]),
        "on both": jax.device_put(state, param_shardings(state, mesh)),
    }
    models = {name: nnx.merge(graph, state) for name, state in places.items()}

    loaded, traced, consumed = [], [], []
    log = logging.getLogger(executables.__name__)
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: loaded.append(record.getMessage()))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, fun_name=None, **_: traced.append(fun_name) if "trace" in event else None
    )
    found = {}
    for name, model in models.items():
        output = model.generate(PROMPT, **CALL, return_dict_in_generate=True)
        devices = output.past_key_values.slot_mask.sharding.device_set
        found[name] = output.sequences.tolist(), sorted(device.id for device in devices)
    found["streamed"] = models["here"].generate(PROMPT, **CALL, streamer=Streamer(), stream_block=1).tolist()
    found["loaded"] = len(loaded)
    found["traced"] = sorted(filter(None, traced))

    # Whether the loop still consumes its cache.
    decode = programs.decode
    programs.decode = lambda *arguments, **named: (consumed.append(arguments[2]), decode(*arguments, **named))[1]
    models["here"].generate(PROMPT, **CALL)
    found["consumed"] = [leaf.is_deleted() for leaf in jax.tree.leaves(consumed)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
