"""Conversations: what a turn reads, what templates may do, files, and the terminal through a pipe and a pty."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.oracle import layer_types, pair
from zamba2_jax.chat import ChatSession
from zamba2_jax.cli import main

LETTERS = [chr(code) for code in range(32, 127)]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Keeps the latest message only: what it rendered before is no beginning of what it renders now.
FORGETFUL = "{% for m in messages[-1:] %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}[assistant]"


def make_tokenizer():
    """A token per printable letter, one for the line's end, and marks of roles; "ab" is one token too."""
    words = ["<pad>", "<s>", "[end]", "[system]", "[user]", "[assistant]", *LETTERS, "ab"]
    words += [f"<{index}>" for index in range(131 - len(words))]
    tokens = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: index for index, word in enumerate(words)}, [("a", "b")], unk_token="<pad>")
    )
    tokens.decoder = decoders.Fuse()
    tokens.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\n"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="[end]",
        additional_special_tokens=["[system]", "[user]", "[assistant]"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def models(oracle_dir):
    """Two shared blocks with adapters and RoPE, and the tokenizer beside the weights."""
    options = {"use_shared_attention_adapter": True, "max_position_embeddings": 4096, "eos_token_id": 2}
    models = pair(oracle_dir, "7B", num_hidden_layers=2, layers_block_type=layer_types(2, (0, 1)), **options)
    make_tokenizer().save_pretrained(models.path)
    return models


@pytest.fixture
def session(models):
    return ChatSession(models.jax, make_tokenizer(), max_new_tokens=9)


def from_scratch(model, session, ids):
    return model.generate(np.array([ids]), max_new_tokens=9)[0, len(ids) :].tolist()


def test_a_turn_reads_its_own_tokens_only(models, session):
    tokenizer = session.tokenizer
    answers = [session.send("hello")]
    first = session.last_turn
    assert first.prefilled_tokens == first.text_tokens == len("hello") + 3  # [user], [end], [assistant]
    for text in ("who?", "and then what?"):
        before = list(session._ids)
        held = int(session._cache.next_position[0])
        pieces = []
        answers.append(session.send(text, on_text=pieces.append))
        turn = session.last_turn
        # The message and its marks, the answer's end before them, and the answer's last token where it was cut short.
        assert turn.prefilled_tokens == len(text) + 4 + (len(before) - held)
        assert turn.text_tokens > turn.prefilled_tokens
        assert "".join(pieces) == answers[-1]
        # The judge reads the whole text again.
        ids = before + tokenizer(f"[end][user]{text}[end][assistant]", add_special_tokens=False)["input_ids"]
        expected = from_scratch(models.jax, session, ids)
        assert answers[-1] == tokenizer.decode(expected, skip_special_tokens=True)
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3
    assert [message["content"] for message in session.messages[1::2]] == answers


def test_a_template_that_changes_the_past_is_read_again(models):
    session = ChatSession(models.jax, make_tokenizer(), template=FORGETFUL, max_new_tokens=3)
    session.send("one")
    with pytest.warns(UserWarning, match="rendered earlier turns differently.*whole conversation is read"):
        session.send("two")
    assert session.last_turn.prefilled_tokens == session.last_turn.text_tokens == 6
    session.send("three")  # no second warning: it would be an error here
    assert session.last_turn.prefilled_tokens == session.last_turn.text_tokens == 8


def test_an_answer_whose_tokens_the_tokenizer_would_not_choose(models):
    """ "ab" said as "a" and "b": the text is the same, and the cache is used all the same."""
    session = ChatSession(models.jax, make_tokenizer(), max_new_tokens=3)
    session.send("hi")
    tokens = session.tokenizer.convert_tokens_to_ids(["a", "b"])
    held = int(session._cache.next_position[0])
    answer = session.messages[-1]["content"]
    session._ids[held - 2 : held] = tokens
    text = session.tokenizer.decode(session._ids, skip_special_tokens=False)
    session.messages[-1]["content"] = text[text.index("[assistant]") + len("[assistant]") :]
    session._text = session._text.removesuffix(answer) + session.messages[-1]["content"]
    session.send("yo")
    assert session.last_turn.prefilled_tokens <= len("yo") + 5


def test_a_stopped_answer_counts_as_said(models, session):
    free = ChatSession(models.jax, make_tokenizer(), max_new_tokens=9).send("hello")
    asked = iter([False, True])
    answer = session.send("hello", should_stop=lambda: next(asked))
    assert session.last_turn.interrupted
    assert session.last_turn.new_tokens < 9
    assert free.startswith(answer)
    session.send("go on")
    assert session.last_turn.prefilled_tokens == len("go on") + 5


def test_saved_and_loaded(models, session, tmp_path):
    session.send("hello")
    session.save(tmp_path / "talk")
    expected = session.send("more")
    other = ChatSession(models.jax, make_tokenizer(), max_new_tokens=9)
    other.load(tmp_path / "talk")
    assert len(other.messages) == 2
    assert other.send("more") == expected
    assert other.last_turn.prefilled_tokens == session.last_turn.prefilled_tokens
    other.reset()
    assert other.messages == []
    with pytest.raises(ValueError, match="there is no conversation to save yet"):
        other.save(tmp_path / "none")
    session._cache.save(tmp_path / "bare", models.jax)
    with pytest.raises(ValueError, match="holds a cache without a conversation"):
        other.load(tmp_path / "bare")


def test_messages(models):
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template.*--template FILE"):
        ChatSession(models.jax, bare)
    with pytest.raises(ValueError, match=r"num_beams must be 1 in a conversation, .* got 3"):
        ChatSession(models.jax, make_tokenizer(), num_beams=3)
    with pytest.raises(ValueError, match="max_new_token in the arguments of generate is not an option"):
        ChatSession(models.jax, make_tokenizer(), max_new_token=3)
    with pytest.raises(ValueError, match="the message is empty"):
        ChatSession(models.jax, make_tokenizer()).send(" ")
    picky = ChatSession(models.jax, make_tokenizer(), template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="the chat template does not take this conversation: no system role"):
        picky.send("hello")


# ---- the terminal ----


def test_commands_through_a_pipe(models, session, tmp_path, monkeypatch, capsys):
    lines = [
        "hello",
        "",
        "/help",
        f"/save {tmp_path / 'talk'}",
        "/reset",
        f"/load {tmp_path / 'talk'}",
        "/sing",
        "/save",
    ]
    with (tmp_path / "in").open("w+") as file:
        file.write("\n".join([*lines, f"/load {tmp_path / 'none'}", "/exit", "never said"]))
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", file)
        options = ["--max-new-tokens", "9", "--verbose", "--system", "be brief"]
        assert main(["chat", "--model", str(models.path), *options]) == 0
    out, err = capsys.readouterr()
    expected = ChatSession(models.jax, make_tokenizer(), system="be brief", max_new_tokens=9).send("hello")
    assert out == expected + "\n"
    for text in ("/reset       forget", "saved.", "forgotten.", "loaded: 3 messages", "error: /sing is no command"):
        assert text in err
    assert "error: /save needs a file" in err
    assert "error: There is no file" in err
    assert "read 18 of 18 tokens, wrote" in err


def test_errors_before_the_conversation(models, capsys, tmp_path):
    assert main(["chat", "--model", str(models.path), "--template", "none.jinja"]) == 2
    assert "--template none.jinja does not exist" in capsys.readouterr().err
    assert main(["chat", "--model", str(models.path), "--load", str(tmp_path / "none")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_program(models):
    """In a terminal, as typed. The answer is long: only an interrupt ends it soon."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "zamba2_jax", "chat", "--model", str(models.path), "--max-new-tokens", "3000"]
    process = subprocess.Popen(
        [*command, "--min-new-tokens", "2900", "--verbose"],
        stdin=child,
        stdout=child,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    os.close(child)
    try:
        assert process.stderr.readline().startswith("Type a message.")
        os.write(parent, b"hello\n")
        wait_for_output(parent, process, lambda output: len(output) > 40)  # more than the echo: the answer has begun
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopped.\n"
        assert "first token after" in process.stderr.readline()
        # Typed before the prompt is there it would be lost: readline changes the terminal's mode.
        wait_for_output(parent, process, lambda output: output.endswith(b"> "))
        os.write(parent, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(parent)


def wait_for_output(parent, process, enough):
    os.set_blocking(parent, False)
    until, output = time.monotonic() + 120, b""
    while not enough(output):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, output
        time.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            output += os.read(parent, 1 << 16)
