"""The README's Python, executed as it stands on a small checkpoint in place of the published one."""

import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from bench.oracle import pair, tokens

README = Path(__file__).parent.parent / "README.md"
NAME = "Zyphra/Zamba2-1.2B"


@pytest.fixture
def checkpoint(oracle_dir):
    models = pair(oracle_dir, "1.2B", vocab_size=128)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        word: 3 + i for i, word in enumerate(["What", "factors", "the", "fall", "of"])
    }
    words |= {f"w{index}": index for index in range(len(words), 128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(models.path)
    return models.path


def test_every_python_block_runs(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    ids = tokens(128, 2, 6)
    names = {"input_ids": ids, "mask": np.ones_like(ids), "labels": ids, "more_ids": ids[:, :2]}
    for block in blocks:
        assert NAME in block
        exec(block.replace(NAME, str(checkpoint)), names)
    printed = capsys.readouterr().out
    assert printed.startswith("What factors")
    assert len(printed.split()) > 10  # the prompt's words and new ones
    assert names["outputs"].past_key_values.get_seq_length() == 8
    assert transformers.Zamba2ForCausalLM.from_pretrained("for-pytorch").num_parameters() > 0
