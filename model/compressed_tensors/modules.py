"""The tensors of one layer, as its scheme stores them."""

import dataclasses
from collections.abc import Callable

import numpy as np

from model.compressed_tensors import grids, layout, scheme
from model.compressed_tensors.scheme import Scheme
from model.hf_names import Entry
from model.safetensors_io import Tensor
from ops import experts
from ops.linear import Matrix

WEIGHT = '.weight'
_BYTES, _WORDS = np.dtype(np.uint8), np.dtype(np.int32)
_SHAPE = np.dtype(np.int64)


@dataclasses.dataclass(frozen=True)
class Module:
  """A layer of theirs: its entry, the weights of ours in it, and their scheme.

  The weights of experts are those of all experts; `part` has the one of the entry.
  """

  entry: Entry
  weights: tuple[Matrix, ...]
  scheme: Scheme

  @property
  def name(self) -> str:
    return self.entry.theirs.removesuffix(WEIGHT)

  def part(self, w: Matrix) -> Matrix:
    return w if self.entry.expert is None else experts.take(w, self.entry.expert)

  def joined(self, of: Callable[[Matrix], np.ndarray]) -> np.ndarray:
    """What `of` makes of the weights, [I, O] or [J, O] each, as one array of theirs."""
    return self.entry.join([of(self.part(w)) for w in self.weights])


def module_of(entry: Entry, weights: tuple[Matrix, ...]) -> Module:
  """The layer of an entry. Raises ValueError, saying why, if no scheme holds its codes."""
  if entry.stacked or not entry.codec.transpose or not entry.theirs.endswith(WEIGHT):
    raise ValueError('the checkpoint has no linear layer of its own for it')
  found = [grids.scheme_of(w) for w in weights]
  if len(set(found)) > 1:
    names = ' and '.join(dict.fromkeys(one.label for one in found))
    raise ValueError(f'its parts are one matrix in the checkpoint, and are {names}')
  module = Module(entry, weights, found[0])
  if len(weights) > 1:
    constants = [grids.constants(module.part(w)) for w in weights]
    if any(one != constants[0] for one in constants):
      raise ValueError('its parts are one matrix in the checkpoint, with different global scales')
  return module


def tensors(module: Module, around: np.dtype) -> dict[str, Tensor]:
  """The tensors of a layer by name, made when they are read; `around`: see `grids.scale_dtype`."""
  own = module.scheme
  outputs, inputs = module.entry.shape
  groups = inputs // own.group_size if own.group_size else 1
  joined = lambda of, to=lambda array: array: lambda: np.ascontiguousarray(to(module.joined(of)))
  dtype = grids.scale_dtype(module.weights[0], around)
  to_scales = lambda array: array.astype(dtype, copy=False)
  scales = Tensor((outputs, groups), dtype, joined(grids.scales, to_scales))
  found = {**_codes(own, outputs, inputs, joined), 'weight_scale': scales}
  if not own.symmetric:
    found['weight_zero_point'] = _zeros(own, outputs, groups, joined)
  found |= {
    name: Tensor((1,), value.dtype, lambda value=value: value)
    for name, value in grids.constants(module.part(module.weights[0])).items()
  }
  return {f'{module.name}.{leaf}': tensor for leaf, tensor in found.items()}


def _codes(own: Scheme, outputs: int, inputs: int, joined) -> dict[str, Tensor]:
  bits = own.bits
  if own.format == scheme.PACK:
    pack = lambda codes_OI: layout.pack_words(grids.unsigned(codes_OI, bits), bits)
    packed = Tensor((outputs, layout.words(inputs, bits)), _WORDS, joined(grids.codes, pack))
    shape = Tensor((2,), _SHAPE, lambda: np.array([outputs, inputs], np.int64))
    return {'weight_packed': packed, 'weight_shape': shape}
  if own.format in (scheme.MXFP4, scheme.NVFP4):
    pairs = Tensor((outputs, inputs // 2), _BYTES, joined(grids.codes, layout.pack_pairs))
    return {'weight_packed': pairs}
  dtype = np.dtype(np.int8) if own.kind == 'int' else grids.FP8
  plain = joined(grids.codes, lambda codes_OI: grids.signed(codes_OI, bits))
  return {'weight': Tensor((outputs, inputs), dtype, plain)}


def _zeros(own: Scheme, outputs: int, groups: int, joined) -> Tensor:
  bits = own.bits
  if own.format != scheme.PACK:
    plain = joined(grids.zeros, lambda zeros_OJ: grids.signed(zeros_OJ, bits))
    return Tensor((outputs, groups), np.dtype(np.int8), plain)
  pack = lambda zeros_OJ: layout.pack_words(zeros_OJ.T, bits).T
  return Tensor((layout.words(outputs, bits), groups), _WORDS, joined(grids.zeros, pack))
