"""Quantized matrices of a checkpoint that stay as they are stored.

Where a parameter of ours consists of whole outputs of a coded matrix, it takes its columns of the
codes and scales, and no number changes: one matrix as it is, a part of a fused one, or the rows of
heads in another order. Experts are stacked if all of them are stored alike. Everything else is
widened to floating point, and so is what no weight type holds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from model.hf_names import Entry
from model.hf_quantized import CodedTensor
from model.safetensors_io import Tensor
from ops import experts
from ops.quantized import QuantizedTensor

RANK = 2
BIAS = '.bias'


def oriented(entries: Iterable[Entry], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """The tensors with coded matrices as (I, O) where the plain checkpoint has that (GPT-2)."""
  turned = dict(stored)
  for entry in entries:
    tensor = stored.get(entry.theirs)
    if isinstance(tensor, CodedTensor) and not entry.codec.transpose and len(entry.shape) == RANK:
      turned[entry.theirs] = tensor.turned()
  return turned


def idle_biases(entries: Iterable[Entry], stored: Mapping[str, Tensor]) -> list[str]:
  """The names of biases of coded matrices that the model does not have, and that are all zero.

  Older tools store them for every layer.
  """
  expected = {entry.theirs for entry in entries}
  biases = (name for name in stored if name.endswith(BIAS) and name not in expected)
  return [
    name
    for name in biases
    if isinstance(stored.get(f'{name.removesuffix(BIAS)}.weight'), CodedTensor)
    and not np.any(stored[name].read())
  ]


def keep(
  entries: Iterable[Entry], stored: Mapping[str, Tensor], dtype=None
) -> tuple[dict[str, QuantizedTensor], Counter[str]]:
  """The parameters that stay codes by path, and for how many matrices others did not, by reason.

  `dtype` is that of their dense forms (None: float32). Raises ValueError, naming the tensor, where
  its parts are damaged or a scale is not finite.
  """
  dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
  kept, reasons = {}, Counter()
  for paths, own in _by_parameter(entries).items():
    tensors = [stored[entry.theirs] for entry in own]
    coded = sum(isinstance(tensor, CodedTensor) for tensor in tensors)
    if not coded:
      continue
    weights = _weights(own, tensors, dtype) if coded == len(own) else 'other experts are no codes'
    if isinstance(weights, str):
      reasons[weights] += coded
    else:
      kept.update(zip(paths, weights))
  return kept, reasons


def _by_parameter(entries) -> dict[tuple[str, ...], list[Entry]]:
  found = {}
  for entry in entries:
    found.setdefault(entry.ours, []).append(entry)
  return found


def _weights(entries, tensors, dtype) -> list[QuantizedTensor] | str:
  """The weights of the parameters that some tensors are (several: one for each expert)."""
  rows = []
  for entry, tensor in zip(entries, tensors):
    places = entry.codec.columns(entry.shapes, entry.heads)
    if places is None or entry.stacked or not all(p.endswith('.weight') for p in entry.ours):
      return 'the model stores these numbers in another form'
    codes = tensor.codes()
    if not codes.finite:
      raise ValueError(f'the checkpoint has NaN or infinity in {entry.theirs} {entry.shape}')
    row = [codes.columns(own).weight(dtype) for own in places]
    reason = next((one for one in row if isinstance(one, str)), None)
    if reason is not None:
      return reason
    rows.append(row)
  if entries[0].expert is None:
    return rows[0]
  try:
    return [experts.stack(own) for own in zip(*rows)]
  except ValueError:
    return 'experts of one layer are stored in different forms'
