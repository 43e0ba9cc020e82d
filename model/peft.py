"""Adapter folders in the format of the library PEFT, in and out.

  model, config = peft.load('adapter', base_model)
  peft.save(model, 'adapter')

A folder holds adapter_config.json and adapter_model.safetensors. https://github.com/huggingface/peft
(docs/source/developer_guides/checkpoint.md) describes both.

Theirs are `lora_A.weight` [R, I] and `lora_B.weight` [O, R] of a module of the family, ours `a_IR`
and `b_RO` of a linear layer. Where a module of theirs holds several layers of ours (a fused
projection), each layer has a copy of A and its rows of B. Layers that were trained apart have
different A; they are written as one adapter with the ranks added up, in which each layer's rows of
B are zero at the others' ranks.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import adapters, hf_names, safetensors_io
from model.files import atomic_folder, read_json
from model.hf_names import Entry
from model.manifest import check_replaceable
from model.peft_config import PeftConfig, from_json, to_json
from model.safetensors_io import Tensor
from model.transformer import Transformer, linears, parameters
from ops.linear import Matrix, Weight
from ops.lora import DoraTensor, LoraTensor
from ops.masked import MaskedTensor

CONFIG = 'adapter_config.json'
TENSORS = 'adapter_model.safetensors'
KIND = 'adapter'
PREFIX = 'base_model.model.'
A, B, MAGNITUDE = '.lora_A.weight', '.lora_B.weight', '.lora_magnitude_vector'
MAX_LISTED = 20
Arrays = dict[str, np.ndarray]


def load(folder: str | Path, model: Transformer) -> tuple[Transformer, PeftConfig]:
  """Returns a copy of the base model with the adapters of a folder, and their config.

  Modules that are stored whole replace those of the model.

  Raises:
    ValueError: a file is absent or not sound; the config asks for something that is not supported;
      a tensor has an unknown name, lacks its other side, or does not fit the model, as those of an
      adapter for another base.
  """
  folder = Path(folder)
  config, stored = _read_config(folder / CONFIG), _read_tensors(folder / TENSORS)
  model = nnx.clone(model)
  entries = {entry.theirs.removesuffix('.weight'): entry for entry in _entries(model)}
  problems, used = [], set()
  for module in _modules(stored, A):
    names = [module + suffix for suffix in (A, B, *([MAGNITUDE] if config.dora else []))]
    used.update(names)
    problem = _problem(module, names, stored, entries, config)
    if problem is None:
      _attach(model, entries[module], [stored[name].read() for name in names], module, config)
    else:
      problems.append(problem)
  problems += _load_whole(model, stored, config, used)
  problems += [
    f'{name} {tensor.shape} is unknown' for name, tensor in stored.items() if name not in used
  ]
  _raise_listed(f'{folder} holds no adapter for this model', problems)
  return model, config


def save(
  model: Transformer,
  folder: str | Path,
  *,
  config: PeftConfig | None = None,
  saved: Iterable[str] = (),
) -> None:
  """Writes the adapters of a model, and whole the layers named by `saved`, such as 'head'.

  `config` gives the base's name and whether scales are those of rsLoRA; ranks, alphas and DoRA
  follow from the model. The folder appears whole or not at all.

  Raises ValueError if the model has no adapters; if some are DoRA and others not; or if an adapter
  is masked, which PEFT has no form for.
  """
  check_replaceable(folder, kind=KIND)
  config = config or PeftConfig()
  found = adapters.adapted(model)
  _check_forms(found)
  arrays, scales, modules, transposed = {}, {}, [], False
  for entry in _entries(model):
    parts = [found.get(path.removesuffix('.weight')) for path in entry.ours]
    if any(part is not None for part in parts):
      module = entry.theirs.removesuffix('.weight')
      own, scales[module] = _joined(entry, parts)
      arrays |= {f'{PREFIX}{module}{suffix}': array for suffix, array in own.items()}
      modules.append(module)
      transposed |= not entry.codec.transpose
  whole, names = _whole(model, saved)
  config = _described(
    config, arrays, scales, any(isinstance(w, DoraTensor) for w in found.values())
  )
  config = dataclasses.replace(config, saved=names)
  tensors = {n: _tensor(array) for n, array in {**arrays, **whole}.items()}
  about = to_json(config, _shortest(modules, model), transposed=transposed)
  with atomic_folder(folder, kind=KIND) as partial:
    safetensors_io.write_file(partial / TENSORS, tensors)
    (partial / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + '\n')


def _entries(model) -> list[Entry]:
  """The tensors of the base, with the parameters of ours that each consists of, without experts."""
  shapes = {path: tuple(p.get_value().shape) for path, p in parameters(model).items()}
  entries = hf_names.entries(hf_names.find(model.config.family), model.config, shapes)
  return [entry for entry in entries if not entry.of_experts]


def _modules(stored: Mapping[str, Tensor], suffix: str) -> list[str]:
  return [name.removesuffix(suffix) for name in stored if name.endswith(suffix)]


def _problem(module, names, stored, entries, config) -> str | None:
  """What speaks against attaching the adapter of one module."""
  absent = [name for name in names if name not in stored]
  if absent:
    return f'{absent[0]} is missing'
  entry = entries.get(module)
  if entry is None or not all(path.endswith('.weight') for path in entry.ours):
    return f'{module} is no linear layer of the model'
  (rank, inputs), (outputs, other) = stored[names[0]].shape, stored[names[1]].shape
  own = entry.shapes[0][0], sum(shape[-1] for shape in entry.shapes)
  if (inputs, outputs) != own:
    return f'{module} is {own[0]} x {own[1]} here, and {inputs} x {outputs} for the adapter'
  if not rank == other == config.rank_of(module):
    return (
      f'{module} has sides of rank {rank} and {other}, and {config.rank_of(module)} in {CONFIG}'
    )
  if config.dora and stored[names[2]].shape != (outputs,):
    return f'{names[2]} is {stored[names[2]].shape}, not {(outputs,)}'
  return None


def _attach(model, entry, arrays, module, config):
  a_RI, b_OR, *magnitude = (array.astype(np.float32) for array in arrays)
  codec = dataclasses.replace(entry.codec, transpose=True)
  split = lambda array, shapes: codec.split(array, shapes, entry.heads)
  outputs = [shape[-1] for shape in entry.shapes]
  sides = split(b_OR, [(len(a_RI), o) for o in outputs])
  lengths = split(magnitude[0], [(o,) for o in outputs]) if magnitude else [None] * len(sides)
  for path, b_RO, length_O in zip(entry.ours, sides, lengths):
    param = linears(model)[path.removesuffix('.weight')].weight
    copies = [jnp.array(side, jnp.float32, copy=True) for side in (a_RI.T, b_RO)]
    w = LoraTensor(param.get_value(), *copies, config.scale_of(module))
    if length_O is not None:
      w = DoraTensor(w, jnp.array(length_O, copy=True))
    param.set_value(w)


def _load_whole(model, stored, config, used) -> list[str]:
  """Loads the tensors of modules that are stored whole; returns what does not fit."""
  problems, params = [], parameters(model)
  for entry in _entries(model):
    name = entry.theirs
    if name not in stored:
      continue
    used.add(name)
    if name.rpartition('.')[0].rpartition('.')[2] not in config.saved:
      problems.append(f'{name} is stored whole, but {CONFIG} does not list it in modules_to_save')
    elif stored[name].shape != entry.shape:
      problems.append(f'{name} is {stored[name].shape}, not {entry.shape}')
    else:
      for path, part in zip(entry.ours, entry.split(stored[name].read())):
        old = params[path].get_value()
        params[path].set_value(jnp.array(part, old.dtype, copy=True))
  return problems


def _check_forms(found: Mapping[str, Matrix]) -> None:
  if not found:
    raise ValueError('this model has no adapters; attach some by model.adapters.attach')
  for layer, w in found.items():
    if isinstance(w, MaskedTensor):
      raise ValueError(
        f'{layer} has a masked adapter, which PEFT has no form for: merge it into the model, which '
        'keeps its zeros'
      )
    if not isinstance(w, LoraTensor | DoraTensor):
      raise ValueError(f'the adapter of {layer} is inside a {type(w).__name__}; merge it instead')
  if len({type(w) for w in found.values()}) > 1:
    raise ValueError('some adapters are DoRA and others are not, which one PEFT folder cannot say')


def _joined(entry: Entry, parts: list[Matrix | None]) -> tuple[Arrays, float]:
  """The tensors of one module, by suffix, and its scale."""
  plain = [part.values if isinstance(part, DoraTensor) else part for part in parts]
  scale = next(part.scale for part in plain if part is not None)
  sides = [
    part and (np.asarray(part.a_IR, np.float32), np.asarray(part.b_RO, np.float32))
    for part in plain
  ]
  codec = dataclasses.replace(entry.codec, transpose=True)
  first = next(side for side in sides if side is not None)
  shared = all(
    part is not None and part.scale == scale and np.array_equal(side[0], first[0])
    for part, side in zip(plain, sides)
  )
  if shared:
    a_IR, rows = first[0], [side[1] for side in sides]
  else:
    a_IR, rows = _added_up(plain, sides, [shape[-1] for shape in entry.shapes], scale)
  arrays = {A: a_IR.T, B: codec.join(rows, entry.heads)}
  if any(isinstance(part, DoraTensor) for part in parts):
    lengths = [
      np.asarray(part.magnitude_O, np.float32) if part is not None else None for part in parts
    ]
    if any(length is None for length in lengths):
      raise ValueError(f'{entry.theirs} is adapted by DoRA in a part of its layers only')
    arrays[MAGNITUDE] = codec.join(lengths, entry.heads)
  return arrays, scale


def _added_up(parts, sides, outputs, scale):
  """One adapter of all ranks: `a` side by side, each `b` at its own ranks."""
  ranks = [side[0].shape[1] if side else 0 for side in sides]
  starts, total = np.cumsum([0, *ranks]), sum(ranks)
  rows = []
  for i, (part, side) in enumerate(zip(parts, sides)):
    b_RO = np.zeros((total, outputs[i]), np.float32)
    if side:
      b_RO[starts[i] : starts[i + 1]] = side[1] * np.float32(part.scale / scale)
    rows.append(b_RO)
  return np.concatenate([side[0] for side in sides if side], axis=1), rows


def _whole(model, saved: Iterable[str]) -> tuple[Arrays, tuple[str, ...]]:
  """The tensors of layers that are stored whole, and the last parts of their modules' names."""
  arrays, names = {}, []
  entries, params = _entries(model), parameters(model)
  for layer in saved:
    own = [e for e in entries if all(path.startswith(f'{layer}.') for path in e.ours)]
    if not own:
      raise ValueError(f'{layer} is no layer that can be stored whole; name one such as "head"')
    for entry in own:
      values = [params[path].get_value() for path in entry.ours]
      if any(isinstance(w, Weight) for w in values):
        raise ValueError(f'{layer} is compressed; only plain arrays are stored whole')
      arrays[PREFIX + entry.theirs] = entry.join([np.asarray(w) for w in values])
      names.append(entry.theirs.rpartition('.')[0].rpartition('.')[2])
  return arrays, tuple(dict.fromkeys(names))


def _described(
  config: PeftConfig, arrays: Arrays, scales: dict[str, float], dora: bool
) -> PeftConfig:
  """The config whose ranks and scales are those of the arrays."""
  ranks = {module: len(arrays[f'{PREFIX}{module}{A}']) for module in scales}
  times = lambda rank: rank**0.5 if config.rslora else rank
  alphas = {module: _number(scale * times(ranks[module])) for module, scale in scales.items()}
  rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
  escaped = lambda values, usual: {re.escape(m): v for m, v in values.items() if v != usual}
  return dataclasses.replace(
    config,
    rank=rank,
    alpha=alpha,
    ranks=escaped(ranks, rank),
    alphas=escaped(alphas, alpha),
    dora=dora,
  )


def _number(value: float) -> int | float:
  return round(value) if abs(value - round(value)) < 1e-9 * abs(value) else value


def _shortest(modules: list[str], model: Transformer) -> list[str]:
  """The modules by the last part of their names where that means no others, else in full."""
  every = {
    e.theirs.removesuffix('.weight') for e in _entries(model) if e.theirs.endswith('.weight')
  }
  found = []
  for module in modules:
    last = module.rpartition('.')[2]
    alike = {m for m in every if m == last or m.endswith(f'.{last}')}
    found.append(last if alike <= set(modules) else module)
  return list(dict.fromkeys(found))


def _read_config(path: Path) -> PeftConfig:
  if not path.is_file():
    raise ValueError(f'{path.parent} has no {path.name}, so it is no adapter of PEFT')
  return from_json(read_json(path))


def _read_tensors(path: Path) -> dict[str, Tensor]:
  if not path.is_file():
    raise ValueError(f'{path.parent} has no {path.name}; pickled adapters are not read')
  stored = safetensors_io.read_file(path)
  strangers = [name for name in stored if not name.startswith(PREFIX)]
  _raise_listed(f'{path} has names that do not begin with {PREFIX}', strangers)
  return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}


def _tensor(array: np.ndarray) -> Tensor:
  return Tensor(array.shape, array.dtype, lambda: np.ascontiguousarray(array))


def _raise_listed(what: str, problems: list[str]) -> None:
  if problems:
    more = len(problems) - MAX_LISTED
    listed = problems[:MAX_LISTED] + ([f'and {more} more'] if more > 0 else [])
    raise ValueError(f'{what}: ' + '; '.join(listed))
