"""Checkpoints in one GGUF file, the format of llama.cpp.

`read` opens a file; its config, tokenizer and table of names come from the metadata in it. Weights
are dequantized to float32, one tensor at a time. `model.hf` loads what this reads.
"""

from model.gguf.architectures import find
from model.gguf.container import EXTENSION, Container, find_file, read
from model.gguf.metadata import to_config
from model.gguf.tokenizer import to_tokenizer

__all__ = ['EXTENSION', 'Container', 'find', 'find_file', 'read', 'to_config', 'to_tokenizer']
