"""The evaluation harness's adapter against the harness's own `hf` model, on "demo" and local files."""

import json
import sys
import warnings

import numpy as np
import pytest
import transformers
import yaml

import zamba2_jax
from bench.oracle import without_dt_clamp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

from zamba2_jax import lm_eval as adapter
from zamba2_jax.lm_eval import Zamba2LM, main

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its dependencies'
WORDS = ["import", "self", "return", "None", "def", "class", "the", "value", "if", "not", "raise", "len(x)"]
WINDOW = 64


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(zamba2_jax.demo_path())


@pytest.fixture(scope="module")
def model():
    return zamba2_jax.Zamba2ForCausalLM.from_pretrained("demo", dtype="float32")


@pytest.fixture(scope="module")
def sides(model, tokenizer):
    judge = transformers.Zamba2ForCausalLM.from_pretrained(zamba2_jax.demo_path(), dtype="float32").eval()
    without_dt_clamp(judge)
    theirs = HFLM(pretrained=judge, tokenizer=tokenizer, batch_size=3, max_length=WINDOW, device="cpu")
    return Zamba2LM(model, tokenizer, batch_size=3, max_length=WINDOW), theirs


def sentence(rng, words):
    return " ".join(rng.choice(WORDS, words))


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=index) for index, args in enumerate(arguments)]


def test_loglikelihood(sides):
    """Contexts of every length: empty, beyond the window, ending in a space; continuations of one token and of many."""
    rng = np.random.default_rng(0)
    pairs = [(sentence(rng, count), " " + sentence(rng, 1 + count % 4)) for count in (1, 2, 3, 5, 8, 20)]
    pairs += [("", "import os"), ("def ", "run"), ("def f", "(self):"), (pairs[0][0], " x")]
    ours, theirs = (side.loglikelihood(requests("loglikelihood", pairs)) for side in sides)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in theirs], atol=1e-4)
    assert [exact for _, exact in ours] == [exact for _, exact in theirs]


def test_whether_a_continuation_is_the_greedy_one(sides):
    ours, _ = sides
    prompt = "def __init__(self"
    (text,) = ours.generate_until(requests("generate_until", [(prompt, {"until": [], "max_gen_toks": 3})]))
    prompt_ids = ours.tok_encode(prompt)
    assert ours.tok_encode(prompt + text)[: len(prompt_ids)] == prompt_ids  # so that the continuation is these 3 tokens
    ask = requests("loglikelihood", [(prompt, text), (prompt, " zebra")])
    for side in sides:
        assert [exact for _, exact in side.loglikelihood(ask)] == [True, False]


def test_loglikelihood_rolling_over_several_windows(sides):
    rng = np.random.default_rng(1)
    texts = [(sentence(rng, count),) for count in (1, 4, 30, 250)]
    assert len(sides[0].tok_encode(texts[-1][0])) > 3 * WINDOW
    ours, theirs = (side.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for side in sides)
    # The longest is a float32 sum of hundreds of log-probabilities, on either side.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("until", [[], ["e", "zz"]], ids=str)
def test_generate_until(sides, until):
    rng = np.random.default_rng(2)
    options = {"until": until, "max_gen_toks": 12, "do_sample": False}
    prompts = [(sentence(rng, count), dict(options)) for count in (1, 2, 5, 6, 30)]  # the last is cut on the left
    ours, theirs = (side.generate_until(requests("generate_until", prompts)) for side in sides)
    assert ours == theirs
    if until:
        assert not any("e" in text for text in ours)


def test_a_few_shapes_serve_all_lengths(sides):
    widths = sorted({adapter._bucket(length) for length in range(1, 4097)})
    assert len(widths) < 32
    assert all(adapter._bucket(length) >= length for length in range(1, 4097))
    assert all(adapter._bucket(length) <= max(32, length * 1.25 + 1) for length in range(1, 4097))
    before = adapter._score._cache_size()
    texts = [("x" * length, "yes") for length in range(1, 25)]
    sides[0].loglikelihood(requests("loglikelihood", texts))
    assert adapter._score._cache_size() <= before + 1


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task of each kind, from files."""
    place = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(3)
    docs = [
        {"question": sentence(rng, 3), "choices": [sentence(rng, 2), sentence(rng, 1)], "label": index % 2}
        for index in range(5)
    ]
    (place / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "docs.jsonl")}},
        "test_split": "test",
    }
    kinds = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
            "metric_list": [{"metric": "acc"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{question}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, kind in kinds.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"local_{name}", **common, **kind}))
    return place


def test_whole_tasks(sides, tasks, tmp_path):
    names = ["local_choose", "local_read", "local_write"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options = {"tasks": names, "task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    ours, theirs = (lm_eval.simple_evaluate(model=side, **options) for side in sides)
    for name in names:
        metrics = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
        assert metrics
        for metric, value in metrics.items():
            assert ours["results"][name][metric] == pytest.approx(value, rel=1e-5, abs=1e-4), metric
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert len(mine["resps"]) == len(other["resps"])
    cached = lm_eval.simple_evaluate(model=sides[0], use_cache=str(tmp_path / "cache"), **options)
    again = lm_eval.simple_evaluate(model=sides[0], use_cache=str(tmp_path / "cache"), **options)
    assert cached["results"] == again["results"] == ours["results"]


def test_the_command_line(tasks, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    main(
        [
            *("run", "--model", "zamba2_jax", "--model_args", "pretrained=demo,dtype=float32"),
            *("--tasks", "local_choose", "--include_path", str(tasks), "--batch_size", "2"),
        ]
    )
    assert "|local_choose|" in capsys.readouterr().out


def test_messages(model, tokenizer):
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 'auto'"):
        Zamba2LM(model, tokenizer, batch_size="auto")
    with pytest.raises(ValueError, match="tokenizer must be given with a model that is loaded already"):
        Zamba2LM(model)
    small = Zamba2LM(model, tokenizer, max_length=16)
    with pytest.raises(ValueError, match="max_gen_toks=16 leaves no room for a prompt in max_length=16"):
        small.generate_until(requests("generate_until", [("a", {"max_gen_toks": 16})]))
