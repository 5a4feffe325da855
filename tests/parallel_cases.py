"""What eight devices do is what one does, in programs that hold no more than their part. `test_parallel` runs these in
a process of their own, which has eight (virtual) devices."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zamba2_jax import LoraConfig, Zamba2Config, Zamba2ForCausalLM, add_lora, quantize
from zamba2_jax.ops.attention import attention
from zamba2_jax.ops.conv import causal_conv
from zamba2_jax.sharding import abstract_params, batch_sharding, check_mesh, make_mesh, param_shardings

# Two shared blocks, both kinds of adapters, rotary positions, groups, biases; layers of both kinds.
CONFIG = Zamba2Config(
    vocab_size=80,
    hidden_size=32,
    num_hidden_layers=4,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    n_mamba_heads=8,
    mamba_ngroups=2,
    mamba_d_state=6,
    chunk_size=8,
    intermediate_size=96,
    num_attention_heads=8,
    num_mem_blocks=2,
    adapter_rank=3,
    use_shared_attention_adapter=True,
    use_mem_rope=True,
    add_bias_linear=True,
    attention_dropout=0.2,
)
ROWS, LENGTH = 24, 56

MESHES = [
    "data=8",
    "fsdp=8",
    "tensor=2,fsdp=4",
    "tensor=4,data=2",
    "sequence=4,fsdp=2",
    "sequence=8",
    "data=2,fsdp=2,tensor=2",
    "data=2,fsdp=2,sequence=2",
    "data=2,tensor=2,sequence=2",
    "fsdp=2,tensor=2,sequence=2",
]
MIXED = MESHES[-1]
# Relative: of the loss, and of each parameter's gradient |g - g'| / |g'| in the Euclidean norm over that parameter.
TOLERANCE = 1e-5


def make_model(policy="none", scan=False):
    model = Zamba2ForCausalLM(CONFIG, rngs=nnx.Rngs(0))
    model.gradient_checkpointing_enable(policy)
    if scan:
        model.scan_layers_enable()
    return nnx.split(model)


def batches():
    """A packed and a padded one, each with all arguments, so that both run the same compiled program."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    segments = np.sort(rng.integers(1, 5, (ROWS, LENGTH)), axis=1).astype(np.int32)
    # One document ends where a device's part does, one is a token, one goes over several devices.
    segments[0] = np.where(np.arange(LENGTH) < LENGTH // 2, 1, 2)
    segments[1] = np.where(np.arange(LENGTH) == LENGTH // 8, 2, 1)
    segments[2] = 1
    packed = {"input_ids": ids, "labels": ids, "segment_ids": segments, "attention_mask": np.ones_like(ids)}

    mask = np.ones_like(ids)
    for row, padding in enumerate(rng.integers(1, LENGTH - 2, ROWS)):  # longer than a device's part, and shorter
        mask[row, slice(padding) if row % 2 else slice(-padding, None)] = 0
    mask[0, 3] = 0  # hidden between real tokens
    padded = {
        "input_ids": ids * mask,
        "labels": np.where(mask, ids, -100),
        "segment_ids": np.ones_like(ids),
        "attention_mask": mask,
    }
    return {"packed": packed, "padded": padded}


def step_of(graph, dropout=False):
    def loss(state, batch):
        key = jax.random.key(7) if dropout else None
        return nnx.merge(graph, state)(**batch, dropout_key=key).loss

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def on_one_device(dropout=False):
    graph, state = make_model()
    return {name: step_of(graph, dropout)(state, batch) for name, batch in batches().items()}


def on_mesh(spec, graph, state, batch, dropout=False):
    mesh = make_mesh(spec)
    check_mesh(CONFIG, mesh, batch_size=ROWS, seq_len=LENGTH)
    state = jax.device_put(state, param_shardings(state, mesh))
    with jax.set_mesh(mesh):
        step = step_of(graph, dropout)
        return {name: step(state, jax.device_put(one, batch_sharding(mesh))) for name, one in batch.items()}


def errors(gradient, wanted):
    """|g - g'| / |g'| of each parameter, by path."""
    found = {}
    for (path, ours), (_, theirs) in zip(nnx.to_flat_state(gradient), nnx.to_flat_state(wanted), strict=True):
        ours, theirs = np.asarray(ours[...], np.float64), np.asarray(theirs[...], np.float64)
        assert np.linalg.norm(theirs) > 0, path
        found[path] = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    return found


def assert_same(actual, wanted):
    for name, (loss, gradient) in actual.items():
        of_loss = abs(float(loss) / float(wanted[name][0]) - 1)
        of_gradient = errors(gradient, wanted[name][1])
        worst = max(of_gradient, key=of_gradient.get)
        print(f"\n{name}: loss {of_loss:.1e}, gradients at most {of_gradient[worst]:.1e} relative", end=" ")
        assert of_loss <= TOLERANCE, name
        assert all(error <= TOLERANCE for error in of_gradient.values()), (name, worst)


class TestLossAndGradients:
    @pytest.mark.parametrize("spec", MESHES)
    def test_equal_one_device(self, spec):
        assert_same(on_mesh(spec, *make_model(), batches()), on_one_device())

    @pytest.mark.parametrize(("policy", "scan"), [("layer", False), ("projections", True)])
    def test_recomputed_and_scanned(self, policy, scan):
        assert_same(on_mesh(MIXED, *make_model(policy, scan), batches()), on_one_device())

    def test_dropout(self):
        packed = {"packed": batches()["packed"]}
        dropped = on_mesh(MIXED, *make_model(), packed, dropout=True)
        assert_same(dropped, on_one_device(dropout=True))
        # Some was dropped: the loss of this small model hardly shows it, the gradients of attention do.
        assert max(errors(dropped["packed"][1], on_one_device()["packed"][1]).values()) > 0.1

    def test_without_masks(self):
        batch = {"plain": {name: batches()["packed"][name] for name in ("input_ids", "labels")}}
        graph, state = make_model()
        wanted = {name: step_of(graph)(state, one) for name, one in batch.items()}
        assert_same(on_mesh("sequence=4,tensor=2", graph, state, batch), wanted)


def compile_step(spec, config, rows, length, policy="none", devices=8):
    """The compiled loss and gradient, and the bytes of parameters on a device; no array is made."""
    key = jax.random.key(0)
    rngs = types.SimpleNamespace(params=lambda: key)
    model = nnx.eval_shape(lambda: Zamba2ForCausalLM(config, rngs=rngs))
    model.gradient_checkpointing_enable(policy)
    graph, state = nnx.split(model)
    mesh = make_mesh(spec, jax.devices()[:devices])
    check_mesh(config, mesh, batch_size=rows, seq_len=length)

    def loss(state, ids, segments):
        return nnx.merge(graph, state)(ids, labels=ids, segment_ids=segments).loss

    with jax.set_mesh(mesh):
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, param_shardings(state, mesh)))
        compiled = step.lower(abstract_params(state, mesh), ids, ids).compile()
    parameters = jax.tree.leaves(abstract_params(state, mesh))
    stored = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in parameters)
    return compiled, stored


def float_shapes(text):
    """Of every array of floating point in a compiled program, whatever makes it."""
    found = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)
    return {tuple(map(int, dims.split(","))) for dims in found}


class TestPrograms:
    @pytest.mark.parametrize("spec", ["fsdp=8", "tensor=2,fsdp=4", "sequence=8"])
    def test_hold_no_full_size_copy(self, spec):
        compiled, stored = compile_step(spec, CONFIG, ROWS, LENGTH)
        sizes = make_mesh(spec).shape
        tokens = ROWS * LENGTH
        parts = sizes["data"] * sizes["fsdp"] * sizes["sequence"]
        wide = {CONFIG.vocab_size, CONFIG.intermediate_size} if sizes["tensor"] > 1 else set()
        for shape in float_shapes(compiled.as_text()):
            elements = math.prod(shape)
            # Of the tokens of all devices together a device may have the columns of the embedding that it looks up, and
            # one head's keys: not the residual stream, the narrowest of the activations.
            if elements % tokens == 0 and ({ROWS, LENGTH} <= set(shape) or tokens in shape):
                assert elements <= tokens * CONFIG.hidden_size // 2, shape
            # Scores, and the MLP's inner activations: by rows or tokens, and by width.
            local = {ROWS // (sizes["data"] * sizes["fsdp"]), tokens // parts}
            if local & set(shape) and len(shape) > 2:
                assert not wide & set(shape), shape
        memory = compiled.memory_analysis()
        assert memory.argument_size_in_bytes - 8 * tokens // parts <= stored  # ids and segments aside
        assert memory.output_size_in_bytes <= stored + 2048  # a tuple of pointers, the loss

    def test_gather_matrices_twice_and_scatter_their_gradients(self):
        """Twice: kept for the backward pass, the gathered matrices would together be the whole model. Scattered: no
        device holds a matrix's whole gradient after it is summed."""
        compiled, _ = compile_step("fsdp=8", CONFIG, ROWS, LENGTH)
        text = compiled.as_text()
        wide = CONFIG.mamba_intermediate_size
        gathered = re.findall(rf"= f32\[32,2,{wide}\]\S* all-gather\(", text)
        assert len(gathered) == 2 * CONFIG.num_hidden_layers  # zx_proj's, the only ones of that shape
        scattered = re.findall(rf"= f32\[4,2,{wide}\]\S* reduce-scatter\(", text)
        assert len(scattered) == CONFIG.num_hidden_layers
        summed = re.findall(r"= (\([^)]*\)|\S+) all-reduce\(", text)
        assert summed
        matrices = {
            (32, 2, wide),
            (2, 32, wide),
            (CONFIG.vocab_size, 32),
            (wide, 32),
            (32, 2, CONFIG.intermediate_size),
        }
        assert not {shape for arrays in summed for shape in float_shapes(arrays)} & matrices


class TestLongSequences:
    CONFIG = Zamba2Config(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        n_mamba_heads=8,
        mamba_d_state=16,
        num_attention_heads=8,
        num_mem_blocks=1,
        adapter_rank=8,
        use_mem_rope=True,
    )

    def memory(self, length, policy):
        one, _ = compile_step("", self.CONFIG, 1, length, policy, devices=1)
        eight, _ = compile_step("sequence=8", self.CONFIG, 1, length, policy)
        temporary = [compiled.memory_analysis().temp_size_in_bytes for compiled in (one, eight)]
        print(f"{length} tokens, {policy}: {temporary[0] / 1e6:.0f} MB on one device, {temporary[1] / 1e6:.0f} on each")
        return temporary

    def test_activations_of_4k_tokens(self):
        one, eight = self.memory(4096, "layer")
        assert eight < one / 4

    @pytest.mark.slow
    @pytest.mark.parametrize("policy", ["none", "layer"])
    def test_activations_of_32k_tokens(self, policy):
        one, eight = self.memory(32768, policy)
        assert eight < one / 4


class TestOps:
    """What the model does not reach."""

    def test_heads_that_share_keys(self):
        rng = np.random.default_rng(3)
        query, key, value = (jnp.asarray(rng.standard_normal((2, 40, heads, 6)), jnp.float32) for heads in (12, 4, 4))
        ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 40)), axis=1))

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
        def gradients(*arrays):
            return jnp.sum(jnp.sin(attention(*arrays, is_causal=True, segment_ids=(ids, ids))))

        wanted = gradients(query, key, value)
        with jax.set_mesh(make_mesh("sequence=4,tensor=2")):
            actual = gradients(query, key, value)
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())

    @pytest.mark.parametrize("width", [1, 4])
    def test_windows(self, width):
        """The convolution's last inputs, which training does not read, and kernels that reach nowhere."""
        rng = np.random.default_rng(4)
        x = jnp.asarray(rng.standard_normal((2, 32, 10)), jnp.float32)
        kernel = jnp.asarray(rng.standard_normal((width, 10)), jnp.float32)
        ends = {"run_start": jnp.array([0, 9]), "run_end": jnp.array([21, 32])}
        wanted = causal_conv(x, kernel, **ends)
        with jax.set_mesh(make_mesh("sequence=8")):
            actual = jax.jit(causal_conv)(x, kernel, **ends)
        for row, (start, end) in enumerate(zip(*ends.values(), strict=True)):
            np.testing.assert_allclose(actual[0][row, start:end], wanted[0][row, start:end], atol=1e-6)
        np.testing.assert_allclose(actual[1], wanted[1], atol=1e-6)


class TestGenerate:
    """Weights on a mesh, and no mesh in use: `generate` finds it."""

    @pytest.mark.parametrize("spec", ["data=2,fsdp=2,tensor=2", "fsdp=2,sequence=4"])
    def test_tokens_equal_one_device(self, spec):
        graph, state = make_model()
        alone = nnx.merge(graph, state)
        prompt = np.random.default_rng(1).integers(3, CONFIG.vocab_size, (4, 9))
        mask = np.ones_like(prompt)
        mask[1, :4] = mask[2, -3:] = 0
        call = {"attention_mask": mask, "max_new_tokens": 8, "return_dict_in_generate": True}

        mesh = make_mesh(spec)
        spread = nnx.merge(graph, jax.device_put(state, param_shardings(state, mesh)))
        output = spread.generate(prompt, **call)
        np.testing.assert_array_equal(output.sequences, alone.generate(prompt, **call).sequences)
        drawn = {"do_sample": True, "seed": 3, "top_k": 20}
        np.testing.assert_array_equal(
            spread.generate(prompt, **call, **drawn).sequences, alone.generate(prompt, **call, **drawn).sequences
        )

        rows = 4 // (mesh.shape["data"] * mesh.shape["fsdp"])
        heads = CONFIG.num_key_value_heads // mesh.shape["tensor"]
        cache = output.past_key_values
        assert cache.attention[0].key.sharding.shard_shape(cache.attention[0].key.shape)[::2] == (rows, heads)
        assert cache.mamba[0].ssm.sharding.shard_shape(cache.mamba[0].ssm.shape)[:2] == (rows, heads)

    def test_looked_up_tokens(self):
        graph, state = make_model()
        mesh = make_mesh("fsdp=4,tensor=2")
        spread = nnx.merge(graph, jax.device_put(state, param_shardings(state, mesh)))
        prompt = np.random.default_rng(2).integers(3, CONFIG.vocab_size, (1, 5))
        call = {"max_new_tokens": 80, "eos_token_id": None}
        output = spread.generate(prompt, prompt_lookup_num_tokens=3, return_dict_in_generate=True, **call)
        np.testing.assert_array_equal(output.sequences, nnx.merge(graph, state).generate(prompt, **call))
        assert output.model_calls < 79

    def test_beams(self):
        graph, state = make_model()
        mesh = make_mesh("fsdp=4,tensor=2")
        spread = nnx.merge(graph, jax.device_put(state, param_shardings(state, mesh)))
        prompt = np.random.default_rng(2).integers(3, CONFIG.vocab_size, (2, 5))
        call = {"max_new_tokens": 4, "num_beams": 2}
        np.testing.assert_array_equal(spread.generate(prompt, **call), nnx.merge(graph, state).generate(prompt, **call))


class TestLora:
    def test_gradients_are_those_of_one_device(self):
        """Of a block and of a layer, with B's that are not zero; the model itself is not differentiated."""
        self.compare(nnx.merge(*make_model()))

    def test_beside_integers(self):
        """Which are stored in parts as other weights are, and gathered as integers."""
        config = CONFIG.replace(num_hidden_layers=2, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1)
        text, rest = self.compare(quantize(Zamba2ForCausalLM(config, rngs=nnx.Rngs(0)), "int4"))
        values = rest["model"]["layers"][0]["mamba"]["zx_proj"]["values"].get_value()
        assert values.shape == (2, 64, 16)
        assert values.sharding.shard_shape(values.shape) == (2, 32, 4)
        assert set(re.findall(r"= (\w+)\[2,32,16\]\S* all-gather", text)) == {"u8"}
        # Outputs stay split: nowhere is the whole matrix, in whatever shape.
        assert not re.findall(r"u8\[(?:2,64,16|128,16)\]\S* all-gather", text)

    def compare(self, model):
        """Returns the text of the mesh's program, and the model without its LoRAs as the mesh holds it."""
        add_lora(model, LoraConfig(r=2, target_modules=["in_proj", "q_proj", "down_proj"]), rngs=nnx.Rngs(1))
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            value.set_value(0.1 * jax.random.normal(jax.random.key(len(path)), value.shape))
        graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

        def step(lora, rest, batch):
            def loss(lora):
                return nnx.merge(graph, lora, rest)(**batch, dropout_key=None).loss

            return jax.value_and_grad(loss)(lora)

        batch = batches()["packed"]
        wanted = jax.jit(step)(lora, rest, batch)
        mesh = make_mesh(MIXED)
        lora, rest = (jax.device_put(state, param_shardings(state, mesh)) for state in (lora, rest))
        with jax.set_mesh(mesh):
            batch = jax.device_put(batch, batch_sharding(mesh))
            step = jax.jit(step).lower(lora, rest, batch).compile()
            assert_same({"packed": step(lora, rest, batch)}, {"packed": wanted})
        return step.as_text(), rest
