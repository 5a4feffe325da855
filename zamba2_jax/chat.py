"""ChatSession: a conversation with an instruct model, in which each turn reads only what is new.

>>> chat = ChatSession(model, tokenizer, max_new_tokens=200)
>>> chat.send("Who was Augustus?")
>>> chat.send("And after him?")  # reads this line alone; the rest is in the cache
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from zamba2_jax import cache_file
from zamba2_jax.cache import Zamba2Cache
from zamba2_jax.generation import options as generation_options

if TYPE_CHECKING:
    from zamba2_jax.models import Zamba2ForCausalLM

_NOTES = "chat"
_NEW_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one answer cost.

    Attributes:
        text_tokens: of the whole conversation before the answer.
        prefilled_tokens: those of them that had to be read, the others being in the cache.
        new_tokens: of the answer, its end included.
        seconds_to_first_token: from the call to the first token, compilation included.
        interrupted: whether `should_stop` ended it.
    """

    text_tokens: int
    prefilled_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    interrupted: bool


class ChatSession:
    """A conversation and the cache of it.

    The conversation is rendered by the tokenizer's chat template in every turn. What the cache holds is used as long as
    the rendered text still begins with it. A template that changes what it rendered before (one that drops earlier
    turns, say) makes the whole text be read again: recurrent states cannot be cut back. That draws one warning.

    Args:
        model: a `Zamba2ForCausalLM`.
        tokenizer: its tokenizer, of transformers.
        system: a system message to begin with.
        template: a chat template in place of the tokenizer's.
        options: arguments of every `model.generate`, such as `max_new_tokens` (512 if no length is given anywhere),
            `temperature` or `stop_strings`.

    Attributes:
        messages: what was said: dicts of "role" and "content".
        last_turn: what the latest answer cost, or None.

    Raises:
        ValueError: there is no chat template; options that `generate` does not know, or that make several answers.
    """

    def __init__(
        self,
        model: Zamba2ForCausalLM,
        tokenizer: Any,
        *,
        system: str | None = None,
        template: str | None = None,
        **options: Any,
    ):
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template: the model was not made for conversations. Take an instruct "
                "checkpoint, or give a Jinja template (template=, on the command line --template FILE)."
            )
        values = generation_options.merge(None, model.generation_config, model.config, options)
        for name in ("num_beams", "num_return_sequences"):
            if values[name] not in (None, 1):
                raise ValueError(
                    f"{name} must be 1 in a conversation, which goes on from one answer, got {values[name]}."
                )
        if values["max_new_tokens"] is None and values["max_length"] is None:
            options["max_new_tokens"] = _NEW_TOKENS
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self._end_ids = generation_options.special_tokens(values, model.config.vocab_size)["eos_token_ids"]
        stops = values["stop_strings"]
        self._stops = [stops] if isinstance(stops, str) else list(stops or ())
        self._template = template
        self._system = system
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self.last_turn: Turn | None = None
        self._text, self._ids, self._cache = "", [], None

    def send(
        self,
        text: str,
        *,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        seed: int | None = None,
    ) -> str:
        """Says something and returns the answer.

        Args:
            text: the user's message.
            on_text: is given the answer's text piece by piece, as it comes.
            should_stop: is asked every few tokens; True ends the answer there, and what there is of it counts as said.
            seed: as of `generate`.

        Raises:
            ValueError: an empty message; a message that the template refuses; options that `generate` refuses. The
                conversation is then as it was.
        """
        began = time.perf_counter()
        if not text.strip():
            raise ValueError("the message is empty; say something.")
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._render(messages)
        ids = self._tokens(rendered)
        cached = 0 if self._cache is None else int(self._cache.next_position[0])
        watcher = _Watcher(self.tokenizer, on_text, should_stop)
        output = self.model.generate(
            np.array([ids]),
            np.ones((1, len(ids)), int),
            streamer=watcher,
            should_stop=watcher.should_stop,
            past_key_values=self._cache,
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
            seed=seed,
            **self.options,
        )
        new = output.sequences[0, len(ids) :].tolist()
        answer = self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = new[-1] in self._end_ids
        self.last_turn = Turn(
            text_tokens=len(ids),
            prefilled_tokens=len(ids) - cached,
            new_tokens=len(new),
            seconds_to_first_token=watcher.first - began,
            interrupted=watcher.stopped and not ended,
        )
        # The end-of-sequence token is not in the cache, and the template writes whatever belongs in its place.
        self._ids = ids + (new[:-1] if ended else new)
        self._text = rendered + answer
        self._cache = output.past_key_values
        for stop in self._stops:  # the template writes it
            answer = answer.split(stop)[0]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation and its cache to one file (`Zamba2Cache.save`): the states, keys and values of the
        tokens read, and the text.

        Raises:
            ValueError: nothing was said yet.
            OSError: it cannot be written; what was there before stays.
        """
        if self._cache is None:
            raise ValueError("there is no conversation to save yet; say something first.")
        notes = {"messages": self.messages, "text": self._text, "ids": self._ids}
        cache_file.write(path, self._cache, self.model, {_NOTES: json.dumps(notes)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on with a conversation that was saved, with the same model; the present one is dropped.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is of another model, damaged, or a cache without a conversation.
        """
        cache, header = cache_file.read(path, self.model)
        if _NOTES not in header:
            raise ValueError(
                f"{path} holds a cache without a conversation; ChatSession.save and /save write one with it."
            )
        notes = json.loads(header[_NOTES])
        self.messages, self._text, self._ids = notes["messages"], notes["text"], notes["ids"]
        self._cache: Zamba2Cache | None = cache
        self.last_turn = None

    def _render(self, messages: list[dict[str, str]]) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from error

    def _tokens(self, rendered: str) -> list[int]:
        """The tokens of the text, beginning with those in the cache where the text does; else the cache is dropped."""
        whole = self._encode(rendered)
        if self._cache is None:
            return whole
        held = self._ids[: int(self._cache.next_position[0])]
        if whole[: len(held)] == held and len(whole) > len(held):
            return whole
        # The same text may be cut into other tokens than those that the model chose when it wrote it.
        if rendered.startswith(self._text) and len(rendered) > len(self._text):
            return self._ids + self._encode(rendered[len(self._text) :])
        self._cache = None
        if not self._warned:
            self._warned = True
            warnings.warn(
                "The chat template rendered earlier turns differently this time, so that the whole conversation is "
                "read again: states of the past cannot be cut back. This is said once.",
                UserWarning,
                stacklevel=3,
            )
        return whole

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class _Watcher:
    """A streamer that notes when the first token came and hands the text on; and whether the answer was stopped."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None, should_stop: Callable[[], bool] | None):
        from transformers import TextStreamer

        class Pieces(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    on_text(text)

        self.first = 0.0
        self.stopped = False
        self._should_stop = should_stop
        self._text = None if on_text is None else Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def put(self, value: np.ndarray) -> None:
        if value.ndim == 1 and not self.first:  # the prompt comes first, with two dimensions
            self.first = time.perf_counter()
        if self._text is not None:
            self._text.put(value)

    def end(self) -> None:
        if self._text is not None:
            self._text.end()

    def should_stop(self) -> bool:
        self.stopped = self._should_stop is not None and self._should_stop()
        return self.stopped
