"""Models of this library for EleutherAI's lm-evaluation-harness, under the name `zamba2_jax`.

The harness (0.4.13) knows its own models only, so that this module registers ours and then runs its command line:

    python -m zamba2_jax.lm_eval run --model zamba2_jax --model_args pretrained=Zyphra/Zamba2-1.2B --tasks piqa

Arguments are the harness's own. In Python, importing this module is enough for
`lm_eval.simple_evaluate(model="zamba2_jax", ...)`. Scores are those of the harness's `hf` model, whose tokens, windows
and stop strings these are, but for the time-step clamp that transformers puts on prefill and this library does not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from zamba2_jax.generation import programs

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        Collator,
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"the evaluation harness is needed: pip install 'zamba2-jax[eval]' ({error})") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from zamba2_jax.models import Zamba2ForCausalLM

# Texts are padded to the next of these lengths and its multiples by 2: a program each.
_SHORTEST = 32
# Scores of so many vocabulary rows are held at a time, whatever a continuation's length.
_SCORED_AT_A_TIME = 256
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("zamba2_jax")
class Zamba2LM(TemplateLM):
    """A checkpoint, or a model that is loaded already, as the harness asks for one.

    Args:
        pretrained: a directory, a hub id, or a `Zamba2ForCausalLM`.
        tokenizer: a directory, a hub id, or a tokenizer of transformers; None is `pretrained`'s.
        batch_size: rows per call, all of which are always computed.
        max_length: the longest text; None is the config's `max_position_embeddings`.
        dtype, quantize, revision: as of `Zamba2ForCausalLM.from_pretrained`.
        add_bos_token: whether texts begin with the begin-of-sequence token; None leaves it to the tokenizer.
        max_gen_toks: tokens to generate where a task does not say.
        max_batch_size, device: the harness passes these; not used.

    Raises:
        ValueError: `batch_size` or `max_length` below 1 ("auto" among them), or a model without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Zamba2ForCausalLM,
        tokenizer: Any = None,
        batch_size: int | str | None = 1,
        max_length: int | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        revision: str | None = None,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self.batch_size = _at_least_one("batch_size", 1 if batch_size is None else batch_size)
        from transformers import AutoTokenizer

        from zamba2_jax.hub import as_path, hub_id
        from zamba2_jax.models import Zamba2ForCausalLM

        if isinstance(pretrained, str):
            self.model = Zamba2ForCausalLM.from_pretrained(
                pretrained, dtype=None if dtype in (None, "auto") else dtype, quantize=quantize, revision=revision
            )
        elif tokenizer is None:
            raise ValueError("tokenizer must be given with a model that is loaded already, got None.")
        else:
            self.model = pretrained
        source = pretrained if tokenizer is None else tokenizer
        if isinstance(source, str):
            source = AutoTokenizer.from_pretrained(source if hub_id(source) else as_path(source), revision=revision)
        self.tokenizer = source
        if max_length is None:
            max_length = self.model.config.max_position_embeddings
        self.max_length = _at_least_one("max_length", max_length)
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self._structure, self._weights = programs.take_apart(self.model)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        return {"model_num_parameters": self.model.config.num_parameters(), "model_dtype": str(self.model.dtype)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[_Request] = []
        owners = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # The longest first, so that a batch is of like lengths and memory runs out at once, if it does.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            texts = [(requests[index][1] + requests[index][2])[-(self.max_length + 1) :] for index in batch]
            counts = [min(len(requests[index][2]), len(text) - 1) for index, text in zip(batch, texts, strict=True)]
            width = _bucket(max(map(len, texts)))
            ids, wanted = np.zeros((self.batch_size, width), np.int32), np.zeros((self.batch_size, width), bool)
            for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
                ids[row, : len(text)] = text
                wanted[row, len(text) - count : len(text)] = True
            scores, greedy = _score(self._structure, self._weights, ids, wanted)
            for index, score, exact in zip(
                batch, np.asarray(scores).tolist(), np.asarray(greedy).tolist(), strict=False
            ):
                results[index] = score, exact
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
            progress.update(len(batch))
        progress.close()
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        results = []
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for chunk in collator.get_batched(n=self.batch_size):
            contexts, given = zip(*chunk, strict=True)
            options = dict(normalize_gen_kwargs(given[0], self.max_gen_toks))
            until = handle_stop_sequences(options.pop("until", None), eos=eos)
            new_tokens = options.pop("max_gen_toks")
            room = self.max_length - new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={new_tokens} leaves no room for a prompt in max_length={self.max_length}; lower it."
                )
            if not options.get("do_sample"):
                options = {name: value for name, value in options.items() if name not in ("temperature", "do_sample")}
            rows = [self.tok_encode(context)[-room:] for context in contexts]
            rows += rows[:1] * (self.batch_size - len(rows))  # the last batch too runs the programs that there are
            width = max(map(len, rows))
            ids, mask = np.zeros((2, len(rows), width), np.int32)
            for row, tokens in enumerate(rows):
                ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
            beams = options.get("num_beams") or 1
            stops = (
                {"stop_strings": [text for text in until if text], "tokenizer": self.tokenizer} if beams == 1 else {}
            )
            output = self.model.generate(
                ids,
                mask,
                max_new_tokens=new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **stops,
                **options,
            )
            for args, tokens in zip(chunk, output[:, width:], strict=False):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                results.append(postprocess_generated_text(text, until, None))
                self.cache_hook.add_partial("generate_until", args, results[-1])
            progress.update(len(chunk))
        progress.close()
        return collator.get_original(results)


@functools.partial(jax.jit, static_argnames=("structure",))
def _score(
    structure: programs.Structure,
    weights: list[jax.Array],
    ids: Int32[Array, "b l"],
    wanted: Any,
) -> tuple[Float[Array, " b"], Any]:
    """The summed log-probability of the wanted tokens, and whether each was the likeliest. Padding on the right comes
    after all that is read, so that it needs no mask."""
    model: Any = structure.model(weights)
    hidden = model.model(ids[:, :-1]).last_hidden_state
    targets, counted = ids[:, 1:], wanted[:, 1:]
    pieces = -(-hidden.shape[1] // _SCORED_AT_A_TIME)
    padding = pieces * _SCORED_AT_A_TIME - hidden.shape[1] if pieces > 1 else 0

    def cut(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(array.shape[0], pieces, -1, *array.shape[2:]), 1, 0)

    def score(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, counted = part
        logits = model._head(hidden).astype(jnp.float32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        exact = (jnp.argmax(logits, axis=-1) == targets) | ~counted
        return jnp.where(counted, chosen, 0).sum(axis=1), exact.all(axis=1)

    scores, greedy = jax.lax.map(score, (cut(hidden), cut(targets), cut(counted)))
    return scores.sum(axis=0), greedy.all(axis=0)


def _bucket(length: int) -> int:
    """Columns for texts of up to `length` tokens: steps of a quarter of a power of two, few and not far apart."""
    power = _SHORTEST
    while 2 * power < length:
        power *= 2
    return _SHORTEST if length <= _SHORTEST else power + -(-(length - power) // (power // 4)) * (power // 4)


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """The harness's command line, with `--model zamba2_jax` known to it."""
    from lm_eval.__main__ import cli_evaluate

    if argv is not None:
        sys.argv = ["lm_eval", *argv]
    cli_evaluate()


if __name__ == "__main__":
    main()
