"""What a kept program is found by: everything that makes it, and nothing that changes from process to process."""

import collections
import contextlib
import dataclasses
import enum
import functools
import importlib.metadata
import subprocess
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zamba2_jax import LoraConfig, Zamba2Config, Zamba2ForCausalLM, add_lora, program_key, quantize, sharding
from zamba2_jax.generation import processors, programs
from zamba2_jax.layers import activations, mamba2, projection
from zamba2_jax.ops.decode import cached_attention
from zamba2_jax.program_key import NoKeyError, digest

CONFIG = Zamba2Config(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    layers_block_type=["mamba", "hybrid"],
    n_mamba_heads=4,
    mamba_d_state=6,
    num_attention_heads=4,
    adapter_rank=3,
)


@pytest.fixture(autouse=True)
def sources_of_now(monkeypatch):
    """Whoever edits the package's files while the tests run does not change them."""
    monkeypatch.setattr(program_key, "_IMPORTED_NS", sys.maxsize)


def make_model(config=CONFIG, **options):
    return Zamba2ForCausalLM(config, rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def model():
    return make_model()


def structure_of(model):
    return programs.take_apart(model)[0]


@pytest.fixture(scope="module")
def structure(model):
    return structure_of(model)


STATIC = processors.Processors(False, 0, False, False, 0, False, False, False, 1)


def key(structure, name="decode", static=STATIC, arguments=None, devices=None):
    arguments = {"logits": np.zeros((2, 64), np.float32)} if arguments is None else arguments
    leaves, tree = jax.tree.flatten(arguments)
    return program_key.program_key(
        name, (structure, static), tree, leaves, program_key.devices_of(leaves) if devices is None else devices
    )


class TestDigest:
    class Colour(enum.Enum):
        RED = 1
        GREEN = 2

    def test_values_that_differ(self):
        values = [
            *(None, True, False, 1, 0, 1.0, 0.0, -0.0, float("inf"), 1j, "1", "None", b"1", ""),
            *((), [], {}, set(), frozenset(), (1, 2), [1, 2], {1, 2}, frozenset({1, 2}), {1: 2}, ((1,), 2), (1, (2,))),
            *(("a", "b"), ("a, b",), ("a', 'b",), {"a": 1, "b": 2}, {"a": {"b": 1}}),
            *(np.float32, np.dtype("float32"), np.float32(1), np.int32(1), np.ones(2, np.float32), np.ones((1, 2))),
            *(jnp.bfloat16, np.dtype(jnp.bfloat16), jax.nn.gelu, jax.nn.silu, jnp.tanh, type(None), int),
            *(functools.partial(jax.nn.gelu, approximate=True), functools.partial(jax.nn.gelu, approximate=False)),
            *(STATIC, dataclasses.replace(STATIC, keep=2), dataclasses.astuple(STATIC), CONFIG),
            *(jax.tree.structure(value) for value in (1, None, (1,), [1], {"a": 1}, {"b": 1}, (1, None), (1, 1))),
            *(AxisType.Auto, AxisType.Explicit, PartitionSpec("a"), PartitionSpec("b"), PartitionSpec(None, "a")),
        ]
        digests = [digest(value) for value in values]
        assert len(set(digests)) == len(values)
        assert [digest(value) for value in values] == digests

    def test_order_in_a_set_is_none(self):
        words = [str(number) for number in range(50)]
        assert digest(set(words)) == digest(dict.fromkeys(reversed(words)).keys() | set())

    def test_equal_values_of_different_objects(self, structure):
        assert digest(structure_of(make_model())) == digest(structure)
        shared = ["x", 1]
        assert digest([shared, shared]) == digest([["x", 1], ["x", 1]])

    def test_a_temporary_object_is_not_taken_for_another(self):
        # Parts that are made while they are described could get the same id one after the other.
        assert digest([jax.tree.structure([[1]]), jax.tree.structure([[1, 1]])]) != digest(
            [jax.tree.structure([[1]]), jax.tree.structure([[1]])]
        )

    @pytest.mark.parametrize(
        "value",
        [lambda x: x, Colour.RED, object(), iter([]), collections.deque([1]), test_order_in_a_set_is_none],
        ids=["lambda", "enum", "object", "iterator", "deque", "function"],
    )
    def test_what_has_no_description(self, value):
        with pytest.raises(NoKeyError):
            digest(("beside others", value))


class TestKey:
    def test_it_is_the_same_again(self, structure):
        assert key(structure) == key(structure)
        assert key(structure_of(make_model())) == key(structure)

    @pytest.mark.parametrize(
        "changed",
        [
            {"name": "prefill"},
            {"static": dataclasses.replace(STATIC, sample=True)},
            {"arguments": {"logits": np.zeros((3, 64), np.float32)}},
            {"arguments": {"logits": np.zeros((2, 64), np.float16)}},
            {"arguments": {"scores": np.zeros((2, 64), np.float32)}},
            {"arguments": [np.zeros((2, 64), np.float32)]},
            {"arguments": {"logits": np.zeros((2, 64), np.float32), "none": None}},
        ],
        ids=["name", "static", "shape", "dtype", "field", "tree", "none"],
    )
    def test_of_a_call(self, structure, changed):
        assert key(structure, **changed) != key(structure)

    def test_weak_types_and_devices(self, structure):
        keys = {
            key(structure, arguments=[value])
            for value in (np.float32(1), 1.0, 1, True, jax.device_put(np.float32(1), jax.devices()[0]))
        }
        assert len(keys) == 5
        assert key(structure, arguments=[jnp.float32(1)]) == key(structure, arguments=[np.float32(1)])

    def test_shardings(self, structure):
        mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
        array = np.zeros((2, 2), np.float32)
        keys = {
            key(structure, arguments=[jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))])
            for spec in ((), ("tensor",), (None, "tensor"))
        }
        keys.add(key(structure, arguments=[jax.device_put(array, jax.devices()[0])]))
        assert len(keys) == 4

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: dataclasses.replace(CONFIG, rms_norm_eps=1e-6),
            lambda model: dataclasses.replace(CONFIG, hidden_act="silu"),
            lambda model: dataclasses.replace(CONFIG, time_step_limit=(0.0, 1.0)),
        ],
    )
    def test_of_a_config(self, structure, model, change):
        assert key(structure_of(make_model(change(model)))) != key(structure)

    def test_of_a_model(self, structure):
        scanning = make_model()
        scanning.scan_layers_enable()
        rematerialising = make_model()
        rematerialising.gradient_checkpointing_enable("layer")
        changed = make_model()
        changed.model.final_layernorm.eps = 0.5
        others = [
            *(scanning, rematerialising, changed, make_model(dtype=jnp.bfloat16), make_model(param_dtype=jnp.bfloat16)),
            *(quantize(make_model(), "int8"), quantize(make_model(), "int4")),
        ]
        for rank in (2, 3):
            others.append(make_model())
            add_lora(others[-1], LoraConfig(r=rank), rngs=nnx.Rngs(1))
        keys = [key(structure_of(other)) for other in others]
        assert len({key(structure), *keys}) == 1 + len(others)

    def test_of_settings(self, structure):
        mesh = functools.partial(Mesh, np.array(jax.devices()[:1]), axis_types=(AxisType.Auto,))
        contexts = [
            contextlib.nullcontext,
            lambda: jax.enable_x64(True),
            lambda: jax.default_matmul_precision("highest"),
            lambda: jax.default_matmul_precision("bfloat16"),
            lambda: jax.numpy_dtype_promotion("strict"),
            lambda: jax.default_device(jax.devices()[0]),
            lambda: jax.threefry_partitionable(False),
            lambda: jax.default_prng_impl("rbg"),
            lambda: jax.set_mesh(mesh(("tensor",))),
            lambda: jax.set_mesh(mesh(("data",))),
        ]
        keys = []
        for context in contexts:
            with context():
                keys.append(key(structure))
        assert len(set(keys)) == len(contexts)

    def test_of_variables(self, structure, monkeypatch):
        keys = [key(structure)]
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        keys.append(key(structure))
        monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
        keys.append(key(structure))
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--xla_cpu_enable_fast_math=false"])
        keys.append(key(structure))
        monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
        keys.append(key(structure))
        assert len(set(keys)) == 5
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
        monkeypatch.setenv("MOSAIC_GPU_CUDA_ROOT", "/set/by/an/import")
        assert key(structure) == keys[-1]

    @pytest.mark.parametrize("package", ["jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin"])
    def test_of_versions(self, structure, package, monkeypatch):
        before = key(structure)
        real = importlib.metadata.version
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: "9" if name == package else real(name))
            program_key._versions.cache_clear()
            assert key(structure) != before
        program_key._versions.cache_clear()
        assert key(structure) == before

    def test_of_the_machine(self, structure, monkeypatch):
        [device] = program_key.devices_of([])
        machine = program_key._machine(device)
        assert device.client.platform_version in machine
        before = key(structure)
        for place in range(len(machine)):
            other = (*machine[:place], "other", *machine[place + 1 :])
            with monkeypatch.context() as patch:
                patch.setattr(program_key, "_machine", functools.partial(lambda value, _: value, other))
                patch.setattr(program_key, "_check_sources", functools.partial(int))
                assert key(structure) != before

    def test_of_sources(self, structure, tmp_path):
        """The digest of a checkout and of one with a line more."""
        before = program_key._sources_digest()
        sources = dict(program_key._sources())
        assert {"models.py", "ops/ssd/api.py", "generation/programs.py"} <= sources.keys()
        changed = sources | {"models.py": sources["models.py"] + b"\n"}
        moved = {"other.py" if path == "models.py" else path: text for path, text in sources.items()}
        assert len({before, *map(program_key._digest_of, (changed, moved))}) == 3
        assert program_key._digest_of(sources) == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("jax_debug_nans", True), ("jax_disable_jit", True), ("jax_dump_ir_to", "/tmp"), ("jax_enable_pgle", True)],
    )
    def test_settings_that_ask_for_traces(self, structure, name, value):
        before = jax.config.values[name]
        jax.config.update(name, value)
        try:
            with pytest.raises(NoKeyError, match=f"{name} is "):
                key(structure)
        finally:
            jax.config.update(name, before)

    def test_several_processes(self, structure, monkeypatch):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(NoKeyError, match="several processes"):
            key(structure)

    def test_modules_of_somebody_else(self):
        class Mine(Zamba2ForCausalLM):
            pass

        with pytest.raises(NoKeyError, match="Mine is of no package whose version is known"):
            key(structure_of(Mine(CONFIG, rngs=nnx.Rngs(0))))

    def test_inside_a_trace(self, structure):
        def body(x):
            with pytest.raises(NoKeyError, match="inside a trace"):
                key(structure, arguments=[x])
            return x

        jax.vmap(body)(jnp.ones(2))

        def mapped(x):
            with pytest.raises(NoKeyError, match="a vmap or shard_map surrounds it"):
                key(structure)
            return x

        jax.vmap(mapped, axis_name="rows")(jnp.ones(2))

    @pytest.mark.parametrize(
        ("module", "name", "value"),
        [
            (projection, "platform", lambda: "gpu"),
            (projection, "apart", functools.wraps(projection.apart)(lambda *x: x)),
            (cached_attention, "BLOCK", 16),
            (Zamba2ForCausalLM, "__call__", lambda self: None),
            (mamba2, "ssd", jax.jit(lambda *x: x)),
            (mamba2, "ssd", functools.partial(lambda *x: x)),
            (mamba2, "ssd", unittest.mock.MagicMock()),
        ],
        ids=["imported", "wrapped", "constant", "method", "jitted", "partial", "mock"],
    )
    def test_a_package_changed_at_run_time(self, structure, module, name, value, monkeypatch):
        key(structure)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(NoKeyError, match=f"{name} is not what its file says"):
                key(structure)
        key(structure)

    def test_a_table_changed_at_run_time(self, structure, monkeypatch):
        """Another program where what was put in can be described, none where it cannot."""
        before = key(structure)
        monkeypatch.setitem(sharding.RULES, "mamba_heads", None)
        assert key(structure) != before
        monkeypatch.undo()
        assert key(structure) == before
        monkeypatch.setitem(activations.ACTIVATIONS, "gelu", lambda x: x)
        with pytest.raises(NoKeyError, match="lambda"):
            key(structure)

    def test_a_package_written_since(self, structure, monkeypatch):
        monkeypatch.setattr(program_key, "_IMPORTED_NS", 0)
        with pytest.raises(NoKeyError, match=r"\.py was written after it was imported"):
            key(structure)


def test_every_module_may_be_loaded(structure):
    """No function or constant of the package is taken for a change of it, whatever was imported."""
    text = (
        "import importlib, pkgutil, zamba2_jax\n"
        "from zamba2_jax import program_key\n"
        "for module in pkgutil.walk_packages(zamba2_jax.__path__, 'zamba2_jax.'):\n"
        "    if not module.name.endswith(('__main__', 'lm_eval')):\n"
        "        importlib.import_module(module.name)\n"
        "program_key._check_sources()\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True)
