"""The formats of compressed-tensors, which transformers and vLLM read: config and tensors.

`write` makes a folder of a model. `model.hf_quantized` reads such folders.
"""

from model.compressed_tensors.writer import Written, patterns, summary, write

__all__ = ['Written', 'patterns', 'summary', 'write']
