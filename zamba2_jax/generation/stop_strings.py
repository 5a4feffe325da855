"""Stop strings: a row ends with the token in which one of some texts ends, wherever in the token that is.

Tokens do not respect the borders of a text: "stop" may come as "st", "op" or as "las", "topper". An automaton over
bytes (Aho and Corasick's) remembers how much of each text the row ends with. What a whole token does to its state is
worked out on the host beforehand, for every state and token, so that a step on the device is one look-up.
"""

from __future__ import annotations

import collections
import functools
import json
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16, Int32

# Few table heights, so that programs are shared.
_SMALLEST_TABLE = 32
_PREFIX = "abcdef"
_PIECES: weakref.WeakKeyDictionary[Any, list[bytes]] = weakref.WeakKeyDictionary()


@functools.lru_cache(maxsize=8)
def stop_strings_of(texts: tuple[str, ...], tokenizer: Any, vocab_size: int) -> StopStrings:
    """The automaton, kept for the next call."""
    return StopStrings(texts, tokenizer, vocab_size)


class StopStrings:
    """The automaton of some texts and a tokenizer.

    Attributes:
        table: (states, v) int16: the state after a token; -1 where a text ends in it.
    """

    table: Int16[np.ndarray, "states v"]

    def __init__(self, texts: Sequence[str], tokenizer: Any, vocab_size: int):
        self._pieces = _pieces(tokenizer)
        self._step, self._ends = _automaton([text.encode() for text in texts])
        self._reach = max(len(text.encode()) for text in texts)
        states = len(self._ends)
        if states > np.iinfo(np.int16).max:
            raise ValueError(f"stop_strings are too long: {states} bytes together, {np.iinfo(np.int16).max} will do.")

        # Tokens that the automaton cannot tell apart (most hold no byte of any text) are walked through once.
        letters = np.flatnonzero((self._step != 0).any(axis=0))
        letter_of = np.zeros(256, np.uint8 if len(letters) < 255 else np.uint16)
        letter_of[letters] = np.arange(1, len(letters) + 1)
        kinds: dict[bytes, int] = {}
        kind = np.zeros(vocab_size, np.int64)
        for token, piece in enumerate(self._pieces[:vocab_size]):
            read = letter_of[np.frombuffer(piece, np.uint8)]
            kind[token] = kinds.setdefault(read.tobytes(), len(kinds))
        unknown = kinds.setdefault(letter_of[[0]].tobytes(), len(kinds))
        kind[len(self._pieces) :] = unknown  # a vocabulary that is padded beyond the tokenizer's

        step = np.concatenate([np.zeros((states, 1), np.int64), self._step[:, letters]], axis=1)
        after = np.empty((states, len(kinds)), np.int16)
        for key, column in kinds.items():
            at, ended = np.arange(states), np.zeros(states, bool)
            for letter in np.frombuffer(key, letter_of.dtype):
                at = step[at, letter]
                ended |= self._ends[at]
            after[:, column] = np.where(ended, -1, at)
        height = max(_SMALLEST_TABLE, 1 << (states - 1).bit_length())
        self.table = np.zeros((height, vocab_size), np.int16)
        self.table[:states] = after[:, kind]

    def start(self, rows: Sequence[Sequence[int]]) -> Int32[np.ndarray, " b"]:
        """The state after each row's tokens: a text may begin in the prompt, but one that ends there ends nothing."""
        states = []
        for row in rows:
            tail = b""
            for token in reversed(row):
                if len(tail) >= self._reach:
                    break
                tail = (self._pieces[token] if token < len(self._pieces) else b"\0") + tail
            at = 0
            for byte in tail:
                at = int(self._step[at, byte])
            states.append(at)
        return np.array(states, np.int32)


def _automaton(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(states, 256): the state after a byte, 0 being the start; (states,): whether a text ends there."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for text in texts:
        at = 0
        for byte in text:
            if byte not in children[at]:
                children[at][byte] = len(children)
                children.append({})
                ends.append(False)
            at = children[at][byte]
        ends[at] = True

    step = np.zeros((len(children), 256), np.int64)
    # From the start outwards: a state without a child for a byte does what its longest proper suffix does.
    suffix = [0] * len(children)
    queue = collections.deque([0])
    while queue:
        at = queue.popleft()
        if at:
            step[at] = step[suffix[at]]
            ends[at] = ends[at] or ends[suffix[at]]
        for byte, child in children[at].items():
            suffix[child] = int(step[at, byte])
            step[at, byte] = child
            queue.append(child)
    return step, np.array(ends)


def _pieces(tokenizer: Any) -> list[bytes]:
    """What each token adds to a text, as bytes: a character may be spread over several tokens."""
    if tokenizer not in _PIECES:
        _PIECES[tokenizer] = _read_pieces(tokenizer)
    return _PIECES[tokenizer]


def _read_pieces(tokenizer: Any) -> list[bytes]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()} if '"ByteLevel"' in decoder else {}
    has_byte_tokens = '"ByteFallback"' in decoder
    # Behind a word, because at a text's beginning some tokenizers drop a space.
    before = tokenizer.convert_ids_to_tokens(tokenizer(_PREFIX, add_special_tokens=False)["input_ids"])

    def piece(token: str) -> bytes:
        if byte_of and all(char in byte_of for char in token):
            return bytes(byte_of[char] for char in token)
        if has_byte_tokens and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        text = tokenizer.convert_tokens_to_string([*before, token])
        return text[text.find(_PREFIX) + len(_PREFIX) :].encode()

    vocabulary = tokenizer.get_vocab()
    pieces = [b"\0"] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        pieces[index] = piece(token)
    return pieces
