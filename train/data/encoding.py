"""From records to token ids, and which of these count in the loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from train.data.array_records import from_bytes
from train.data.chat import encode_conversation
from train.data.records import CHAT_FIELDS, Record


class Document(NamedTuple):
    """Token ids, and whether each is to be predicted; None: all are."""

    ids: Int[np.ndarray, " l"]
    counted: Bool[np.ndarray, " l"] | None


Encode = Callable[[Sequence[Record]], list[Document]]
"""The documents of some records, in their order."""


def make_encode(format: str, tokenizer: PreTrainedTokenizerBase, *, text_field: str) -> Encode:
    """The function for one format of `train.data.records`.

    What a document looks like:
        text: what the tokenizer makes of it, with its own special tokens, such as a begin token, and the end token if
            it has one.
        completion: prompt and completion as one text, treated likewise. The tokens of the completion count, and the
            end token.
        chat: what the chat template makes of it and nothing else. The assistant's turns count, end-of-turn included.
        tokens: taken as they are.

    Raises:
        ValueError: chat without a template.
    """
    if format == "tokens":
        return lambda records: [Document(*from_bytes(record.value, record.place)) for record in records]
    if format == "chat":
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template, which conversations need; give the tokenizer of an instruct "
                "model, or data with a text field."
            )
        return lambda records: [
            Document(*encode_conversation(tokenizer, *_conversation(record), record.place)) for record in records
        ]
    if format == "completion":
        return lambda records: _encode_completions(tokenizer, records)
    return lambda records: _encode_texts(tokenizer, records, text_field)


# ---- text


def _encode_texts(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], field: str) -> list[Document]:
    texts = [record.value if isinstance(record.value, str) else _string(record, field) for record in records]
    texts = [text for text in texts if text]
    if not texts:
        return []
    rows = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    return [Document(_with_end(ids, tokenizer), None) for ids in rows]


def _encode_completions(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> list[Document]:
    pairs = [(_string(record, "prompt"), _string(record, "completion")) for record in records]
    for record, (_, completion) in zip(records, pairs, strict=True):
        if not completion:
            raise ValueError(f"{record.place}: the completion is empty, so that there is nothing to learn from it.")
    rows = tokenizer(
        [prompt + completion for prompt, completion in pairs],
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    documents = []
    for (prompt, _), ids, offsets in zip(pairs, rows["input_ids"], rows["offset_mapping"], strict=True):
        full = _with_end(ids, tokenizer)
        counted = np.ones(len(full), bool)
        # A token that reaches into the completion belongs to it; a begin token has the offsets (0, 0).
        counted[: len(ids)] = np.array(offsets).reshape(-1, 2)[:, 1] > len(prompt)
        # So does an end token that the tokenizer itself has added, with the same offsets.
        counted[-1:] |= full[-1:] == tokenizer.eos_token_id
        documents.append(Document(full, counted))
    return documents


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    end = tokenizer.eos_token_id
    return np.array(ids if end is None or ids[-1:] == [end] else [*ids, end], np.int64)


def _field(record: Record, name: str) -> Any:
    try:
        return record.value[name]
    except KeyError:
        found = ", ".join(sorted(record.value)) or "none"
        raise ValueError(f"{record.place} has no field {name!r}; its fields are: {found}.") from None


def _string(record: Record, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise ValueError(f"{record.place}: {name!r} must be a string, got {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


# ---- conversations

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _conversation(record: Record) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages of role and content, and the tools that the record lists."""
    name = next((field for field in CHAT_FIELDS if field in record.value), CHAT_FIELDS[0])
    turns = _field(record, name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{record.place}: {name!r} must be a list of objects, got {_shown(turns)}.")
    keys = ("role", "content") if name == "messages" else ("from", "value")
    messages = []
    for index, turn in enumerate(turns):
        for key in keys:
            # A turn that only calls a tool has no content.
            if not isinstance(turn.get(key), str) and not (key == "content" and turn.get("tool_calls")):
                raise ValueError(
                    f"{record.place}: {name}[{index}] needs {key!r} as a string, got {_shown(turn.get(key))}."
                )
        if name == "messages":
            # A table has a column for what only some turns hold.
            messages.append({key: value for key, value in turn.items() if value is not None})
        elif turn["from"] in _ROLES:
            messages.append({"role": _ROLES[turn["from"]], "content": turn["value"]})
        else:
            known = ", ".join(_ROLES)
            raise ValueError(f"{record.place}: {name}[{index}] is from {turn['from']!r}; known are {known}.")
    tools = record.value.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{record.place}: 'tools' must be a list, got {_shown(tools)}.")
    return messages, tools
