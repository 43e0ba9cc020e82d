"""Gives each array axis one letter and checks the shapes of arrays against these letters.

The letters are the same in names (`q_BTNH`), in einsum strings and in checks. After Noam Shazeer,
"Shape Suffixes" (2024). `check` costs nothing under jit, because shapes are static.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ALPHABET = {
  'B': 'batch',
  'T': 'query length',
  'S': 'key length',
  'D': 'model width',
  'F': 'feed-forward width',
  'U': 'width of shared experts',
  'N': 'query heads, or heads with a state',
  'Q': 'sinks, one of each query head',
  'K': 'key/value heads',
  'G': 'query heads per key/value head',
  'H': 'head width',
  'Z': 'head width of values, where it may differ',
  'Y': 'gates of heads with a state, one number each',
  'V': 'vocabulary',
  'L': 'layers',
  'E': 'experts',
  'C': 'expert capacity',
  'X': 'experts that a token chooses, or blocks of keys that a query does',
  'M': 'rows that experts or blocks multiply, one for each choice of each token',
  'R': 'rank of an adapter, of a gate or of a latent',
  'I': 'matrix input',
  'O': 'matrix output',
  'J': 'groups along the matrix input',
  'P': 'cache pages, or blocks of keys',
  'A': 'candidates of a search',
  'W': 'rotated width of a head',
}


def check(spec: str, *arrays) -> dict[str, int]:
  """Binds the letters of `spec` to the sizes of `arrays` and returns these sizes by letter.

  `spec` has one comma-separated part per array: an optional `...` for any leading axes, then one
  letter per axis; `_` is an axis of any size. An absent array is given as `None`.

  Raises:
    ValueError: the ranks or sizes disagree; the message names the axis.
  """
  parts = spec.split(',')
  if len(parts) != len(arrays):
    raise ValueError(f'{spec} describes {len(parts)} arrays, but {len(arrays)} were given')
  sizes = {}
  for part, array in zip(parts, arrays):
    if array is not None:
      _bind(part, tuple(array.shape), sizes)
  return sizes


def take(array: jax.Array, letters: str, letter: str, index: jax.Array) -> jax.Array:
  """Takes the elements with these numbers along one axis; all of them if there is no such axis.

  `letters` name the last axes of the array.
  """
  if letter not in letters:
    return array
  return jnp.take(array, index, axis=letters.index(letter) - len(letters), mode='clip')


def is_array(value: Any) -> bool:
  """Whether a leaf of a pytree is an array: a real one, a traced one or a `ShapeDtypeStruct`.

  The gradient of an integer (float0) is no array, because it has a shape but no values.
  """
  kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
  return isinstance(value, kinds) and value.dtype != jax.dtypes.float0


def check_fields(spec: str, *arrays) -> None:
  """`check` for the fields of a pytree, in its `__post_init__`: it skips what holds no arrays.

  Maps over a pytree build it anew with other leaves: None, shardings, or statistics that have
  fewer axes than the arrays. Raises ValueError as `check` does.
  """
  parts = spec.split(',')
  own = zip(parts, arrays, strict=True)
  if all(is_array(a) and a.ndim >= len(part.removeprefix('...')) for part, a in own):
    check(spec, *arrays)


def _bind(part, shape, sizes):
  letters = part.removeprefix('...')
  trailing = shape[len(shape) - len(letters) :] if letters else ()
  open_ended = part.startswith('...')
  if len(trailing) != len(letters) or (not open_ended and len(shape) != len(letters)):
    raise ValueError(f'{part} has {len(letters)} axes, but the array has the shape {shape}')
  for letter, size in zip(letters, trailing):
    if letter == '_':
      continue
    if letter not in ALPHABET:
      raise ValueError(f'{letter!r} in {part} is not an axis letter; ops/axes.py lists them')
    if sizes.setdefault(letter, size) != size:
      raise ValueError(f'axis {letter} of {part}{shape} is {size}, but was {sizes[letter]}')
