"""The one table of axes: what it maps, what it refuses, and that every parameter's axes are in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from zamba2_jax import Zamba2Config, Zamba2ForCausalLM, Zamba2ForSequenceClassification
from zamba2_jax.sharding import (
    MESH_AXES,
    RULES,
    batch_sharding,
    check_mesh,
    constrain,
    generation_mesh,
    make_mesh,
    mesh_of,
    param_shardings,
    partition_spec,
    spec_in_use,
)


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
            alone = {"down", "linear"} & set(path)  # low-rank or square: fsdp only
            assert local * (4 if alone else 8) <= param.get_value().size, path


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


class TestMesh:
    def test_all_axes_whatever_is_named(self):
        for axes in ("auto", "", "fsdp=1", " data = 1 , tensor = 1 "):
            mesh = make_mesh(axes, jax.devices()[:1])
            assert mesh.axis_names == MESH_AXES
            assert set(mesh.axis_types) == {AxisType.Auto}
        assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"), "sequence")

    def test_a_mesh_is_taken_with_automatic_axes(self):
        mesh = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1], axis_types=(AxisType.Explicit,))
        assert make_mesh(mesh) == Mesh(mesh.devices, ("fsdp",), axis_types=(AxisType.Auto,))
        assert mesh_of([jnp.zeros(3)]) is None
        assert generation_mesh(make_mesh("", jax.devices()[:1])).axis_names == ("data", "fsdp", "tensor", "repeated")

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            ("model=1", "names an axis 'model'; there are data, fsdp, tensor, sequence"),
            ("fsdp", "gives fsdp the size ''; it must be an integer"),
            ("fsdp=two", "gives fsdp the size 'two'; it must be an integer"),
            ("fsdp=0", "gives fsdp the size 0; it must be at least 1"),
            ("data=-1", "gives data the size -1; it must be at least 1"),
            ("data=1,data=1", "names the axis data twice"),
            ("data=2,fsdp=4", r"is for 8 devices \(data=2 \* fsdp=4\), and there are 1"),
        ],
    )
    def test_what_is_no_mesh(self, axes, message):
        with pytest.raises(ValueError, match=message):
            make_mesh(axes, jax.devices()[:1])

    @pytest.mark.parametrize(
        ("sizes", "batch", "message"),
        [
            ({"tensor": 3}, {}, "tensor=3 does not divide n_mamba_heads, 8"),
            ({"tensor": 3}, {}, "tensor=3 does not divide num_attention_heads, 8"),
            ({"tensor": 3}, {}, "tensor=3 does not divide num_key_value_heads, 8"),
            ({"tensor": 3}, {}, "tensor=3 does not divide intermediate_size, 128"),
            ({"tensor": 3}, {}, "tensor=3 does not divide vocab_size, 128"),
            ({"fsdp": 3, "sequence": 2}, {}, r"fsdp=3 \* sequence=2 does not divide hidden_size, 32"),
            ({"data": 2, "fsdp": 4}, {"batch_size": 12}, r"data=2 \* fsdp=4 does not divide the rows of a batch, 12"),
            ({"sequence": 8}, {"seq_len": 100}, "sequence=8 does not divide the tokens of a row, 100"),
            ({"sequence": 8}, {"seq_len": 16}, "sequence=8 leaves 2 of a row's 16 tokens"),
        ],
    )
    def test_what_does_not_divide(self, sizes, batch, message):
        with pytest.raises(ValueError, match=message):
            check_mesh(CONFIG, AbstractMesh(tuple(sizes.values()), tuple(sizes)), **batch)

    def test_what_fits(self):
        mesh = AbstractMesh((2, 2, 2, 2), MESH_AXES)
        check_mesh(CONFIG, mesh, batch_size=4, seq_len=64)
        assert jax.tree.leaves(param_shardings(abstract_params(CONFIG), mesh))


class TestConstrain:
    def test_nothing_without_a_mesh(self):
        x = jnp.zeros((4, 8, 16))
        assert constrain(x, "batch", "length", None) is x
        with jax.set_mesh(make_mesh("", jax.devices()[:1])):
            assert constrain(x, "batch", "length", None) is x

    def test_axes_that_do_not_divide_are_left_out(self):
        with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 3, 1), MESH_AXES)):
            assert spec_in_use((4, 6, 7), ("batch", "length", "mlp")) == [("data", "fsdp"), (), ()]
            assert spec_in_use((2, 6, 9), ("batch", "length", "mlp")) == [("data",), (), ("tensor",)]
