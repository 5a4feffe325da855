"""Which tokens of a conversation the assistant wrote."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, place: str
) -> tuple[Int[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
    """Token ids of a conversation, and whether each was written by the assistant.

    A template that marks what is generated, with `{% generation %}`, decides itself. For any other, an assistant's turn
    is what the rendered text gains from the generation prompt before it to its own end.

    Args:
        messages: objects of role and content.
        tools: for the template, or None.
        place: for messages of errors.

    Raises:
        ValueError: the template refuses the conversation; the assistant says nothing; or the text of the first turns is
            not the beginning of the whole text, so that turns cannot be told apart.
    """
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise ValueError(f"{place}: no message of the role 'assistant', which alone is learnt from; roles: {roles}.")
    try:
        if _GENERATION_TAG.search(_template(tokenizer, tools)):
            encoded = tokenizer.apply_chat_template(
                messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, counted = np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], bool)
        else:
            ids, counted = _encode_by_prefixes(tokenizer, messages, tools, place)
    except (jinja2.TemplateError, TypeError) as error:  # its own refusal, or a fault in its arithmetic
        raise ValueError(f"{place}: the chat template refuses this conversation: {error}") from None
    if not counted.any():
        raise ValueError(f"{place}: the assistant's messages hold no token, so that there is nothing to learn from.")
    return ids, counted


def _template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> str:
    """The template that transformers takes: a tokenizer may have several by name."""
    return tokenizer.get_chat_template(None, tools)


def _encode_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, place: str
) -> tuple[np.ndarray, np.ndarray]:
    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=prompt
        )

    text = render(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True) if index else "", render(index + 1, False)
        if not text.startswith(before) or not text.startswith(after):
            raise ValueError(
                f"{place}: with this chat template, the text of the first {index + (text.startswith(before))} messages "
                "is not the beginning of the whole conversation's text, so that the assistant's tokens cannot be "
                "found. Mark them in the template with {% generation %} and {% endgeneration %}."
            )
        spans.append((len(before), len(after)))

    # The template writes the special tokens itself.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start, end = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
    counted = np.zeros(len(start), bool)
    for first, last in spans:
        counted |= (end > first) & (start < last)
    return np.array(encoded["input_ids"]), counted
