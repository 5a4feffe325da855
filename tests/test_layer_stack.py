"""How layers are run changes nothing but memory and compile time: gradient checkpointing, scanned layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.oracle import relative_error, tokens
from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, Zamba2ForSequenceClassification, Zamba2Model
from zamba2_jax.config import block_types
from zamba2_jax.generation.programs import Structure
from zamba2_jax.layers import mamba2

LENGTH = 24


def config(layers=6, **changes):
    """Repetitions of [layer, hybrid], and two layers at the end."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "layers_block_type": block_types(layers, range(1, layers - 2, 2)),
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "num_attention_heads": 4,
        "adapter_rank": 3,
        "use_mem_rope": True,
        "chunk_size": 32,
    }
    return Zamba2Config(**shape | changes)


def split(policy="none", scan=False, layers=6, **dtypes):
    """graphdef and parameters of a model run this way; the parameters are the same every time."""
    model = Zamba2ForCausalLM(config(layers), rngs=nnx.Rngs(0), **dtypes)
    model.gradient_checkpointing_enable(policy)
    if scan:
        model.scan_layers_enable()
    return nnx.split(model)


def loss(graphdef, ids, params):
    return nnx.merge(graphdef, params)(ids, labels=ids).loss


def gradient(ids, *arguments, **options):
    graphdef, params = split(*arguments, **options)
    return jax.jit(jax.value_and_grad(functools.partial(loss, graphdef, ids)))(params)


@pytest.fixture(scope="module")
def ids():
    return tokens(64, 2, LENGTH)


@pytest.fixture(scope="module")
def plain_gradient(ids):
    return gradient(ids)


@pytest.mark.parametrize(("policy", "scan"), [("layer", False), ("attention", False), ("projections", True)])
def test_gradients_are_the_same(ids, plain_gradient, policy, scan):
    value, slopes = gradient(ids, policy, scan)
    assert abs(value - plain_gradient[0]) < 1e-6 * plain_gradient[0]
    assert jax.tree.structure(slopes) == jax.tree.structure(plain_gradient[1])
    for ours, expected in zip(jax.tree.leaves(slopes), jax.tree.leaves(plain_gradient[1]), strict=True):
        # Sums in another order, through six layers.
        assert relative_error(ours, expected) < 1e-5


def test_mixed_precision_scans_what_it_would_have_cast(ids):
    """What is stacked is in the compute dtype already, and rounding happens where it did."""
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    values = []
    for scan in (False, True):
        graphdef, params = split("none", scan, **options)
        values.append(jax.jit(functools.partial(loss, graphdef, ids))(params))
    # XLA may leave out a rounding between two operations that it fuses, and fuses others inside a loop.
    assert abs(values[0] - values[1]) < 1e-4 * values[0]
    graphdef, params = split("none", True, **options)
    text = jax.jit(functools.partial(loss, graphdef, ids)).lower(params).as_text()
    assert "concatenate" in text
    stacked_matrix = "2x1x32x2x64x"  # repetitions, layers of a run, (d, 2, E): zx_proj
    assert f"tensor<{stacked_matrix}bf16>" in text
    assert f"tensor<{stacked_matrix}f32>" not in text


def residual_bytes(ids, policy, scan=False, layers=6):
    graphdef, params = split(policy, scan, layers)
    backward = jax.eval_shape(lambda params: jax.vjp(functools.partial(loss, graphdef, ids), params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize("scan", [False, True])
def test_policies_keep_less(scan):
    ids = tokens(64, 8, 128)
    everything, projections, attention, layer = (
        residual_bytes(ids, policy, scan) for policy in ("none", "projections", "attention", "layer")
    )
    # Of the last layer all is kept, unless it is scanned with the others: what a layer more without a policy keeps.
    last = 0 if scan else residual_bytes(ids, "none", layers=7) - residual_bytes(ids, "none", layers=6)
    projections, attention, layer = projections - last, attention - last, layer - last
    assert projections < 0.5 * everything
    assert layer < attention < layer + 0.5 * (projections - layer)
    # A layer's input; of the shared blocks what attention, MLP and matrix result in; the embedding, the last norm's
    # input and what the loss keeps.
    stream = ids.size * 32 * 4
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(split()[1]))
    assert layer < (6 + 2 * 3 + 6) * stream + 2 * parameters
    assert layer - 4 * stream < 0.25 * projections  # those of attention and MLP are there with either


@pytest.mark.parametrize(("policy", "last"), [("none", False), ("attention", True)])
def test_layers_know_whether_they_run_again(monkeypatch, ids, policy, last):
    """What a recurrence that does leaves to its backward pass may be large: its chunks' states. The last layer does not
    run again, unless it is scanned with others."""
    told, real = [], mamba2.ssd

    def ssd(*arguments, keep_states, **options):
        told.append(keep_states)
        return real(*arguments, **options)

    monkeypatch.setattr(mamba2, "ssd", ssd)
    for scan in (False, True):
        graphdef, params = split(policy, scan)
        jax.eval_shape(functools.partial(loss, graphdef, ids), params)
        if scan:
            assert set(told) == {last}
        else:
            assert told == [policy != "none"] * 5 + [False]
        told.clear()


def test_products_into_the_stream_are_not_made_again(ids):
    """Those that lead out of a mamba layer, of attention and of an MLP: rematerialisation cuts after each. The wide
    ones, such as gate_up_proj's, are."""

    def products(policy, width):
        graphdef, params = split(policy)
        program = jax.make_jaxpr(jax.grad(functools.partial(loss, graphdef, ids)))(params)
        return str(program).count(f"f32[2,{LENGTH},{width}] = dot_general")

    assert products("layer", "32") == products("none", "32")
    assert products("layer", "2,128") == products("none", "2,128") + 4  # of two uses, and their adapters


@pytest.mark.parametrize("policy", ["none", "layer"])
def test_gradients_of_shared_weights_are_added_as_they_come(ids, policy):
    """The latest first, where memory is short: see `shared_gradients`. JAX's own order is the other."""
    graphdef, params = split(policy, layers=8)
    program = jax.make_jaxpr(jax.grad(functools.partial(loss, graphdef, ids)))(params).jaxpr
    made = {result: place for place, equation in enumerate(program.eqns) for result in equation.outvars}
    sums = [
        [made[term] for term in equation.invars]
        for equation in program.eqns
        if equation.primitive.name in ("add", "add_any") and equation.outvars[0].aval.shape == (32, 2, 128)
    ]
    assert len(sums) == 2  # of gate_up_proj's three uses
    for first, second in sums:
        assert (first > second) == (policy == "layer")


def test_what_cudnn_attention_gives_is_kept(monkeypatch):
    """In the programs of JAX's own function, traced as where there is a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    from zamba2_jax.layer_stack import CHECKPOINT_POLICIES

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    query = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)

    def times(policy):
        @functools.partial(jax.checkpoint, policy=CHECKPOINT_POLICIES[policy])
        def attend(query):
            return jax.nn.dot_product_attention(query, query, query, is_causal=True, implementation="cudnn")

        program = jax.make_jaxpr(jax.grad(lambda query: jnp.sum(attend(query), dtype=jnp.float32)))(query)
        return str(program).count("dot_product_attention_fwd_wrapper[")

    assert (times("projections"), times("attention"), times("layer")) == (1, 1, 2)


def test_compiled_memory_goes_down():
    """Of mamba layers alone, which are one compiled body."""
    ids = tokens(64, 8, 128)

    def temporary(policy):
        model = Zamba2ForCausalLM(config(layers_block_type=["mamba"] * 6), rngs=nnx.Rngs(0))
        model.gradient_checkpointing_enable(policy)
        model.scan_layers_enable()
        graphdef, params = nnx.split(model)
        compiled = jax.jit(jax.grad(functools.partial(loss, graphdef, ids))).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("layer") < 0.5 * temporary("none")


def test_a_deeper_model_compiles_the_same_bodies(ids):
    def products(layers, scan):
        graphdef, params = split("layer", scan, layers)
        program = jax.jit(jax.grad(functools.partial(loss, graphdef, ids))).lower(params)
        return program.as_text().count("dot_general")

    assert products(6, True) == products(8, True)
    assert products(6, False) < products(8, False)


@pytest.mark.parametrize("case", ["cache", "packed", "dropout"])
def test_every_output_is_the_same_scanned(case):
    # Two shared blocks, each used twice, one right after the other.
    pattern = {"layers_block_type": block_types(6, range(4)), "num_mem_blocks": 2, "use_shared_attention_adapter": True}
    model = Zamba2ForCausalLM(config(attention_dropout=0.2, **pattern), rngs=nnx.Rngs(0))
    ids = tokens(64, 2, LENGTH)
    arguments = {
        "cache": {"attention_mask": np.arange(LENGTH) >= np.array([[0], [5]]), "use_cache": True, "cache_length": 40},
        "packed": {"segment_ids": np.arange(LENGTH)[None].repeat(2, 0) // 7},
        "dropout": {"dropout_key": jax.random.key(3)},
    }[case]
    outputs = []
    for scan in (False, True):
        if scan:
            model.scan_layers_enable()
        graphdef, params = nnx.split(model)

        @jax.jit
        def call(params, graphdef=graphdef):
            model = nnx.merge(graphdef, params)
            first = model(ids, **arguments, output_hidden_states=True, output_attentions=True)
            if case != "cache":
                return first
            return first, model(ids[:, :3], past_key_values=first.past_key_values)

        outputs.append(call(params))
    assert jax.tree.structure(outputs[0]) == jax.tree.structure(outputs[1])
    for plain, scanned in zip(*map(jax.tree.leaves, outputs), strict=True):
        assert relative_error(scanned, plain) < 1e-6


def test_decoding_is_neither_scanned_nor_recomputed():
    """A call of one token with a cache is the same program whatever was chosen: it copies no weights."""
    ids = tokens(64, 2, 1)

    def program(policy, scan):
        graphdef, params = split(policy, scan)

        def step(params, cache):
            return nnx.merge(graphdef, params)(ids, past_key_values=cache)

        cache = nnx.merge(graphdef, params).init_cache(2, 8)
        return jax.jit(step).lower(params, cache).as_text()

    assert program("layer", True) == program("none", False)


def test_names_of_transformers():
    for kind in (Zamba2Model, Zamba2ForCausalLM, Zamba2ForSequenceClassification):
        model = nnx.eval_shape(lambda kind=kind: kind(config(), rngs=nnx.Rngs(0)))
        assert not model.is_gradient_checkpointing
        assert not model.is_scanning_layers
        before = nnx.split(model)[0]
        model.gradient_checkpointing_enable()
        model.scan_layers_enable()
        assert model.is_gradient_checkpointing
        assert model.is_scanning_layers
        after = nnx.split(model)[0]
        assert after != before
        assert hash(after) == hash(nnx.split(model)[0])
        assert nnx.merge(*nnx.split(model)).is_gradient_checkpointing
        assert Structure(model) == Structure(model)
        model.gradient_checkpointing_disable()
        model.scan_layers_disable()
        assert nnx.split(model)[0] == before


def test_other_names_are_refused():
    model = nnx.eval_shape(lambda: Zamba2Model(config(), rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match="gradient checkpointing is 'dots'; it must be one of 'none', 'layer', 'attention'"
    ):
        model.gradient_checkpointing_enable("dots")
    assert not model.is_gradient_checkpointing
