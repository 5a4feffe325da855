"""`python -m zamba2_jax`, in process: what goes to stdout, what to stderr, and the exit code."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bench.oracle import layer_types, pair
from zamba2_jax import cli, quantize
from zamba2_jax.cli import main

PROMPT = "w5 w6 w7"


@pytest.fixture(scope="module")
def checkpoint(oracle_dir):
    """A small model with a tokenizer of a word per token beside it: "w5" is 5."""
    models = pair(
        oracle_dir, "1.2B", num_hidden_layers=3, layers_block_type=layer_types(3, (1,)), max_position_embeddings=4096
    )
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 131)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(models.path)
    return models


@pytest.fixture(scope="module")
def expected(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)

    def text(**options):
        output = checkpoint.jax.generate(np.array([[5, 6, 7]]), max_new_tokens=8, **options)
        return tokenizer.batch_decode(output[:, 3:], skip_special_tokens=True)

    return text


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(capsys, checkpoint, *arguments):
    return run(capsys, "generate", "--model", checkpoint.path, "--max-new-tokens", 8, *arguments)


def test_generate_writes_the_new_text_only(capsys, checkpoint, expected):
    code, out, err = generate(capsys, checkpoint, "--prompt", PROMPT)
    assert (code, err) == (0, "")
    assert out == expected()[0] + "\n"
    assert generate(capsys, checkpoint, "--prompt", PROMPT, "--no-stream") == (0, out, "")


def test_prompts_from_files_and_standard_input(capsys, checkpoint, expected, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    _, out, _ = generate(capsys, checkpoint, "--prompt-file", tmp_path / "prompt.txt")
    assert out == expected()[0] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert generate(capsys, checkpoint, "--prompt-file", "-")[1] == out


def test_quantized_weights(capsys, checkpoint):
    code, out, err = generate(capsys, checkpoint, "--prompt", PROMPT, "--quantize", "int8", "--stats")
    assert code == 0
    assert "float32, int8 weights" in err
    small = quantize(checkpoint.jax, "int8")
    tokens = small.generate(np.array([[5, 6, 7]]), max_new_tokens=8)
    assert out == AutoTokenizer.from_pretrained(checkpoint.path).decode(tokens[0, 3:], skip_special_tokens=True) + "\n"
    code, out, err = generate(capsys, checkpoint, "--prompt", PROMPT, "--quantize", "int3")
    assert (code, out) == (2, "")
    assert "--quantize" in err


def test_sampling_options_imply_sampling(capsys, checkpoint, expected):
    arguments = ("--prompt", PROMPT, "--temperature", 2, "--seed", 4)
    _, out, _ = generate(capsys, checkpoint, *arguments)
    assert out == expected(do_sample=True, temperature=2.0, seed=4)[0] + "\n"
    assert out != expected()[0] + "\n"


@pytest.fixture
def settings(checkpoint):
    """Writes the checkpoint's generation_config.json, for one test."""
    path = checkpoint.path / "generation_config.json"
    before = path.read_text() if path.exists() else None
    yield lambda **values: path.write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0} | values))
    if before is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(before)


def test_what_is_not_given_stays_with_the_checkpoint(capsys, checkpoint, expected, settings):
    def continuation(*arguments):
        code, out, err = run(capsys, "generate", "--model", checkpoint.path, "--prompt", PROMPT, *arguments)
        assert (code, err) == (0, "")
        return out

    settings(max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert continuation() == "\n---\n".join(expected(num_beams=3, num_return_sequences=2)) + "\n"
    assert continuation("--num-beams", 1, "--num-return-sequences", 1) == expected()[0] + "\n"
    settings(max_length=11, do_sample=True, temperature=2.0)
    assert continuation("--seed", 4) == expected(do_sample=True, temperature=2.0, seed=4)[0] + "\n"
    assert continuation("--no-do-sample") == expected()[0] + "\n"
    settings(max_new_tokens=3)
    assert continuation("--max-length", 11) == expected()[0] + "\n"  # what is given goes before the file


@pytest.mark.parametrize(
    ("arguments", "settings", "lengths"),
    [
        ([], {}, {"max_new_tokens": 128}),
        ([], {"max_new_tokens": None}, {"max_new_tokens": 128}),
        ([], {"max_new_tokens": 7}, {}),
        ([], {"max_length": 7}, {}),
        (["--max-new-tokens", "5"], {"max_new_tokens": 7}, {"max_new_tokens": 5}),
        (["--max-length", "5"], {"max_new_tokens": 7}, {"max_length": 5, "max_new_tokens": None}),
        (["--do-sample"], {"max_length": 7}, {"do_sample": True}),
        (["--no-do-sample", "--top-k", "3"], {"max_length": 7}, {"do_sample": False, "top_k": 3}),
    ],
    ids=str,
)
def test_arguments_of_generate(arguments, settings, lengths):
    options = cli._parser().parse_args(["generate", "--model", "m", "--prompt", "p", *arguments])
    assert cli._generation_options(options, settings) == lengths


def test_beams_and_several_results(capsys, checkpoint, expected):
    code, out, err = generate(
        capsys,
        checkpoint,
        *("--prompt", PROMPT, "--num-beams", 3, "--num-return-sequences", 2),
        *("--early-stopping", "never", "--length-penalty", 0.5),
    )
    assert (code, err) == (0, "")
    options = {"num_beams": 3, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 0.5}
    assert out == "\n---\n".join(expected(**options)) + "\n"


def test_stats_go_to_stderr(capsys, checkpoint, expected):
    code, out, err = generate(capsys, checkpoint, "--prompt", PROMPT, "--stats")
    assert (code, out) == (0, expected()[0] + "\n")
    assert "loaded in" in err
    assert "prompt 3 tokens, 1 x 8 new tokens" in err
    assert "tokens/s" in err


def test_info(capsys, checkpoint):
    code, out, err = run(capsys, "info", "--model", checkpoint.path)
    config = checkpoint.jax.config
    assert (code, err) == (0, "")
    for expected in (
        "mamba, hybrid, mamba",
        f"{config.num_parameters():,}",
        f"{config.num_parameters_applied_per_token():,}",
        "Hugging Face",
        "Zamba2ForCausalLM",
        "float32",
        "eos_token_id",
        "jax",
    ):
        assert expected in out
    # One hybrid layer: keys and values of 1024 slots, 64 wide, float32.
    assert "0.5 MB" in out


def test_info_takes_another_dtype(capsys, checkpoint):
    _, out, _ = run(capsys, "info", "--model", checkpoint.path, "--dtype", "bfloat16")
    assert "keys and values per 1024 tokens, bfloat16" in out


@pytest.mark.parametrize("command", [["--help"], ["generate", "--help"], ["info", "--help"]], ids=str)
def test_help_has_an_example(capsys, command):
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "--model Zyphra/Zamba2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "error: the following arguments are required: --model"),
        (["generate", "--model", "m", "--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
        (["generate", "--model", "./nowhere", "--prompt", "a"], "error: There is no directory ./nowhere"),
        (["generate", "--model", "CHECKPOINT", "--prompt", ""], "error: --prompt is empty; give some text"),
        (["generate", "--model", "CHECKPOINT", "--prompt-file", "none.txt"], "--prompt-file none.txt does not exist"),
        (
            ["generate", "--model", "CHECKPOINT", "--prompt", "w5", "--max-new-tokens", "0"],
            "error: max_new_tokens must be",
        ),
        (["generate", "--model", "CHECKPOINT", "--prompt", "w5", "--top-p", "2"], "error: top_p must be above 0"),
        (["info", "--model", "EMPTY"], "config.json"),
        (
            ["generate", "--model", "m", "--prompt", "a", "--max-length", "9", "--max-new-tokens", "9"],
            "not allowed with",
        ),
        (["sing"], "invalid choice: 'sing'"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_code_2(capsys, checkpoint, tmp_path, arguments, message):
    places = {"CHECKPOINT": str(checkpoint.path), "EMPTY": str(tmp_path)}
    code, out, err = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "zamba2_jax", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
