"""The table of names against transformers' own files, against our models, and against the layout by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zamba2_jax
from bench.oracle import SHAPES
from tests.checkpoint.files import read, saved
from zamba2_jax.checkpoint.names import ARCHITECTURES, is_unused_adapter, table, written_names


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_table_lists_the_tensors_that_transformers_writes(root, shape, kind):
    config = zamba2_jax.Zamba2Config.from_pretrained(saved(root, shape, kind))
    expected = {name: tuple(tensor.shape) for name, tensor in read(saved(root, shape, kind)).items()}
    assert {name: tensor.shape for name, tensor in written_names(table(config, kind), config)} == expected


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"use_conv_bias": False}])
def test_table_fills_every_parameter_of_our_models_once(kind, changes):
    for shape in ("1.2B", "unusual"):
        config = zamba2_jax.Zamba2Config(**(SHAPES[shape] | changes))
        model = nnx.eval_shape(
            lambda config=config: getattr(zamba2_jax, kind)(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        )
        expected = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        float32 = {path for path, leaf in nnx.to_flat_state(nnx.state(model)) if leaf.dtype == jnp.float32}
        parts = [part for tensor in table(config, kind) for part in tensor.parts]
        assert {part.path: part.shape for part in parts} == expected
        assert len(parts) == len(expected)
        assert {part.path for part in parts if part.float32} == float32
        for tensor in table(config, kind):
            if not tensor.stands_for_zero:
                ends = [0, *(part.stop for part in tensor.parts)]
                assert [part.start for part in tensor.parts] == ends[:-1]
                assert ends[-1] == tensor.shape[0]


def test_sizes_add_up_to_the_published_counts():
    for config, count in (
        (zamba2_jax.Zamba2Config.zamba2_1_2b(), 1_215_064_704),
        (zamba2_jax.Zamba2Config.zamba2_2_7b(), 2_662_214_560),
        (zamba2_jax.Zamba2Config.zamba2_7b(), 7_356_749_648),
    ):
        assert sum(tensor.size for tensor in table(config, "Zamba2ForCausalLM")) == count


def test_fused_tensors_by_hand(root):
    """z, x, B, C, dt; the convolution's x, B, C; gate and up; written here without the table."""
    directory = saved(root, "unusual")
    model = zamba2_jax.Zamba2ForCausalLM.from_pretrained(directory)
    tensors = {name: tensor.numpy() for name, tensor in read(directory).items()}
    inner, groups_state, heads = 3 * 30, 3 * 7, 9

    mamba, name = model.model.layers[3].mamba, "model.layers.3.mamba_decoder.mamba"
    z, x, b, c, dt = np.split(
        tensors[f"{name}.in_proj.weight"], np.cumsum([inner, inner, groups_state, groups_state]), axis=0
    )
    assert dt.shape == (heads, 30)
    for ours, theirs in (
        (mamba.zx_proj.kernel[:, 0], z.T),
        (mamba.zx_proj.kernel[:, 1], x.T),
        (mamba.bc_proj.kernel[:, 0], b.T),
        (mamba.bc_proj.kernel[:, 1], c.T),
        (mamba.dt_proj.kernel[...], dt.T),
        (mamba.dt_proj.bias[...], tensors[f"{name}.in_proj.bias"][-heads:]),
        (mamba.conv_x.kernel[...], tensors[f"{name}.conv1d.weight"][:inner, 0].T),
        (mamba.conv_bc.kernel[:, 1], tensors[f"{name}.conv1d.weight"][inner + groups_state :, 0].T),
        (mamba.conv_bc.bias[0], tensors[f"{name}.conv1d.bias"][inner : inner + groups_state]),
        (mamba.A_log[...], tensors[f"{name}.A_log"]),
        (mamba.out_proj.kernel[...], tensors[f"{name}.out_proj.weight"].T),
    ):
        np.testing.assert_array_equal(ours, theirs)

    # Five uses of three blocks: use 4 (layer 5) is of block 1, which the file keeps under layer 1.
    block, name = model.model.shared_blocks[1], "model.layers.1.shared_transformer"
    gate_up = tensors[f"{name}.feed_forward.gate_up_proj.weight"]
    np.testing.assert_array_equal(block.feed_forward.gate_up_proj.kernel[:, 0], gate_up[:37].T)
    np.testing.assert_array_equal(block.feed_forward.gate_up_proj.kernel[:, 1], gate_up[37:].T)
    adapter = tensors[f"{name}.feed_forward.gate_up_proj_adapter_list.4.1.weight"]
    np.testing.assert_array_equal(model.model.shared_block_uses[4].gate_up_adapter.up.kernel[:, 1], adapter[37:].T)
    np.testing.assert_array_equal(
        model.model.shared_block_uses[4].linear.kernel[...], tensors["model.layers.5.linear.weight"].T
    )
    np.testing.assert_array_equal(model.lm_head.kernel[...], tensors["lm_head.weight"].T)


def test_parts_read_only_the_rows_of_a_slice_and_write_back():
    config = zamba2_jax.Zamba2Config(**SHAPES["unusual"])
    rng = np.random.default_rng(0)
    for tensor in table(config, "Zamba2ForCausalLM"):
        values = rng.standard_normal(tensor.shape).astype(np.float32)
        for part in tensor.parts:
            whole = part.read(lambda start, stop, values=values: values[start:stop])
            assert whole.shape == part.shape
            np.testing.assert_array_equal(part.to_rows(whole, tensor.shape[1:]), values[part.start : part.stop])

            index = tuple(slice(size // 3, max(size // 3 + 1, 2 * size // 3)) for size in part.shape)
            rows_read = 0

            def read_rows(start, stop, values=values, part=part):
                nonlocal rows_read
                assert part.start <= start <= stop <= part.stop
                rows_read += stop - start
                return values[start:stop]

            np.testing.assert_array_equal(part.read(read_rows, index), whole[index])
            if len(part.shape) == 2 and part.transposed and part.shape[-1] > 3:
                assert rows_read < part.stop - part.start


def test_unused_adapters():
    config = zamba2_jax.Zamba2Config(**SHAPES["2.7B"])  # hybrid layers 1, 3, 5; two blocks; no attention adapters
    name = "layers.{}.shared_transformer.{}_adapter_list.{}.0.weight"
    assert is_unused_adapter(name.format(1, "feed_forward.gate_up_proj", 1), config)
    assert is_unused_adapter(name.format(3, "feed_forward.gate_up_proj", 2), config)
    assert not is_unused_adapter(name.format(1, "feed_forward.gate_up_proj", 2), config)  # used
    assert not is_unused_adapter(name.format(1, "feed_forward.gate_up_proj", 3), config)  # no such use
    assert not is_unused_adapter(name.format(2, "feed_forward.gate_up_proj", 1), config)  # not a hybrid layer
    assert not is_unused_adapter(name.format(1, "self_attn.linear_q", 1), config)
