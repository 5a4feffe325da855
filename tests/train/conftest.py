"""A tiny model, tokenizer and text, and ways to train on them: here, or in processes of their own."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train import cli
from zamba2_jax import Zamba2Config

# fmt: off
WORDS = (
    "the", "a", "cat", "dog", "sat", "on", "mat", "house", "red", "blue", "green", "ran", "fast", "slow", "and", "then",
    "he", "she", "it", "was", "good", "bad",
)
# fmt: on
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CONFIG = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layers_block_type": ("mamba", "hybrid"),
    "mamba_d_state": 8,
    "n_mamba_heads": 8,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "adapter_rank": 2,
    "chunk_size": 16,
    "max_position_embeddings": 128,
    "use_mem_rope": True,
}


def make_tokenizer(words=WORDS):
    """A word a token."""
    names = [*SPECIAL, *words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_texts(path, count, seed=0):
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 40)))}) + "\n")


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Inputs of runs, and a place for their outputs."""

    path: Path

    def arguments(self, command, output, **options):
        """The command line of a run that takes a second; `options` change or add."""
        values = {
            "model": self.path / "model" / "config.json",
            "tokenizer": self.path / "model",
            "data": self.path / "train.jsonl",
            "data_cache": self.path / "cache",
            "output": output,
            "steps": 6,
            "batch_size": 4,
            "seq_len": 32,
            "save_every": 3,
            "learning_rate": 1e-2,
            "dtype": "float32",
            "mesh": "auto",
        } | options
        words = [command]
        for name, value in values.items():
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                words += ["--" + name.replace("_", "-"), *map(str, values)]
        return words

    def train(self, command, output, **options):
        """In this process; the exit code."""
        return cli.main(self.arguments(command, output, **options))

    def start(self, words, *, devices=1, largest_file="unlimited"):
        """In a process of its own, which may write files of so many KiB."""
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(self.path / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "-", sys.executable, "-m", "train", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish(process, code=0):
    """Waits for a process; its output, with the expected exit code."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-3000:]
    return output


def wait_until(condition, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0][-3000:])
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(run, name="metrics.jsonl"):
    """The complete lines of a file, which may be in the making."""
    path = run / name
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def losses(run):
    found = lines(run)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    Zamba2Config(**CONFIG).save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    write_texts(path / "train.jsonl", 60)
    write_texts(path / "heldout.jsonl", 7, seed=1)
    # Runs of one shape compile once, in whatever process.
    before = {name: getattr(jax.config, name) for name in _CACHE}
    for name, value in (_CACHE | {"jax_compilation_cache_dir": str(path / "programs")}).items():
        jax.config.update(name, value)
    yield Workspace(path)
    for name, value in before.items():
        jax.config.update(name, value)


_CACHE = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0}


@pytest.fixture(scope="session")
def finished(workspace):
    """A run of 12 steps, with everything on."""
    output = workspace.path / "finished"
    code = workspace.train(
        "pretrain",
        output,
        steps=12,
        eval_data=workspace.path / "heldout.jsonl",
        sample_every=6,
        sample_prompts=("the cat", ""),
        sample_tokens=4,
        keep_best=1,
    )
    assert code == 0
    return output
