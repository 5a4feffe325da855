"""The one table of axes: what it maps, what it refuses, and that every parameter's axes are in it."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, Zamba2ForSequenceClassification
from zamba2_jax.sharding import RULES, param_shardings, partition_spec


def abstract_params(config, kind=Zamba2ForCausalLM):
    return nnx.state(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))), nnx.Param)


CONFIG = Zamba2Config(
    vocab_size=128,
    hidden_size=32,
    num_hidden_layers=3,
    layers_block_type=["mamba", "hybrid", "hybrid"],
    n_mamba_heads=8,
    num_attention_heads=8,
    num_mem_blocks=2,
    adapter_rank=3,
    add_bias_linear=True,
    use_shared_attention_adapter=True,
    tie_word_embeddings=False,
)


def test_every_parameter_names_its_axes():
    for kind in (Zamba2ForCausalLM, Zamba2ForSequenceClassification):
        for path, param in nnx.to_flat_state(abstract_params(CONFIG, kind)):
            axes = param.get_metadata("out_sharding")
            assert len(axes) == len(param.get_value().shape), path
            assert set(axes) - {None} <= set(RULES), path


def test_large_parameters_are_split_over_both_axes():
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    shardings = param_shardings(abstract_params(CONFIG), mesh)
    for (path, param), (_, leaf) in zip(
        nnx.to_flat_state(abstract_params(CONFIG)), nnx.to_flat_state(shardings), strict=True
    ):
        sharding = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        local = np.prod(sharding.shard_shape(param.get_value().shape))
        if path[-1] in ("kernel", "embedding") and not {"conv_x", "conv_bc", "bc_proj"} & set(path):
            alone = {"down", "up", "linear"} & set(path)  # low-rank or square: one axis only
            assert local * (2 if alone else 8) <= param.get_value().size, path


def test_axes_that_a_mesh_lacks_are_replicated():
    assert partition_spec(("embed", "mlp"), AbstractMesh((2,), ("tensor",))) == PartitionSpec(None, "tensor")
    assert partition_spec(("embed", "mlp"), AbstractMesh((2,), ("data",))) == PartitionSpec(None, None)


def test_what_does_not_fit_is_refused_by_name():
    mesh = AbstractMesh((2,), ("fsdp",))
    with pytest.raises(ValueError, match=r"unknown logical names \['width'\]"):
        partition_spec(("embed", "width"), mesh)
    with pytest.raises(ValueError, match="map two dimensions to the same mesh axis"):
        partition_spec(("embed", "embed"), mesh)
    with pytest.raises(ValueError, match=r"mesh has axes \['model'\]"):
        param_shardings(abstract_params(CONFIG), AbstractMesh((2,), ("model",)))
    with pytest.raises(ValueError, match="mamba_heads=8 does not divide by tensor=3") as error:
        param_shardings(abstract_params(CONFIG), AbstractMesh((3,), ("tensor",)))
    assert str(error.value).count("\n") > 10  # all faults, not the first
    assert jax.tree.leaves(param_shardings(abstract_params(CONFIG), mesh))
