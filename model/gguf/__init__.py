"""Checkpoints in one GGUF file, the format of llama.cpp, in and out.

`read` opens a file; its config, tokenizer and table of names come from the metadata in it. Weights
are dequantized to float32, one tensor at a time. `model.hf` loads what this reads. `write` makes a
file of any model whose architecture is in the tables, which both directions share.
"""

from model.gguf.architectures import find
from model.gguf.container import EXTENSION, Container, find_file, read
from model.gguf.metadata import to_config
from model.gguf.tokenizer import to_tokenizer
from model.gguf.writer import Types, summary, write

__all__ = [
  'EXTENSION',
  'Container',
  'Types',
  'find',
  'find_file',
  'read',
  'summary',
  'to_config',
  'to_tokenizer',
  'write',
]
