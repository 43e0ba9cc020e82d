"""Finds the weights of a family among the tensors that a checkpoint stores.

Training tools leave traces in a checkpoint: wrappers in the names, buffers, the heads of other
tasks, a copy of a tied head or the head alone. `select_tensors` removes them and returns tensors
under the names that the family's table has.
"""

import re
from collections import Counter
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from model.config import ModelConfig
from model.hf_names.family import Family
from model.safetensors_io import Tensor

FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
# Modules that wrap others: data parallelism, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'}
# What can be computed anew: rotary tables, the value that hides masked logits, Gemma's factor.
BUFFERS = r'(^|\.)(rotary_emb\..+|inv_freq|(cos|sin)_cached|masked_bias|embed_scale)$'
# Heads of value models, reward models and classifiers beside, or in place of, the language model's.
HEADS = r'^(v_head|value_head|reward_head|score|classifier|qa_outputs|multiple_choice_head)\.'


def select_tensors(
  family: Family, config: ModelConfig, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
  """Returns the tensors under the family's names, and the names of those that were left out.

  Missing, unexpected and misshapen tensors are not looked for here.

  Raises:
    ValueError: two tensors have the same name without their wrappers; a tied head is stored and
      differs from the embedding.
  """
  ignored = re.compile('|'.join((BUFFERS, HEADS, *family.ignored)))
  unwrapped = _unwrapped(family, stored)
  kept = {name: t for name, t in unwrapped.items() if not ignored.search(name)}
  dropped = [name for name in unwrapped if name not in kept]
  head = family.weight_of('head')
  if not any(name.startswith(family.prefix) for name in kept):
    kept = {name if name == head else family.prefix + name: t for name, t in kept.items()}
  if config.tied:
    _merge_tied(kept, head, family.weight_of('embedding'))
  return kept, dropped


def _unwrapped(family, stored):
  short = {name: '.'.join(p for p in name.split('.') if p not in WRAPPERS) for name in stored}
  short = {name: family.aliases.get(one, one) for name, one in short.items()}
  twice = {name for name, count in Counter(short.values()).items() if count > 1}
  if twice:
    names = sorted(name for name in stored if short[name] in twice)
    raise ValueError(
      'the checkpoint stores tensors more than once, with and without a wrapper in their names: '
      f'{", ".join(names[:8])}; keep one of each'
    )
  return {short[name]: tensor for name, tensor in stored.items()}


def _merge_tied(kept, head, table):
  """Keeps the embedding alone. Where only the head is stored, it is the embedding."""
  copy = kept.pop(head, None)
  if copy is None:
    return
  if not _equal(copy, kept.setdefault(table, copy)):
    raise ValueError(
      f'config.json ties the head to the embedding, but {head} is stored and differs from '
      f'{table}; set tie_word_embeddings to false if the stored head is the right one'
    )


def _equal(a: Tensor, b: Tensor) -> bool:
  """Whether two tensors are equal, or one is the other rounded to its own dtype."""
  if a is b:
    return True
  if a.shape != b.shape or not {a.dtype, b.dtype} <= set(FLOATS):
    return False
  x, y = a.read(), b.read()
  with np.errstate(over='ignore'):
    return np.array_equal(x.astype(b.dtype), y) or np.array_equal(x, y.astype(a.dtype))
