"""Parses recipes: lists of compression steps, with every key and value checked.

  name: wanda-2of4-int8
  description: 2:4 sparsity by Wanda, the kept values in int8
  steps:
    - wanda: {n: 2, m: 4}
    - round_to_nearest: {format: int8}
      only: ["layers.*.ffn.*"]

Only the blocks are compressed, unless `head: true` or `embedding: true` asks for more. `only` can
name these too: GPTQ in 4 bits with a head in 8 is

  head: true
  steps:
    - gptq: {format: int4}
      only: ["layers.*"]
    - round_to_nearest: {format: int8}
      only: [head]

A calibrated step on single matrices reaches the head as well, by the outputs of the final norm.

Calibrated steps measure the inputs of a layer in the partly compressed model. `sequential` says
what is compressed before a layer is measured: all layers before it ('layers', as in GPTQ's
true-sequential order), all blocks before its own ('blocks', as in SparseGPT and Wanda), or nothing
('none').

Every key and the type of every value are checked against the technique's dataclass; unknown keys
are errors. The name is also that of the output folder, so it consists of letters, digits and .-_+
"""

import dataclasses
import fnmatch
import pathlib
import re
import types
import typing
from typing import Any

import yaml

from model.compress import registry

OUTSIDE = ('head', 'embedding')  # what lies outside the blocks is compressed on request
SEQUENTIAL = ('layers', 'blocks', 'none')
NAME = r'[A-Za-z0-9_+][A-Za-z0-9_.+-]*'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One technique with its options, for the layers that match a pattern of `only`."""

  technique: str
  spec: Any
  only: tuple[str, ...] = ('*',)

  def matches(self, layer: str) -> bool:
    return any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.only)

  @property
  def row(self) -> registry.Technique:
    return registry.lookup(self.technique)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """Steps in order.

  `head` and `embedding` also compress these: the head by all steps on single matrices, an embedding
  that is only looked up by those without calibration. Where both are one matrix, because they are
  tied, either means that one.
  """

  name: str
  steps: tuple[Step, ...]
  description: str = ''
  head: bool = False
  embedding: bool = False
  sequential: str = 'layers'

  def to_dict(self) -> dict:
    """Returns the recipe as plain values, in the form that `parse` reads."""
    steps = []
    for step in self.steps:
      options = dataclasses.asdict(step.spec).items()
      entry = {step.technique: {k: list(v) if isinstance(v, tuple) else v for k, v in options}}
      if step.only != ('*',):
        entry['only'] = list(step.only)
      steps.append(entry)
    result = {'name': self.name, 'description': self.description, 'steps': steps}
    result |= {key: True for key in OUTSIDE if getattr(self, key)}
    return result | ({} if self.sequential == 'layers' else {'sequential': self.sequential})


def parse(data: Any, source: str = 'recipe') -> Recipe:
  """Builds a recipe from the values of a YAML file.

  Raises ValueError, which names `source`, the place and the nearest valid names.
  """
  _check_mapping(data, f'{source}: a recipe')
  _check_keys(data, ('name', 'description', 'steps', *OUTSIDE, 'sequential'), source)
  if not isinstance(data.get('name'), str) or not re.fullmatch(NAME, data['name']):
    raise ValueError(
      f'{source}: a recipe needs a name of letters, digits and .-_+, not {data.get("name")!r}'
    )
  if not isinstance(data.get('description', ''), str):
    raise ValueError(f'{source}: description must be a string, not {data["description"]!r}')
  if not isinstance(data.get('steps'), list) or not data['steps']:
    raise ValueError(f'{source}: a recipe needs a list of steps')
  steps = tuple(_parse_step(s, f'{source}, step {i + 1}') for i, s in enumerate(data['steps']))
  outside = {key: data.get(key, False) for key in OUTSIDE}
  for key, value in outside.items():
    if not isinstance(value, bool):
      raise ValueError(f'{source}: {key} is true or false, not {value!r}')
  sequential = data.get('sequential', 'layers')
  if sequential not in SEQUENTIAL:
    raise ValueError(f'{source}: sequential is {" or ".join(SEQUENTIAL)}, not {sequential!r}')
  return Recipe(
    name=data['name'],
    steps=steps,
    description=data.get('description', ''),
    **outside,
    sequential=sequential,
  )


def _parse_step(entry, place):
  _check_mapping(entry, f'{place}: a step')
  names = [key for key in entry if key != 'only']
  if len(names) != 1:
    raise ValueError(f'{place}: a step has one technique (and perhaps only), not {list(entry)}')
  try:
    row = registry.lookup(str(names[0]))
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from None
  only = entry.get('only', ['*'])
  if not isinstance(only, list) or not all(isinstance(p, str) for p in only) or not only:
    raise ValueError(f'{place}: only is a list of layer patterns, not {only!r}')
  return Step(technique=row.name, spec=_parse_spec(row, entry[names[0]], place), only=tuple(only))


def _parse_spec(row, options, place):
  options = {} if options is None else options
  _check_mapping(options, f'{place}: the options of {row.name}')
  _check_keys(options, [f.name for f in dataclasses.fields(row.spec)], f'{place}, {row.name}')
  hints = typing.get_type_hints(row.spec)
  for key, value in options.items():
    if not _fits(value, hints[key]):
      raise ValueError(f'{place}, {row.name}: {key} is {_words(hints[key])}, not {value!r}')
  try:
    return row.spec(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
  except (ValueError, TypeError) as error:
    raise ValueError(f'{place}, {row.name}: {error}') from None


def _fits(value, hint) -> bool:
  """Whether a YAML value has the type of a field; an int is a float, a bool is neither.

  A list is a tuple of any length.
  """
  if typing.get_origin(hint) is tuple:
    one = typing.get_args(hint)[0]
    return isinstance(value, list) and bool(value) and all(_fits(v, one) for v in value)
  if typing.get_origin(hint) is typing.Literal:
    return value in typing.get_args(hint)
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return any(_fits(value, one) for one in typing.get_args(hint))
  if hint in (int, float):
    return isinstance(value, (int, hint)) and not isinstance(value, bool)
  return not isinstance(hint, type) or isinstance(value, hint)


def _words(hint) -> str:
  if typing.get_origin(hint) is typing.Literal:
    return ' or '.join(map(str, typing.get_args(hint)))
  if typing.get_origin(hint) is tuple:
    return f'a list of {_words(typing.get_args(hint)[0])}'
  return getattr(hint, '__name__', str(hint)) if isinstance(hint, type) else str(hint)


def _check_mapping(value, what):
  if not isinstance(value, dict):
    raise ValueError(f'{what} is a mapping, not {value!r}')


def _check_keys(data, known, place):
  for key in data:
    if key not in known:
      raise ValueError(f'{place}: unknown key {key!r}{registry.nearest(str(key), known)}')


class _Loader(yaml.SafeLoader):
  """Loads YAML of plain values; a duplicate key is an error."""

  def flatten_mapping(self, node):
    # PyYAML calls this for every mapping before it builds a dict, which would keep the last value.
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
      raise yaml.YAMLError(f'{twice[0]} is given twice in one mapping{node.start_mark}')
    super().flatten_mapping(node)


def load(path: str | pathlib.Path) -> Recipe:
  """Reads a YAML file. Raises ValueError if it is not a recipe."""
  path = pathlib.Path(path)
  try:
    data = yaml.load(path.read_bytes().decode(), _Loader)
  except (UnicodeDecodeError, yaml.YAMLError) as error:
    raise ValueError(f'{path} is not valid YAML: {error}') from None
  return parse(data, str(path))


def resolve(name: str, folder: pathlib.Path) -> Recipe:
  """Finds a recipe by a path to a YAML file, a file name in `folder`, or the name of a technique.

  The name of a technique gives one step with default options. Raises ValueError with the nearest
  names if there is no such recipe.
  """
  if name.endswith(('.yaml', '.yml')):
    if not pathlib.Path(name).is_file():
      raise ValueError(f'there is no recipe file {name}')
    return load(name)
  if (folder / f'{name}.yaml').is_file():
    return load(folder / f'{name}.yaml')
  if name in registry.TECHNIQUES:
    return parse({'name': name, 'steps': [{name: {}}]}, f'recipe {name}')
  known = [*names(folder), *registry.TECHNIQUES]
  raise ValueError(f'unknown recipe {name!r}{registry.nearest(name, known)}')


def names(folder: pathlib.Path) -> list[str]:
  """Returns the names of the recipes in a folder, sorted."""
  return sorted(path.stem for path in folder.glob('*.yaml'))
