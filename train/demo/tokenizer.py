"""`python -m train.demo.tokenizer CORPUS DIR`: a byte-level BPE tokenizer of the text in CORPUS/train.jsonl.

Special tokens have Zamba2's ids: 0 pads, 1 begins a text, 2 ends it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def texts(corpus: Path) -> Iterator[str]:
    with (corpus / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train_tokenizer(corpus: Path, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.demo.tokenizer", description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.corpus)
    tokenizer.save_pretrained(arguments.directory)
    print(f"{len(tokenizer):,} tokens in {arguments.directory}")


if __name__ == "__main__":
    main()
