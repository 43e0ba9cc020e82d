"""A model as StableHLO programs that run with jax alone, on a machine without this package.

The folder that `write` makes:

  step_T.bin           (weights, tokens_BT, positions_BT, cache) -> (logits_BV of the last, cache)
  start.bin            () -> the empty cache
  weights.safetensors  the arrays of the model, codes and scales as they are stored
  programs.json        versions, sizes, and the names and dtypes of the weights in their order
  run.py               a loader with a greedy loop, which imports numpy and jax alone; jax.export
                       reads programs by flatbuffers: pip install jax flatbuffers
  tokenizer.json       with its companions, if a tokenizer is given

Programs are serialized by `jax.export`, which promises that they load for six months in newer
releases of JAX (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees). One
program may be lowered for several platforms, on any machine. Weights are arguments, so that all
programs share them; weights and cache are flat tuples, so that nothing has to know our types. The
loader takes a prompt in the largest steps that fit and decodes with `step_1.bin`, so no row is
padded.

Shapes are fixed: how a product is computed depends on the number of rows on some platforms, which a
symbolic size cannot decide. The native products of a CPU are left out, because the other machine
has no library of ours; low-bit weights are widened there in each product.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import cache_spec, files, kv_cache, safetensors_io
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from ops.kernels import cpu

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
LOADER = Path(__file__).parent / 'run.py'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the programs are made for.

  lengths: the tokens a row that one step takes; a step of one is always there.
  capacity: the most tokens of a prompt and its continuation.  kv_cache: a text of
  `model.cache_spec`.
  """

  platforms: Sequence[str] = ('cpu',)
  batch: int = 1
  capacity: int = 1024
  lengths: Sequence[int] = (16, 128)
  kv_cache: str = 'float'

  def __post_init__(self):
    unknown = [name for name in self.platforms if name not in PLATFORMS]
    if unknown or not self.platforms:
      raise ValueError(f'platforms are some of {", ".join(PLATFORMS)}, not {list(self.platforms)}')
    if min(self.batch, *self.lengths, 1) < 1 or max(self.lengths, default=1) > self.capacity:
      raise ValueError(
        f'a step takes 1 to {self.capacity} tokens of at least one row, not '
        f'{list(self.lengths)} of {self.batch}; --capacity is the most'
      )
    cache_spec.of(self.kv_cache)

  @property
  def steps(self) -> list[int]:
    return sorted({1, *self.lengths})


def write(
  folder: str | Path, model: Transformer, tokenizer: Tokenizer | None, options: Options
) -> dict[str, int]:
  """Writes the folder; the bytes of each file.

  Raises ValueError if the folder is somebody's work, the model has not learned so many positions,
  it holds an array that safetensors has no type for, or flatbuffers is not installed.
  """
  if importlib.util.find_spec('flatbuffers') is None:
    raise ValueError('jax.export writes and reads programs by flatbuffers; pip install flatbuffers')
  limit = model.config.max_positions if model.positions is not None else options.capacity
  if options.capacity > limit:
    raise ValueError(
      f'a capacity of {options.capacity} is more than the {limit} positions that the model learned'
    )
  graphdef, state = nnx.split(model)
  named, treedef = jax.tree_util.tree_flatten_with_path(state)
  weights = {_name(path): leaf for path, leaf in named}
  _check_types(weights)
  step, start = _functions(
    lambda leaves: nnx.merge(graphdef, treedef.unflatten(leaves)), model, options
  )
  with files.atomic_folder(folder, kind='stablehlo') as work, cpu.left_out():
    _export(work / 'start.bin', start, (), options)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in weights.values())
    for length in options.steps:
      rows = jax.ShapeDtypeStruct((options.batch, length), jnp.int32)
      arguments = shapes, rows, rows, jax.eval_shape(start)
      version = _export(work / f'step_{length}.bin', step, arguments, options)
    safetensors_io.write_file(
      work / 'weights.safetensors', {name: _tensor(leaf) for name, leaf in weights.items()}
    )
    (work / 'run.py').write_bytes(LOADER.read_bytes())
    if tokenizer is not None:
      tokenizer.save(work)
    sizes = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
    about = _about(model, weights, options) | {'calling_convention': version, 'bytes': sizes}
    (work / 'programs.json').write_text(json.dumps(about, indent=1) + '\n')
  return sizes


def _functions(merge, model, options):
  """The program of one step and that of an empty cache, on flat tuples of arrays."""
  config, batch, capacity = model.config, options.batch, options.capacity
  make = lambda: kv_cache.init(config, batch, capacity, model.dtype, options.kv_cache)
  treedef = jax.tree.structure(jax.eval_shape(make))

  def step(weights, tokens_BT, positions_BT, cache):
    model = merge(weights)
    x_BTD, cache = model.hidden(
      tokens_BT, positions_BT=positions_BT, cache=jax.tree.unflatten(treedef, cache)
    )
    return model.logits(x_BTD[:, -1]), tuple(jax.tree.leaves(cache))

  return step, lambda: tuple(jax.tree.leaves(make()))


def _export(path: Path, function, arguments, options) -> int:
  exported = jax.export.export(jax.jit(function), platforms=options.platforms)(*arguments)
  path.write_bytes(exported.serialize())
  return exported.calling_convention_version


def _about(model, weights, options) -> dict:
  return {
    'jax': metadata.version('jax'),
    'platforms': list(options.platforms),
    'batch': options.batch,
    'capacity': options.capacity,
    'lengths': options.steps,
    'kv_cache': options.kv_cache,
    'vocabulary': model.config.vocab_size,
    'ends': list(model.config.eos_ids),
    'weights': [[name, jnp.dtype(leaf.dtype).name] for name, leaf in weights.items()],
  }


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _check_types(weights) -> None:
  for name, leaf in weights.items():
    if leaf.dtype not in safetensors_io.NAMES:
      raise ValueError(f'{name} is {leaf.dtype}, which a safetensors file cannot hold')


def _tensor(leaf) -> safetensors_io.Tensor:
  return safetensors_io.Tensor(leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))
