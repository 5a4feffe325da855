"""Conversations and completions: the template is applied, and only what is to be learnt counts."""

import json

import numpy as np
import pytest
from tokenizers import processors

from tests.train.data.conftest import VOCAB_SIZE, make_tokenizer
from train.data import open_data

PLAIN = (
    "<s>{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "<s>{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ message['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
)
# As reasoning models have it: what was thought is left out of all turns but the last.
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] if loop.last else 'forgotten' }}\n"
    "{% endfor %}"
)

TALK = [
    {"role": "system", "content": "be quick"},
    {"role": "user", "content": "who jumps?"},
    {"role": "assistant", "content": "the fox\n "},
    {"role": "user", "content": "over whom?"},
    {"role": "assistant", "content": "the lazy dog"},
]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def open_small(path, tokenizer, **options):
    options = {"seq_len": 256, "vocab_size": VOCAB_SIZE, "cache_dir": path.parent / "cache", "pack": False} | options
    return open_data([str(path)], tokenizer, **options)


def parts_of(path, tokenizer, **options):
    """The text of the first row, and its parts that count."""
    batch = next(open_small(path, tokenizer, **options).evaluation_batches(1))
    ids, labels, segments = (batch[name][0] for name in ("input_ids", "labels", "segment_ids"))
    counted = labels != -100
    assert (labels[counted] == ids[counted]).all()
    edges = np.flatnonzero(np.diff(np.pad(counted.astype(int), 1)))
    parts = [tokenizer.decode(ids[first:last]) for first, last in edges.reshape(-1, 2)]
    return tokenizer.decode(ids[segments > 0]), parts


@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["prefixes", "generation tags"])
def test_the_assistants_turns_count_with_their_end(tmp_path, template):
    tokenizer = make_tokenizer(chat_template=template)
    text, parts = parts_of(write(tmp_path / "a.jsonl", {"messages": TALK}), tokenizer)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text.count("<s>") == 1
    assert "</s>" not in text
    assert parts == ["the fox\n <|im_end|>\n", "the lazy dog<|im_end|>\n"]


def test_both_ways_of_finding_turns_give_the_same_batches(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": TALK[:3]})
    plain, tagged = (
        next(open_small(path, make_tokenizer(chat_template=template)).evaluation_batches(2))
        for template in (PLAIN, TAGGED)
    )
    for name in plain:
        np.testing.assert_array_equal(plain[name], tagged[name])


def test_conversations_with_from_and_value_are_the_same(tmp_path):
    tokenizer = make_tokenizer(chat_template=PLAIN)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in TALK]
    parts = parts_of(write(tmp_path / "a.jsonl", {"conversations": turns}), tokenizer)
    assert parts == parts_of(write(tmp_path / "b.jsonl", {"messages": TALK}), tokenizer)


def test_the_assistant_may_speak_first(tmp_path):
    _, parts = parts_of(
        write(tmp_path / "a.jsonl", {"messages": [TALK[2], TALK[1]]}), make_tokenizer(chat_template=TAGGED)
    )
    assert parts == ["the fox\n <|im_end|>\n"]


def test_tools_and_turns_without_content_reach_the_template(tmp_path):
    template = (
        "{% for tool in tools %}[{{ tool['name'] }}]{% endfor %}{% for message in messages %}{{ message['role'] }}: "
        "{{ message['content'] or message['tool_calls'][0] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": ["leap"]}
    path = write(tmp_path / "a.jsonl", {"messages": [TALK[1], call], "tools": [{"name": "leap"}]})
    text, parts = parts_of(path, make_tokenizer(chat_template=template))
    assert text == "[leap]user: who jumps?;assistant: leap;"
    assert parts == ["leap;"]


def test_parquet_holds_conversations_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    tokenizer = make_tokenizer(chat_template=PLAIN)
    pyarrow.parquet.write_table(pyarrow.table({"messages": [TALK], "id": [1]}), tmp_path / "a.parquet")
    assert parts_of(tmp_path / "a.parquet", tokenizer) == parts_of(
        write(tmp_path / "b.jsonl", {"messages": TALK}), tokenizer
    )


def test_a_long_conversation_is_cut_and_every_counted_token_but_a_pieces_first_stays(tmp_path):
    tokenizer = make_tokenizer(chat_template=PLAIN)
    path = write(tmp_path / "a.jsonl", {"messages": TALK * 3})
    whole = next(open_small(path, tokenizer, seq_len=1024).evaluation_batches(1))
    cut = list(open_small(path, tokenizer, seq_len=20).evaluation_batches(1))
    ids, labels = (np.concatenate([batch[name][0] for batch in cut]) for name in ("input_ids", "labels"))
    length = int((whole["segment_ids"] > 0).sum())
    np.testing.assert_array_equal(ids[:length], whole["input_ids"][0, :length])
    expected = whole["labels"][0, :length].copy()
    expected[::20] = -100
    np.testing.assert_array_equal(labels[:length], expected)


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("prompt", ["who jumps?", ""])
def test_only_the_completion_counts_and_the_end(tmp_path, begin, prompt):
    tokenizer = make_tokenizer(begin=begin)
    path = write(tmp_path / "a.jsonl", {"prompt": prompt, "completion": " the fox"})
    text, parts = parts_of(path, tokenizer)
    assert text == ("<s>" if begin else "") + prompt + " the fox</s>"
    # Without anything before it, the first token cannot be predicted.
    assert parts == [" the fox</s>" if begin or prompt else " fox</s>"]


def test_a_token_of_prompt_and_completion_both_counts(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "who jumps? ", "completion": "the fox"})
    assert parts_of(path, tokenizer)[1] == [" the fox</s>"]  # the tokenizer has no space that stands alone before "the"


def test_an_end_token_of_the_tokenizers_own_counts_and_stays_the_only_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    path = write(tmp_path / "a.jsonl", {"prompt": "who jumps?", "completion": " the fox"})
    assert parts_of(path, tokenizer) == ("<s>who jumps? the fox</s>", [" the fox</s>"])


def test_the_format_can_be_chosen_where_the_fields_allow_several(tmp_path):
    tokenizer = make_tokenizer(chat_template=PLAIN)
    record = {"messages": TALK, "prompt": "who jumps?", "completion": " the fox", "text": "over"}
    path = write(tmp_path / "a.jsonl", record)
    with pytest.raises(ValueError, match="can be read as text or chat or completion; choose one as the format"):
        open_small(path, tokenizer)
    assert parts_of(path, tokenizer, format="text")[0] == "<s>over</s>"
    assert parts_of(path, tokenizer, format="completion")[1] == [" the fox</s>"]
    assert len(parts_of(path, tokenizer, format="chat")[1]) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hello"}, r"line 2: 'messages' must be a list of objects, got \"hello\""),
        ({"messages": ["hello"]}, r"line 2: 'messages' must be a list of objects, got \[\"hello\"\]"),
        ({"messages": [{"role": "assistant"}]}, r"line 2: messages\[0\] needs 'content' as a string, got null"),
        ({"messages": [{"content": "a"}]}, r"line 2: messages\[0\] needs 'role' as a string, got null"),
        ({"messages": [{"role": 1, "content": "a"}]}, r"messages\[0\] needs 'role' as a string, got 1"),
        ({"messages": TALK[:2]}, r"line 2: no message of the role 'assistant', .*; roles: system, user"),
        ({"messages": []}, r"line 2: no message of the role 'assistant', .*; roles: none"),
        ({"messages": TALK, "tools": "leap"}, r"line 2: 'tools' must be a list, got \"leap\""),
        ({"conversations": [{"from": "bard", "value": "a"}]}, r"conversations\[0\] is from 'bard'; known are human"),
        ({"text": "a"}, r"line 2 has no field 'messages'; its fields are: text"),
    ],
)
def test_a_conversation_that_does_not_do_is_refused_with_its_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", {"messages": TALK}, record)
    with pytest.raises(ValueError, match=message):
        open_small(path, make_tokenizer(chat_template=PLAIN))


def test_a_template_whose_beginnings_change_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(
        ValueError, match=r"line 1: with this chat template, the text of the first 2 messages is not the"
    ):
        open_small(path, make_tokenizer(chat_template=FORGETFUL))


def test_what_a_template_refuses_is_told_with_its_line(tmp_path):
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + PLAIN
    path = write(tmp_path / "a.jsonl", {"messages": TALK[1:]}, {"messages": TALK})
    with pytest.raises(ValueError, match="line 2: the chat template refuses this conversation: the user must begin"):
        open_small(path, make_tokenizer(chat_template=template))
    path = write(tmp_path / "b.jsonl", {"messages": [TALK[1], {"role": "assistant", "tool_calls": [1]}]})
    with pytest.raises(ValueError, match="line 1: the chat template refuses this conversation"):
        open_small(
            path, make_tokenizer(chat_template="{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
        )


def test_an_assistant_of_whom_nothing_is_rendered_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": TALK})
    silent = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="line 1: the assistant's messages hold no token"):
        open_small(path, make_tokenizer(chat_template=silent))


def test_conversations_need_a_template(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which conversations need"):
        open_small(path, tokenizer)


def test_an_empty_completion_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": ""})
    with pytest.raises(ValueError, match="line 1: the completion is empty"):
        open_small(path, tokenizer)
    path = write(tmp_path / "b.jsonl", {"prompt": "a", "completion": ["b"]})
    with pytest.raises(ValueError, match=r"line 1: 'completion' must be a string, got \[\"b\"\]"):
        open_small(path, tokenizer)
