"""Compiled programs on disk: what a second process does without tracing, and what happens to files that are no good."""

import functools
import json
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from tests import executable_cases
from zamba2_jax import executables, program_key
from zamba2_jax.executables import FOLDER, jit_kept
from zamba2_jax.generation import programs

SEED, STEP = np.uint32(5), np.int32(2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept, whatever they took to compile; nothing has been complained of yet."""
    before = {name: getattr(jax.config, name) for name in _SETTINGS}
    for name, value in (_SETTINGS | {"jax_compilation_cache_dir": str(tmp_path)}).items():
        jax.config.update(name, value)
    monkeypatch.setattr(executables, "_COMPLAINTS", set())
    monkeypatch.setattr(program_key, "_IMPORTED_NS", sys.maxsize)  # whoever edits files meanwhile
    yield tmp_path / FOLDER
    for name, value in before.items():
        jax.config.update(name, value)


_SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_compilation_cache_max_size": -1,
    "jax_enable_compilation_cache": True,
    "jax_raise_persistent_cache_errors": False,
}


def make_program():
    """One that has nothing in memory yet."""
    return jit_kept(programs.gumbel_noise, static_argnames=("shape",))


@functools.cache
def expected():
    return np.asarray(jax.jit(programs.gumbel_noise, static_argnames=("shape",))(SEED, STEP, shape=(2, 3)))


def check(program):
    np.testing.assert_array_equal(program(SEED, STEP, shape=(2, 3)), expected())


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def loads(caplog):
    """How many programs were loaded so far, as a function."""
    caplog.set_level(logging.INFO, logger=executables.__name__)
    return lambda: sum(record.message.startswith("loaded ") for record in caplog.records)


@pytest.fixture
def refusals(caplog):
    """What was left to jit so far, and why, as a function."""
    caplog.set_level(logging.INFO, logger=executables.__name__)
    return lambda: [record.message for record in caplog.records if "is left to jit" in record.message]


class TestTwoProcesses:
    @pytest.fixture(scope="class")
    def found(self, tmp_path_factory):
        """What both found, and the files' names. They hash differently, as any two processes may."""
        directory = tmp_path_factory.mktemp("programs")

        def run(seed):
            environment = os.environ | {
                "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
                "JAX_COMPILATION_CACHE_DIR": str(directory),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONHASHSEED": seed,
            }
            command = [sys.executable, "-m", executable_cases.__name__]
            root = Path(__file__).parents[1]
            finished = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
            assert finished.returncode == 0, finished.stderr
            return json.loads(finished.stdout)

        first = run("1")
        kept = files(directory / FOLDER)
        second = run("2")
        assert files(directory / FOLDER) == kept
        return first, second, kept

    def test_the_second_traces_nothing(self, found):
        first, second, kept = found
        # Each compiled under a name of its own, for JAX's cache not to know it.
        names = [re.sub("_[0-9a-f]{8}$", "", name) for name in first["traced"]]
        # For one device, for another, and for both. A stream's second call is of the program of its first. Who gets the
        # cache back has a loop of its own.
        wanted = ["begin"] * 3 + ["decode"] * 4 + ["prefill"] * 3
        assert sorted(name for name in names if name in wanted) == wanted
        assert [name.partition("-")[0] for name in kept] == wanted
        assert not set(second["traced"]) & set(wanted)
        assert not set(second["traced"]) & set(first["traced"])
        assert (first["loaded"], second["loaded"]) == (0, len(wanted))

    def test_tokens_are_the_same(self, found):
        first, second, _ = found
        compared = ("here", "elsewhere", "on both", "streamed", "consumed")
        assert [first[name] for name in compared] == [second[name] for name in compared]
        assert first["here"][0] == first["elsewhere"][0] == first["on both"][0] == first["streamed"]
        model = executable_cases.make_model()
        assert model.generate(executable_cases.PROMPT, **executable_cases.CALL).tolist() == first["streamed"]

    def test_a_program_runs_where_the_weights_are(self, found):
        for run in found[:2]:
            assert [run[name][1] for name in ("here", "elsewhere", "on both")] == [[0], [1], [0, 1]]

    def test_the_cache_is_donated(self, found):
        for run in found[:2]:
            assert run["consumed"]
            assert all(run["consumed"])


class TestSettings:
    def test_without_a_directory_nothing_is_written(self, folder):
        jax.config.update("jax_compilation_cache_dir", None)
        check(make_program())
        assert not folder.exists()

    @pytest.mark.parametrize(
        ("name", "value"), [("jax_enable_compilation_cache", False), ("jax_compilation_cache_max_size", 0)]
    )
    def test_a_cache_switched_off(self, folder, name, value):
        jax.config.update(name, value)
        check(make_program())
        assert not folder.exists()

    def test_a_directory_elsewhere(self, folder, refusals):
        jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
        assert make_program()._find((SEED, STEP), {"shape": (2, 3)}, (), None, []) is None
        assert refusals() == ["gumbel_noise is left to jit: gs://bucket/programs is no local directory"]

    def test_a_folder_that_anyone_may_write_to(self, folder, refusals, loads):
        """To load a program is to run what is in its file."""
        check(make_program())
        folder.chmod(0o777)
        check(make_program())
        assert loads() == 0
        assert refusals() == [f"gumbel_noise is left to jit: {folder} is another user's, or anyone may write to it"]

    def test_what_compiles_quickly_is_not_kept(self, folder):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1000)
        check(make_program())
        assert files(folder) == []

    def test_the_oldest_make_room(self, folder, loads):
        program = make_program()
        check(program)
        [oldest] = files(folder)
        os.utime(folder / oldest, (1, 1))
        program(SEED, STEP, shape=(2, 4))
        [other] = set(files(folder)) - {oldest}
        os.utime(folder / other, (2, 2))
        jax.config.update("jax_compilation_cache_max_size", int(2.5 * (folder / oldest).stat().st_size))
        check(make_program())  # used, and so no longer the oldest
        assert loads() == 1
        program(SEED, STEP, shape=(2, 5))
        assert oldest in files(folder)
        assert other not in files(folder)
        assert len(files(folder)) == 2

    def test_jax_keeps_nothing_of_it(self, folder):
        check(make_program())
        assert not list(folder.parent.glob("*gumbel*"))


def test_what_sets_kernels_up_is_imported_before_a_program_is_loaded(folder, loads, monkeypatch):
    [name] = executables._SETTING_UP
    check(make_program())  # compiled without it
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    check(make_program())
    assert loads() == 1
    (folder / files(folder)[0]).unlink()
    check(make_program())  # with it
    monkeypatch.delitem(sys.modules, name)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(executables.importlib, "import_module", asked.append)
        check(make_program())
    assert asked == [name]
    assert loads() == 2


class TestInMemory:
    def test_a_program_is_found_once(self, folder, loads):
        program = make_program()
        for _ in range(3):
            check(program)
        program(SEED, jnp.int32(2), shape=(2, 3))  # an array of JAX's instead of NumPy's: the same program
        assert len(program._of_key) == len(files(folder)) == 1
        assert loads() == 0
        again = make_program()
        check(again)
        check(again)
        assert loads() == 1

    def test_arguments_by_name(self, folder):
        program = make_program()
        np.testing.assert_array_equal(program(SEED, shape=(2, 3), step=STEP), expected())
        np.testing.assert_array_equal(program(SEED, STEP, (2, 3)), expected())

    def test_cleared_with_jax(self, folder, loads):
        program = make_program()
        check(program)
        assert program._cache_size() >= 1
        jax.clear_caches()
        assert program._cache_size() == 0
        check(program)
        assert loads() == 1

    def test_inside_a_trace_it_is_left_to_jit(self, folder):
        program = make_program()
        check(program)
        traced = jax.jit(lambda seed: program(seed, STEP, shape=(2, 3)))(SEED)
        np.testing.assert_array_equal(traced, expected())
        assert len(program._of_key) == len(files(folder)) == 1
        many = jax.vmap(lambda seed: program(seed, STEP, shape=(2, 3)))(jnp.array([SEED, SEED]))
        np.testing.assert_array_equal(many, np.stack([expected()] * 2))

    def test_of_other_types_it_is_another_program(self, folder):
        program = make_program()
        check(program)
        with jax.enable_x64(True):
            wide = program(SEED, np.int64(2), shape=(2, 3))
        assert len(files(folder)) == 2
        np.testing.assert_array_equal(wide, expected())

    def test_a_deleted_argument(self, folder):
        program = make_program()
        step = jnp.int32(2)
        program(SEED, step, shape=(2, 3))
        step.delete()
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            program(SEED, step, shape=(2, 3))

    def test_somebody_elses_function(self):
        with pytest.raises(ValueError, match="jit_kept knows this package's sources alone"):
            jit_kept(make_program, static_argnames=())


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def of_another_program(content):
    return content.replace(b" 2 ", b" 2 0", 1)


def of_nonsense(content):
    key = content.split(b" ")[3].decode()
    body = b"nonsense"
    return executables._header(key, body) + b"\n" + body


class TestBadFiles:
    @pytest.mark.parametrize(
        "damage", [truncate, flip, of_another_program, of_nonsense, lambda _: b""], ids=lambda damage: damage.__name__
    )
    def test_it_is_named_and_replaced(self, folder, loads, damage):
        check(make_program())
        [name] = files(folder)
        path = folder / name
        path.write_bytes(damage(path.read_bytes()))
        with pytest.warns(UserWarning, match=f"compiled program {re.escape(str(path))} cannot be used"):
            check(make_program())
        assert loads() == 0
        assert files(folder) == [name]
        check(make_program())
        assert loads() == 1

    def test_jax_may_be_told_to_raise(self, folder):
        check(make_program())
        [name] = files(folder)
        (folder / name).write_bytes(b"")
        jax.config.update("jax_raise_persistent_cache_errors", True)
        with pytest.raises(ValueError, match="damaged"):
            make_program()(SEED, STEP, shape=(2, 3))

    def test_no_folder_can_be_made(self, folder):
        folder.write_bytes(b"a file")
        with pytest.warns(UserWarning, match="cannot be kept in .*zamba2_jax: "):
            check(make_program())
        check(make_program())  # a second warning would be an error here
        assert folder.read_bytes() == b"a file"

    def test_a_full_disk(self, folder, monkeypatch):
        def fill(path, content):
            with path.open("wb") as file:
                file.write(content[:100])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", fill)
            with pytest.warns(UserWarning, match="cannot be kept in .*: No space left on device"):
                check(make_program())
        assert files(folder) == []

    def test_a_backend_that_cannot_serialise(self, folder, monkeypatch, refusals):
        def refuse(program):
            raise ValueError("Compilation does not support serialization")

        with monkeypatch.context() as patch:
            patch.setattr(serialize_executable, "serialize", refuse)
            with pytest.warns(UserWarning, match="cannot be kept on cpu: Compilation does not support"):
                check(make_program())
        # It is remembered: the next process goes to jit, whose programs JAX may keep, at once.
        check(make_program())
        assert "could not be serialised" in refusals()[0]
