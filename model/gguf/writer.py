"""Writes a model into one GGUF file, which llama.cpp and `container.read` open.

Matrices are rounded to the type that is asked for. Where the codes of a weight are those of the
type (`model.gguf.grids`), they are copied bit for bit. Every other weight is widened first, and
adapters, rotations and masks become part of the matrix. Norms, biases and learned positions stay
float32, as in llama.cpp.

What llama.cpp does where blocks do not divide a row is done here too: Q4_K becomes Q5_0, Q6_K
becomes Q8_0, and F16 takes what blocks of 32 do not divide. The head, or the embedding that is one,
loses more by rounding than any other matrix: unless something else is asked for, it is Q6_K where
other matrices are smaller.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, LlamaFileType

from model import hf_names
from model.files import atomic_file
from model.gguf import architectures, blocks, grids, metadata, rounding, vocabulary_writer
from model.gguf.container import EXTENSION
from model.hf_names import Entry
from model.tokenizer import Tokenizer, check
from model.transformer import Transformer, parameters
from ops.linear import Matrix, Weight, dense

AUTO = 'auto'
TYPES = {kind.name.lower(): kind for kind in rounding.KINDS}
_FLOATS = (Kind.F32, Kind.F16, Kind.BF16)
_SMALLER = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}  # of a row that 256 does not divide
_WITHOUT_WINDOWS = ('llama', 'phi3')  # llama.cpp has none for them
_POSITIONS = 'position_embd.weight'
_FILE_TYPES = {
  kind: LlamaFileType.ALL_F32 if kind == Kind.F32 else getattr(LlamaFileType, f'MOSTLY_{name}')
  for kind in rounding.KINDS
  for name in ['Q4_K_S' if kind == Kind.Q4_K else kind.name]
}
_VALUES = {
  bool: GGUFValueType.BOOL,
  int: GGUFValueType.UINT32,
  float: GGUFValueType.FLOAT32,
  str: GGUFValueType.STRING,
  list: GGUFValueType.ARRAY,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Types:
  """The types of a file, as keys of `TYPES`.

  matrices: of the matrices of blocks; 'auto': that of the weight's own codes, where it has some.
  rest: of the embedding and the head, and with 'auto' of matrices without such codes; None: what
    llama.cpp takes beside `matrices`, and with 'auto' their own codes, else f16.
  """

  matrices: str = AUTO
  rest: str | None = None

  def __post_init__(self):
    for name, known in (('matrices', (AUTO, *TYPES)), ('rest', (None, *TYPES))):
      if getattr(self, name) not in known:
        names = ', '.join(filter(None, known))
        raise ValueError(f'the type {getattr(self, name)!r} is not one of {names}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
  """One tensor of a file: its name, its type, and how its numbers came about."""

  name: str
  kind: str
  how: str


@dataclasses.dataclass(frozen=True)
class _Planned:
  entry: Entry
  parts: list[Matrix]
  kind: Kind
  how: str
  encode: Callable[[], np.ndarray]


def write(
  path: str | Path,
  model: Transformer,
  tokenizer: Tokenizer | None,
  types: Types,
  *,
  name: str = '',
  importance: Mapping[str, np.ndarray] | None = None,
  progress: Callable[[Sequence], Iterable] = iter,
) -> list[Written]:
  """Writes a file, whole or not at all; returns a row for each tensor, and one for what is lost.

  `importance` has the mean square of each input of a layer, by the layer's path; what is rounded
  minimizes the error weighted by it.

  Raises:
    ValueError: the name does not end in .gguf; a file cannot describe the model or its tokenizer;
      weights are beyond what a type can hold.
  """
  path = Path(path)
  if path.suffix != EXTENSION:
    raise ValueError(f'{path} does not end in {EXTENSION}, by which such files are found')
  if tokenizer is not None:
    check(tokenizer, model.config.vocab_size)
  planned = _plan(model, types, importance or {})
  found, extra, notes = _describe(model, tokenizer, planned, name)
  with atomic_file(path) as partial:
    _write(partial, found, extra, planned, progress)
  rows = [Written(name=p.entry.theirs, kind=p.kind.name, how=p.how) for p in planned]
  rows += [Written(name=key, kind='F32', how='computed') for key in extra]
  return rows + [Written(name='tokenizer', kind='', how=note) for note in notes]


def summary(rows: Sequence[Written]) -> list[str]:
  """A line for each kind of tensor, with how many there are of it."""
  counts = Counter((row.kind, row.how) for row in rows)
  return [f'{kind:5} {count:5}  {how}'.strip() for (kind, how), count in counts.items()]


def _plan(model, types, importance) -> list[_Planned]:
  weights = {path: param.get_value() for path, param in parameters(model).items()}
  shapes = {path: tuple(w.shape) for path, w in weights.items()}
  family = architectures.find(architectures.name_of(model.config.family))
  entries = hf_names.entries(family, model.config, shapes)
  own = lambda entry: [weights[path] for path in entry.ours]
  return [_planned(entry, own(entry), model.head is None, types, importance) for entry in entries]


def _planned(entry, parts, tied: bool, types, importance) -> _Planned:
  if len(entry.shape) == 1 or entry.theirs == _POSITIONS:
    return _widened(entry, parts, Kind.F32, 'norms, biases and positions', None)
  outside = entry.ours[0].partition('.')[0] in ('embedding', 'head')
  wanted = _wanted(entry, tied, types) if outside else TYPES.get(types.matrices)
  kinds = [kind for kind in grids.kinds_of(parts[0]) if wanted in (None, kind)]
  if kinds and all(kinds[0] in grids.kinds_of(part) for part in parts):
    return _copied(entry, parts, kinds[0])
  wanted = TYPES[types.rest or 'f16'] if wanted is None else wanted
  kind = _fitting(wanted, entry.shape[-1])
  weights = importance.get(entry.ours[0].removesuffix('.weight'))
  how = _how(parts, kind, weights is not None)
  if kind != wanted:
    how += f', in place of {wanted.name}, whose blocks do not divide {entry.shape[-1]} inputs'
  return _widened(entry, parts, kind, how, weights)


def _wanted(entry, tied: bool, types) -> Kind | None:
  """The type of an embedding or a head; None: that of its own codes, if it has some."""
  if types.rest is not None:
    return TYPES[types.rest]
  if types.matrices == AUTO:
    return None
  kind = TYPES[types.matrices]
  is_head = tied or entry.ours[0].startswith('head')
  small = kind not in (*_FLOATS, Kind.Q8_0)
  return Kind.Q6_K if is_head and small else kind


def _fitting(kind: Kind, inputs: int) -> Kind:
  """The type, or what llama.cpp takes where its blocks do not divide a row."""
  for one in (kind, _SMALLER.get(kind, kind)):
    if inputs % gguf.GGML_QUANT_SIZES[one][0] == 0:
      return one
  return Kind.F16


def _how(parts, kind, weighted: bool) -> str:
  types = sorted({type(part).__name__ for part in parts if isinstance(part, Weight)})
  how = f'{", ".join(types)} widened, then ' if types else ''
  if kind == Kind.F32:
    return how + 'float32'
  return how + 'rounded' + (' by importance' if weighted and kind not in _FLOATS else '')


def _widened(entry, parts, kind, how, importance) -> _Planned:
  def encode():
    rows = entry.join([np.asarray(dense(part)).astype(np.float32) for part in parts])
    flat = rows.reshape(-1, rows.shape[-1])
    try:
      return rounding.encode(flat, kind, importance)
    except ValueError as error:
      raise ValueError(f'{entry.theirs}: {error}') from None

  return _Planned(entry, parts, kind, how, encode)


def _copied(entry, parts, kind) -> _Planned:
  found = [grids.copy(part) for part in parts]
  how = 'codes copied'
  if any(one.moved for one in found):
    how += ', scales rounded to float16'
  if any(one.shifted for one in found):
    how += ', minima rounded to float16'
  if any(map(grids.rounds_inputs, parts)):
    how += ', inputs rounded as llama.cpp does'

  def encode():
    join = lambda field: entry.join([getattr(one, field) for one in map(grids.copy, parts)])
    minima = join('minima') if blocks.GRIDS[kind].minimum else None
    return blocks.pack(kind, join('codes'), join('scales'), minima)

  return _Planned(entry, parts, kind, how, encode)


def _describe(model, tokenizer, planned, name):
  """The metadata, tensors that no parameter stands for, and notes on what is lost."""
  shapes = {p.entry.theirs: p.entry.shape for p in planned}
  network, extra = metadata.describe(model.config, shapes)
  kinds = Counter(p.kind for p in planned if len(p.entry.shape) > 1)
  general = {
    'general.architecture': network['general.architecture'],
    'general.type': 'model',
    **({'general.name': name} if name else {}),
    'general.file_type': int(_FILE_TYPES[kinds.most_common(1)[0][0]]),
    'general.quantization_version': gguf.GGML_QUANT_VERSION,
  }
  if tokenizer is None:
    return {**general, **network, 'tokenizer.ggml.model': 'none'}, extra, []
  words, notes = vocabulary_writer.describe(tokenizer, model.config)
  return {**general, **network, **words}, extra, notes + _window_notes(model)


def _window_notes(model) -> list[str]:
  """What llama.cpp does not compute although the file says it."""
  windows = [layer.mixer.window for layer in model.config.layers]
  if architectures.name_of(model.config.family) not in _WITHOUT_WINDOWS or not any(windows):
    return []
  return [f'llama.cpp ignores the window of {max(filter(None, windows))} tokens']


def _write(path, found: dict[str, Any], extra, planned: list[_Planned], progress) -> None:
  """Writes the header, then each tensor as soon as it is encoded."""
  writer = gguf.GGUFWriter(path, found['general.architecture'])
  for key, value in found.items():
    if key != 'general.architecture' and value != []:
      writer.add_key_value(key, value, _VALUES[type(value)])
  for key, array in extra.items():
    writer.add_tensor_info(key, array.shape, array.dtype, array.nbytes)
  for p in planned:
    size = blocks.row_bytes(p.kind, p.entry.shape[-1])
    stored = (*p.entry.shape[:-1], size)
    writer.add_tensor_info(p.entry.theirs, stored, np.dtype(np.uint8), _size(stored), p.kind)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in extra.values():
      writer.write_tensor_data(array)
    for p in progress(planned):
      writer.write_tensor_data(p.encode())
  finally:
    writer.close()


def _size(shape) -> int:
  return int(np.prod(shape, dtype=np.int64))
