"""Writes a model as a folder that transformers and vLLM read, in the formats of compressed-tensors.

A linear layer whose weight is codes on a grid of theirs (`grids`) keeps its codes, scales and zero
points bit for bit. Parts of ours that are one matrix of theirs are joined along their outputs where
they are stored alike. Everything else (NF4, zero points that are no integers, adapters, rotations)
is widened, and `Written` says so and why. So are embeddings and routers, which are no quantized
layers to their readers.

A sparse matrix is written with its zeros. With `bitmask`, it is stored as the values that are left
and a mask, which only releases up to 0.14 of compressed-tensors read, and `hf_quantized`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from model import hf_folder, hf_names
from model.compressed_tensors import masks, modules, scheme
from model.compressed_tensors.modules import Module
from model.hf_names import Entry
from model.safetensors_io import Tensor
from model.tokenizer import Tokenizer
from model.transformer import Transformer, parameters
from ops import experts
from ops.linear import Matrix, Weight, dense
from ops.masked import MaskedTensor
from ops.sparse import SparseTensor

# What vLLM, or transformers for routers, does not read as codes.
_AS_NUMBERS = ('.table', '.router.weight', '.shared_gate.weight')
# What vLLM runs as one product, so that it needs one scheme.
_TOGETHER = (('q_proj', 'k_proj', 'v_proj'), ('gate_proj', 'up_proj'), ('w1', 'w3'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
  """One matrix of a folder: its name, what it is stored as, and why if it was widened."""

  name: str
  kind: str
  how: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  coded: list[Module]
  linear: dict[str, Tensor]  # plain linear layers, by the name of the tensor
  others: dict[str, Tensor]
  widened: dict[str, str]  # name of a module -> why


def write(
  path: str | Path, model: Transformer, tokenizer: Tokenizer | None, *, bitmask: bool = False
) -> list[Written]:
  """Writes a folder, whole or not at all; returns a row for each linear layer, and notes.

  Raises:
    ValueError: the folder holds something else; config.json cannot describe the model; no linear
      layer can be kept as codes (nor, with `bitmask`, is sparse); the tokenizer has more tokens
      than the model.
  """
  hf_folder.check(path, model.config, tokenizer)
  dtype = np.dtype(model.embedding.table.get_value().dtype)
  described = {**hf_names.config_to_hf(model.config), **hf_folder.dtypes(dtype)}
  plan = _plan(model)
  stored, sparsity = _tensors(plan, dtype, bitmask)
  if not plan.coded and not sparsity:
    _refuse(plan)
  ties = ['lm_head'] if model.head is None else []
  described['quantization_config'] = _settings(plan, sparsity, ties)
  hf_folder.write(path, described, stored, tokenizer)
  return _rows(plan, sparsity)


def summary(rows: Collection[Written]) -> list[str]:
  """A line for each kind of matrix, with how many there are of it, and the notes."""
  counts = Counter((row.kind, row.how) for row in rows)
  return [
    f'{count:5}  {kind}' + (f': {how}' if how else '') for (kind, how), count in counts.items()
  ]


def _plan(model: Transformer) -> _Plan:
  weights = {path: param.get_value() for path, param in parameters(model).items()}
  shapes = {path: tuple(w.shape) for path, w in weights.items()}
  plan = _Plan(coded=[], linear={}, others={}, widened={})
  for entry in hf_names.entries(hf_names.find(model.config.family), model.config, shapes):
    own = tuple(weights[path] for path in entry.ours)
    if any(isinstance(w, Weight) for w in own):
      try:
        if entry.ours[0].endswith(_AS_NUMBERS):
          raise ValueError('embeddings and routers are written as numbers')
        plan.coded.append(modules.module_of(entry, own))
        continue
      except ValueError as error:
        if not _is_sparse(own):
          plan.widened[entry.theirs.removesuffix(modules.WEIGHT)] = str(error)
    into = plan.linear if _is_linear(entry) else plan.others
    into[entry.theirs] = _widened(entry, own)
  return plan


def _is_linear(entry: Entry) -> bool:
  """Whether it is the weight of a linear layer of torch."""
  named = entry.theirs.endswith(modules.WEIGHT) and entry.ours[0].endswith('.weight')
  return named and entry.codec.transpose and not entry.stacked and len(entry.shape) == 2


def _is_sparse(own: tuple[Matrix, ...]) -> bool:
  """Whether these are numbers with zeros, which lose nothing where they are widened."""
  inner = [w.values if isinstance(w, SparseTensor | MaskedTensor) else w for w in own]
  return not any(isinstance(w, Weight) for w in inner)


def _widened(entry: Entry, own: tuple[Matrix, ...]) -> Tensor:
  dtype = np.dtype(jnp.result_type(*(w.dtype for w in own)))

  def read():
    parts = own if entry.expert is None else [experts.take(w, entry.expert) for w in own]
    return entry.join([np.asarray(dense(part)).astype(dtype, copy=False) for part in parts])

  return Tensor(entry.shape, dtype, read)


def _tensors(plan: _Plan, dtype, bitmask: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
  """All tensors, and the `sparsity_config` if matrices are stored as masks and values."""
  stored = {**plan.others, **plan.linear}
  for module in plan.coded:
    stored |= modules.tensors(module, dtype)
  if not bitmask:
    return stored, {}
  plain = {f'{m.name}.weight' for m in plan.coded if m.scheme.format in scheme.PLAIN}
  sparse = {
    name: stored[name]
    for name in (*plan.linear, *plain)
    if masks.PRUNED < masks.zeros_share(stored[name]) < 1
  }
  if not sparse:
    return stored, {}
  format = masks.format_of(sparse)
  for name, tensor in sparse.items():
    del stored[name]
    stored |= masks.tensors(name, tensor, format)
  names = [name.removesuffix(modules.WEIGHT) for name in sparse]
  return stored, masks.settings(sparse, format, sorted(names))


def _refuse(plan: _Plan) -> None:
  reasons = Counter(plan.widened.values())
  listed = '; '.join(f'{count} layers: {why}' for why, count in reasons.items())
  raise ValueError(
    f'no linear layer of this model has codes that compressed-tensors stores '
    f'({listed or "all are plain arrays"}); quantize it first, for example by '
    'round_to_nearest with the format int4, or save it as it is'
  )


def _settings(plan: _Plan, sparsity: dict[str, Any], ties: list[str]) -> dict[str, Any]:
  """The `quantization_config` of config.json."""
  plain = [name.removesuffix(modules.WEIGHT) for name in plan.linear]
  found = {'quant_method': scheme.METHOD, 'version': scheme.VERSION}
  found |= {'sparsity_config': sparsity, 'transform_config': {}}
  if not plan.coded:
    return found
  everything = [*plain, *(module.name for module in plan.coded)]
  by_scheme = {}
  for module in plan.coded:
    by_scheme.setdefault(module.scheme, []).append(module.name)
  # One scheme is that of all linear layers. Of several, each names its own: vLLM would take a
  # layer that it has fused by its class before it looked at the names of the parts.
  all_alike = len(by_scheme) == 1
  groups = {
    f'group_{i}': own.to_json(['Linear'] if all_alike else patterns(names, everything))
    for i, (own, names) in enumerate(by_scheme.items())
  }
  formats = {own.format for own in by_scheme}
  return {
    **found,
    'config_groups': groups,
    'format': formats.pop() if len(formats) == 1 else scheme.MIXED,
    'global_compression_ratio': None,
    'ignore': [*patterns(plain, everything), *ties],
    'kv_cache_scheme': None,
    'quantization_status': 'compressed',
  }


def patterns(names: Collection[str], everything: Collection[str]) -> list[str]:
  """Names as they are, or as one expression where all that differ in numbers alone are meant."""
  chosen, known = (Counter(_form(name) for name in some) for some in (names, everything))
  found = []
  for name in names:
    form = _form(name)
    whole = chosen[form] == known[form] > 1
    found.append('re:' + re.escape(form).replace(r'\#', r'\d+') + '$' if whole else name)
  return list(dict.fromkeys(found))


def _form(name: str) -> str:
  return re.sub(r'(?<=\.)\d+(?=\.)', '#', name)


def _rows(plan: _Plan, sparsity: Mapping[str, Any]) -> list[Written]:
  rows = [Written(name=m.name, kind=m.scheme.label) for m in plan.coded]
  rows += [Written(name=name, kind='widened', how=f'{why}') for name, why in plan.widened.items()]
  rows += [
    Written(name=name, kind=sparsity['format'], how='the values and a mask')
    for name in sparsity.get('targets', [])
  ]
  return rows + [Written(name='', kind='note', how=note) for note in _notes(plan, sparsity)]


def _notes(plan: _Plan, sparsity: Mapping[str, Any]) -> list[str]:
  """What a reader does not do although the file says it."""
  by_name = {module.name: module.scheme for module in plan.coded}
  notes = []
  if sparsity:
    notes.append('masks are read by compressed-tensors up to 0.14 and by Lissom, not by vLLM')
  if any(m.entry.expert is not None and not _plain_experts(m) for m in plan.coded):
    notes.append('transformers reads experts as symmetric packed codes or fp8 alone')
  if len({m.scheme for m in plan.coded if m.entry.expert is not None}) > 1:
    notes.append('transformers reads all experts by one scheme, and these have several')
  for leaves in _TOGETHER:
    found = {}
    for name in (*by_name, *(tensor.removesuffix(modules.WEIGHT) for tensor in plan.linear)):
      layer, _, leaf = name.rpartition('.')
      if leaf in leaves:
        found.setdefault(layer, set()).add(by_name.get(name))
    if any(len(own) > 1 for own in found.values()):
      notes.append(f'vLLM needs one scheme for {", ".join(leaves)}, and these have several')
  return notes


def _plain_experts(module: Module) -> bool:
  own = module.scheme
  return own.symmetric and (own.format == scheme.PACK or (own.kind == 'float' and own.bits == 8))
