"""Data for training: found, tokenised once, packed into rows, and served in an order that depends on the seed alone.

sources.py     --data arguments: paths, weights, kinds of files
records.py     reads the files, record by record
encoding.py    records to token ids; chat.py: the assistant's tokens of a conversation
tokenizing.py  sources to documents, and to files of token ids; array_records.py: the format of these
cache.py       the tokens on disk
packing.py     documents to rows; rows.py: the rows by number
pipeline.py    open_data: shuffled, mixed, sharded and batched by Grain
"""

from train.data.pipeline import Data, Statistics, open_data
from train.data.tokenizing import tokenize

__all__ = ["Data", "Statistics", "open_data", "tokenize"]
