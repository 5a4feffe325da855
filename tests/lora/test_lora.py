"""LoRAs within the library: where they are put, what they compute, on every path of a model, and how they leave."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from bench.oracle import relative_error
from tests.lora.judge import randomize
from zamba2_jax import (
    LoraConfig,
    Zamba2Config,
    Zamba2ForCausalLM,
    Zamba2ForSequenceClassification,
    add_lora,
    merge_lora,
    quantize,
    save_lora,
)
from zamba2_jax.layers import decoding
from zamba2_jax.layers.lora import Lora
from zamba2_jax.lora import lora_coverage, trainable
from zamba2_jax.quantization import quantized_modules
from zamba2_jax.sharding import param_shardings

# Two shared blocks; the first has two uses, the second one.
CONFIG = Zamba2Config(
    vocab_size=62,
    hidden_size=32,
    num_hidden_layers=5,
    layers_block_type=["mamba", "hybrid", "hybrid", "mamba", "hybrid"],
    n_mamba_heads=4,
    mamba_d_state=8,
    num_attention_heads=4,
    intermediate_size=40,
    adapter_rank=4,
    num_mem_blocks=2,
    use_shared_attention_adapter=True,
    chunk_size=8,
    max_position_embeddings=64,
)
# One period of the pattern twice over, so that scanned layers and uses are stacked.
SMALL = CONFIG.replace(
    num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1, use_shared_attention_adapter=False
)
IDS = np.random.default_rng(0).integers(1, 62, (2, 13))
Q, IN = "shared_transformer.self_attn.q_proj", "mamba.in_proj"


def make(kind=Zamba2ForCausalLM, config=CONFIG, **options):
    return kind(config, rngs=nnx.Rngs(0), **options)


def with_lora(model=None, **config):
    model = make() if model is None else model
    add_lora(model, LoraConfig(**{"r": 3, "lora_alpha": 6} | config), rngs=nnx.Rngs(1))
    return randomize(model)


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef, state, inputs):
    return nnx.merge(graphdef, state)(**inputs)


def call(model, **inputs):
    return _call(*nnx.split(model), {"input_ids": IDS} | inputs)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(graphdef, lora, rest, key):
    def loss(lora):
        return nnx.merge(graphdef, lora, rest)(IDS, labels=IDS, dropout_key=key).loss

    return jax.grad(loss)(lora)


def gradient(model, key=None):
    graphdef, lora, rest = nnx.split(model, trainable(model), ...)
    return _gradient(graphdef, lora, rest, key)


def assert_close(one, other, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert relative_error(a, b) < tolerance


class TestPlaces:
    """Which modules have a LoRA."""

    @pytest.mark.parametrize("shared", ["block", "use"])
    def test_nothing_changes_at_first(self, shared):
        model = make()
        expected = call(model).logits
        add_lora(model, LoraConfig(r=3, shared=shared), rngs=nnx.Rngs(1))
        assert np.array_equal(call(model).logits, expected)

    def test_coverage_counts_every_kind(self):
        model = make()
        covered = add_lora(
            model, LoraConfig(r=2, target_modules=["in_proj", "q_proj", "layers.2.linear"]), rngs=nnx.Rngs(0)
        )
        rows = {(row.owner, row.kind): row for row in covered.rows}
        assert dataclasses.astuple(rows["mamba layer", "in_proj"])[2:] == (5, 5, (2,), 5 * 2 * (32 + 2 * 64 + 16 + 4))
        assert dataclasses.astuple(rows["mamba layer", "out_proj"])[2:] == (0, 5, (), 0)
        assert dataclasses.astuple(rows["shared block", "q_proj"])[2:] == (2, 2, (2,), 2 * 2 * (64 + 64))
        assert dataclasses.astuple(rows["use of a shared block", "linear"])[2:] == (1, 3, (2,), 2 * (32 + 32))
        adapted = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
        assert covered.trainable == sum(leaf.size for leaf in adapted)
        assert covered.total == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(make())))
        assert covered == lora_coverage(model)
        text = str(covered)
        cells = [line.split("  ") for line in text.splitlines()]
        cells = [[cell.strip() for cell in line if cell] for line in cells]
        assert ["mamba layer", "in_proj", "5 of 5", "2", "1,800"] in cells
        assert ["use of a shared block", "linear", "1 of 3", "2", "128"] in cells
        assert f"trainable: {covered.trainable:,} beside {covered.total:,} parameters" in text

    def test_a_model_without_any_has_a_table_too(self):
        assert {row.adapted for row in lora_coverage(make()).rows} == {0}

    @pytest.mark.parametrize(
        ("targets", "shared", "expected"),
        [
            (["in_proj"], "block", {"layers.N.mamba": 5}),
            (["layers.2.mamba_decoder.mamba.out_proj"], "block", {"layers.N.mamba": 1}),
            (["layers.2.mamba.out_proj"], "block", {"layers.N.mamba": 1}),
            (["q_proj"], "block", {"shared_blocks.N.self_attn": 2}),
            (["q_proj"], "use", {"shared_block_uses.N": 3}),
            (["shared_blocks.0.self_attn.q_proj"], "block", {"shared_blocks.N.self_attn": 1}),
            (["shared_blocks.0.self_attn.q_proj"], "use", {"shared_block_uses.N": 2}),
            (["model.layers.4." + Q], "use", {"shared_block_uses.N": 1}),
            (["linear_v_adapter_list"], "block", {"shared_block_uses.N.v_adapter": 6}),
            (["gate_up_proj_adapter_list.1.0"], "block", {"shared_block_uses.N.gate_up_adapter": 1}),
            (["gate_up_adapter.up"], "block", {"shared_block_uses.N.gate_up_adapter": 3}),
            (r".*layers\.[03]\..*_proj", "block", {"layers.N.mamba": 4}),
        ],
    )
    def test_names(self, targets, shared, expected):
        model = make()
        add_lora(model, LoraConfig(r=1, target_modules=targets, shared=shared), rngs=nnx.Rngs(0))
        found = {}
        for path, module in nnx.iter_modules(model):
            if isinstance(module, Lora):
                holder = ".".join("N" if isinstance(key, int) else key for key in path[1:-2])
                found[holder] = found.get(holder, 0) + 1
        assert found == expected

    def test_all_linear_leaves_out_what_is_excluded(self):
        covered = add_lora(make(), LoraConfig(r=1, exclude_modules=["o_proj", "linear"]), rngs=nnx.Rngs(0))
        assert {row.kind for row in covered.rows if row.adapted == 0} == {"o_proj", "linear"}
        assert all(row.adapted in (0, row.total) for row in covered.rows)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"target_modules": ["q_prj"]},
                r"names 'q_prj', which fits no module.*of a mamba layer, in_proj, out_proj",
            ),
            ({"target_modules": ["proj"]}, "names 'proj', which fits no module"),
            ({"target_modules": "q_proj"}, "fits no module. A string is a regular expression for a whole name"),
            ({"target_modules": ["in_proj", "zx_proj"]}, "'zx_proj', a part of in_proj"),
            ({"target_modules": ["embed_tokens"]}, "the embedding is the head as well"),
            ({"target_modules": ["lm_head"]}, "the embedding is the head as well"),
            ({"target_modules": ["conv1d"]}, "a convolution"),
            ({"target_modules": ["layers.1." + Q]}, r"one LoRA serves all of .*layers.4.*name 'model.shared_blocks.0"),
            ({"exclude_modules": ["nothing"]}, "exclude_modules names 'nothing', which fits no module"),
            ({"target_modules": ["q_proj"], "exclude_modules": ".*"}, "leaves nothing"),
            ({"target_modules": ["q_proj"], "rank_pattern": {"in_proj": 3}}, "rank_pattern names 'in_proj'"),
        ],
    )
    def test_what_fits_nothing_is_refused(self, config, message):
        model = make()
        with pytest.raises(ValueError, match=message):
            add_lora(model, LoraConfig(**config), rngs=nnx.Rngs(0))
        assert model.lora_config is None
        assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"r": 0}, "r must be a positive integer, got 0"),
            ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern must be a positive integer, got 1.5"),
            ({"lora_alpha": -1}, "lora_alpha must be a positive number, got -1"),
            ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and less than 1, got 1.0"),
            ({"lora_dropout": "0.1"}, "lora_dropout must be a number, got '0.1'"),
            ({"shared": "layer"}, 'shared must be "block" or "use", got \'layer\''),
            ({"bias": "all"}, "bias must be \"none\", got 'all'"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, .* got 'pissa'"),
            ({"target_modules": ()}, "target_modules is empty"),
            ({"target_modules": [3]}, "target_modules must be names of modules, or one regular expression, got 3"),
            ({"target_modules": "q_(proj"}, "which is no regular expression"),
            ({"rank_pattern": 3}, "rank_pattern must map names to numbers, got 3"),
        ],
    )
    def test_a_config_that_makes_no_sense_is_refused(self, config, message):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**config)

    def test_once_only_and_into_our_models_only(self):
        model = with_lora(target_modules=["linear"])
        with pytest.raises(ValueError, match="has LoRAs already"):
            add_lora(model, LoraConfig(), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"model must be one of Zamba2Model, .*, got Linear"):
            add_lora(model.model.shared_block_uses[0].linear, LoraConfig(), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"param_dtype must be a floating dtype .* got int8"):
            add_lora(make(), LoraConfig(), rngs=nnx.Rngs(0), param_dtype=jnp.int8)


class TestComputation:
    @pytest.mark.parametrize("shared", ["use", pytest.param("block", marks=pytest.mark.slow)])
    def test_every_way_to_run_the_layers_gives_the_same(self, shared):
        """Scanned and recomputed, with dropout: a key that fell on another layer would show."""
        targets = ["in_proj", "out_proj", "q_proj", "down_proj", "gate_up_adapter"]
        model = with_lora(make(config=SMALL), shared=shared, lora_dropout=0.3, target_modules=targets)
        key = jax.random.key(5)
        logits, gradients = call(model, dropout_key=key).logits, gradient(model, key)
        model.scan_layers_enable()
        model.gradient_checkpointing_enable()
        assert_close(call(model, dropout_key=key).logits, logits)
        assert_close(gradient(model, key), gradients, 1e-4)

    def test_with_a_cache_and_generating_it_is_the_merged_model(self):
        """Prefill, then one token at a time; and `generate` notices that LoRAs came and went, though the model is the
        same object."""
        model = make()
        options = {"max_new_tokens": 6, "min_new_tokens": 6}
        plain = model.generate(IDS, **options)
        with_lora(model, lora_dropout=0.5, target_modules=["in_proj", "out_proj", "k_proj", "gate_up_proj"])
        whole = call(model).logits

        outputs = call(model, input_ids=IDS[:, :9], past_key_values=model.init_cache(2, 13))
        logits = [outputs.logits]
        for column in range(9, 13):
            outputs = call(model, input_ids=IDS[:, column : column + 1], past_key_values=outputs.past_key_values)
            logits.append(outputs.logits)
        assert_close(jnp.concatenate(logits, axis=1), whole)

        generated = model.generate(IDS, **options)
        merge_lora(model)
        assert_close(call(model).logits, whole)
        assert np.array_equal(model.generate(IDS, **options), generated)
        assert not np.array_equal(generated, plain)

    def test_the_fused_decoding_step_steps_aside(self):
        """It reads the weights alone; on a GPU it would leave the LoRA out."""
        model = make(dtype=jnp.bfloat16)
        layer, block, use = model.model.layers[0], model.model.shared_blocks[0], model.model.shared_block_uses[0]
        for target, mamba, attention in [
            ("in_proj", True, False),
            ("q_proj", False, True),
            ("down_proj", False, True),
            ("linear", False, True),
            ("gate_up_adapter", False, True),
        ]:
            add_lora(model, LoraConfig(r=1, target_modules=[target]), rngs=nnx.Rngs(0))
            assert ("LoRA" in (decoding.mamba_obstacle(layer, 1, True) or "")) is mamba
            assert ("LoRA" in (decoding.shared_block_obstacle(block, use, 1, True) or "")) is attention
            merge_lora(model)

    def test_dropout_is_for_calls_with_a_key(self):
        targets = ["in_proj", "v_proj"]
        model, plain = (with_lora(lora_dropout=rate, target_modules=targets) for rate in (0.4, 0.0))
        expected = call(plain).logits
        assert np.array_equal(call(model).logits, expected)
        one, same, other = (call(model, dropout_key=jax.random.key(seed)).logits for seed in (0, 0, 1))
        assert np.array_equal(one, same)
        assert not np.allclose(one, other, atol=1e-3)
        assert np.array_equal(call(plain, dropout_key=jax.random.key(0)).logits, expected)

    def test_dropout_leaves_out_elements_of_the_input_and_keeps_the_mean(self):
        """With A and B the identity, what comes out is the input as it was dropped."""
        one = jnp.eye(8)
        axes = {"down_axes": (None, None), "up_axes": [(None, None)]}
        lora = Lora(one, [one], **axes, name="q", scale=2.0, dropout=0.25, dtype=jnp.float32)
        dropped = np.asarray(lora(jnp.ones((4000, 8)), jax.random.key(0)))
        assert set(np.unique(dropped).round(5)) == {0.0, np.float32(2 / 0.75).round(5)}
        assert abs((dropped == 0).mean() - 0.25) < 0.01  # five standard deviations of 32,000 draws: 0.012
        other = Lora(one, [one], **axes, name="k", scale=2.0, dropout=0.25, dtype=jnp.float32)
        assert not np.array_equal(dropped, other(jnp.ones((4000, 8)), jax.random.key(0)))

    def test_a_blocks_lora_stays_one_after_a_step_and_the_model_stays(self):
        model = with_lora(target_modules=["q_proj", "in_proj"])
        before = {path: value.get_value() for path, value in nnx.to_flat_state(nnx.state(model))}
        graphdef, lora, rest = nnx.split(model, trainable(model), ...)
        optimizer = optax.adamw(1e-2)
        updates, _ = optimizer.update(gradient(model), optimizer.init(lora), lora)
        stepped = nnx.merge(graphdef, optax.apply_updates(lora, updates), rest)
        after = {path: value.get_value() for path, value in nnx.to_flat_state(nnx.state(stepped))}
        assert after.keys() == before.keys()
        changed = {path for path in after if not np.array_equal(after[path], before[path])}
        assert changed == {path for path in after if "lora" in path}
        assert {path[:3] for path in changed if "q_proj" in path} == {
            ("model", "shared_blocks", block) for block in (0, 1)
        }
        # The trained LoRA is at work in both uses of block 0: its merged weight gives the same outputs.
        logits = call(stepped).logits
        merge_lora(stepped)
        assert_close(call(stepped).logits, logits)

    def test_float32_beside_a_bfloat16_model(self):
        model = with_lora(make(dtype=jnp.bfloat16))
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))} == {jnp.dtype("float32")}
        assert call(model).logits.dtype == jnp.bfloat16


class TestBesideQuantizedWeights:
    """What a quantised model does is what the model does whose matrices are the rounded ones."""

    # Two equal layers, so that scanned ones are stacked; a head of its own, so that the loss reads a QuantizedLinear
    # too; weights so large that queries and keys matter.
    CONFIG = SMALL.replace(
        num_hidden_layers=2,
        layers_block_type=["hybrid"] * 2,
        tie_word_embeddings=False,
        add_bias_linear=True,
        initializer_range=0.1,
    )

    @pytest.fixture(scope="class")
    def quantized(self):
        return {
            bits: with_lora(
                quantize(make(config=self.CONFIG), bits),
                target_modules=["in_proj", "out_proj", "q_proj", "down_proj", "linear", "gate_up_adapter"],
            )
            for bits in ("int8", "int4")
        }

    @pytest.mark.parametrize(("bits", "policy"), [("int8", "none"), ("int4", "layer")])
    def test_gradients(self, quantized, bits, policy):
        small, dense = nnx.clone(quantized[bits]), make(config=self.CONFIG)
        for path in quantized_modules(dense, bits):
            module, rounded = (functools.reduce(_child, path, model) for model in (dense, small))
            (module.embedding if hasattr(module, "embedding") else module.kernel).set_value(rounded.matrix())
        with_lora(dense, target_modules=list(small.lora_config.target_modules))
        assert lora_coverage(small) == lora_coverage(dense)
        small.gradient_checkpointing_enable(policy)
        for model in (small, dense):
            model.scan_layers_enable()
        actual, wanted = gradient(small), gradient(dense)
        assert jax.tree.structure(actual) == jax.tree.structure(wanted)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(other)

    def test_neither_integers_nor_scales_are_trained(self, quantized):
        for small in quantized.values():
            trained = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(small, trainable(small)))}
            assert not trained & {"values", "scale"}
            graphdef, scales, rest = nnx.split(small, lambda path, leaf: path[-2:] == ("linear", "scale"), ...)
            assert len(jax.tree.leaves(scales)) == 2
            with pytest.raises(ValueError, match="scales of int8 and int4 weights are constants"):
                _gradient(graphdef, scales, rest, None)

    def test_merging_is_refused(self, quantized):
        for bits, small in quantized.items():
            with pytest.raises(ValueError, match=f"the model is quantized to {bits}: a LoRA added to its weights"):
                merge_lora(small)


def _child(module, name):
    return module[name] if isinstance(name, int) else getattr(module, name)


class TestDevices:
    def test_parameters_have_logical_axes_and_can_be_abstract(self):
        def build():
            model = make()
            add_lora(model, LoraConfig(r=3), rngs=nnx.Rngs(1))
            return model

        state = nnx.state(nnx.eval_shape(build), nnx.Param)
        shardings = param_shardings(state, AbstractMesh((2, 2), ("fsdp", "tensor")))
        found = {".".join(map(str, path[1:])): leaf.spec for path, leaf in nnx.to_flat_state(shardings)}
        assert found["layers.0.mamba.lora.in_proj.down"] == PartitionSpec("fsdp", None)
        assert found["layers.0.mamba.lora.in_proj.up.0"] == PartitionSpec(None, None, "tensor")
        assert found["layers.0.mamba.lora.in_proj.up.1"] == PartitionSpec(None, None, None)
        assert found["layers.0.mamba.lora.in_proj.up.2"] == PartitionSpec(None, "tensor")
        assert found["shared_blocks.1.self_attn.lora.o_proj.down"] == PartitionSpec("tensor", None)
        assert found["shared_blocks.1.self_attn.lora.o_proj.up.0"] == PartitionSpec(None, "fsdp")

    def test_beside_weights_on_a_mesh_they_are_split_like_these(self):
        """A mesh of one device: what is looked at is the sharding (several devices: test_devices.py)."""
        mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        graphdef, state = nnx.split(make())
        model = nnx.merge(graphdef, jax.device_put(state, param_shardings(state, mesh)))
        with_lora(model, target_modules=["q_proj", "in_proj"])
        lora = model.model.layers[0].mamba.lora["in_proj"]
        assert lora.down.get_value().sharding == NamedSharding(mesh, PartitionSpec("fsdp", None))
        assert lora.up[0].get_value().sharding == NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
        merge_lora(model)
        kernel = model.model.layers[0].mamba.zx_proj.kernel.get_value()
        assert kernel.sharding == NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))


class TestLeaving:
    def test_one_use_alone_can_be_merged_into_its_block(self):
        """Block 1 has one use: a LoRA of the use is one of the block."""
        model = with_lora(target_modules=r".*layers\.2\.shared_transformer.*(o|down)_proj", shared="use")
        logits = call(model).logits
        merge_lora(model)
        assert_close(call(model).logits, logits)

    def test_what_cannot_be_merged_is_named_and_nothing_happens(self):
        model = with_lora(shared="use", target_modules=["in_proj", "o_proj", "down_proj"])
        logits = call(model).logits
        for options in ({}, {"raise_adapter_rank": True}):
            with pytest.raises(ValueError, match=r'LoRAs of down_proj, o_proj belong to single uses.*shared="block"'):
                merge_lora(model, **options)
        assert np.array_equal(call(model).logits, logits)

    def test_without_attention_adapters_q_proj_cannot_be_merged_either(self):
        model = make(config=CONFIG.replace(use_shared_attention_adapter=False))
        with_lora(model, shared="use", target_modules=["q_proj", "gate_up_proj"])
        with pytest.raises(ValueError, match="LoRAs of q_proj belong to single uses"):
            merge_lora(model, raise_adapter_rank=True)

    def test_merging_rounds_to_the_dtype_of_the_weights(self):
        model = with_lora(make(dtype=jnp.bfloat16), target_modules=["in_proj"])
        merge_lora(model)
        assert model.model.layers[0].mamba.zx_proj.kernel.dtype == jnp.bfloat16

    def test_a_model_with_loras_is_no_checkpoint(self, tmp_path):
        with pytest.raises(ValueError, match=r"has LoRAs, which checkpoints do not hold: merge .*\(merge_lora\)"):
            with_lora(target_modules=["linear"]).save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_without_loras_there_is_nothing_to_do(self, tmp_path):
        for action in (merge_lora, trainable, lambda model: save_lora(model, tmp_path)):
            with pytest.raises(ValueError, match="the model has no LoRAs"):
                action(make())

    def test_a_classifiers_head_is_trained_too(self):
        model = make(Zamba2ForSequenceClassification)
        covered = add_lora(model, LoraConfig(r=2, target_modules=["in_proj"]), rngs=nnx.Rngs(0))
        trained = nnx.state(model, trainable(model))
        assert {path[0] for path, _ in nnx.to_flat_state(trained)} == {"model", "score"}
        assert covered.trainable == sum(leaf.size for leaf in jax.tree.leaves(trained))
