"""What a mixer keeps of past tokens: a cache for each layer, of the mixer's own type.

A cache is a frozen dataclass and a pytree, so that a jitted program can take and donate it. Each
array begins with the rows of the batch and names its axes by letters, as weights do, so meshes
divide caches by the same table. The config of a mixer makes an empty cache (`MixerConfig.cache`).
Only the mixer's module calls `attend`, or the method that its kind has in place of it.
"""

import abc
import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

CacheFormat = Literal['float', 'bf16', 'int8', 'int4']


class Cache(abc.ABC):
  """The past tokens of the rows of a batch, in one layer.

  The rows may have different lengths. Row b takes T new tokens at the positions positions_BT[b],
  from its length or an earlier position on; the caller ensures that they fit. Padding comes after
  the tokens of a row and repeats their last position. How far a row can be set back depends on the
  kind: a cache of states (`model.layers.mixers.state`) can only begin anew.
  """

  # Whether every array is [B, S, ...] with position s of a row in slot s, and nothing else is kept.
  # Such a row can be set back to any length, and any beginning of it copied to another row.
  by_position = False

  # By how many tokens a row can be set back at any time, if not to any length.
  spare = 0

  @property
  @abc.abstractmethod
  def capacity(self) -> int | None:
    """The number of tokens that a row can hold; None: any number."""

  def insert(self, row: jax.Array | int, one: Self) -> Self:
    """Returns the cache with the only row of another one, of equal capacity, in place of a row."""
    put = lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, row, 0)
    return jax.tree.map(put, self, one)

  def letters(self) -> Self:
    """The letters of its axes in place of each array."""
    return _letters(self)


def is_token(positions_BT: jax.Array) -> jax.Array:
  """False for padding, which repeats the position before it: bool [B, T]."""
  later_BT = positions_BT[:, 1:] > positions_BT[:, :-1]
  return jnp.pad(later_BT, ((0, 0), (1, 0)), constant_values=True)


def array(axes: str) -> Any:
  """A field of a cache that holds an array, with a letter for each axis; '_' is replicated."""
  return dataclasses.field(metadata={'axes': axes})


def rows(axes: str) -> Any:
  """A field of a cache that holds another such dataclass, with these axes in place of its rows.

  Where one of them is an axis within too, of size 1, it is left out there.
  """
  return dataclasses.field(metadata={'rows': axes})


def static(**options) -> Any:
  """A field of a cache that holds no array, and is the same for all rows."""
  return dataclasses.field(metadata={'static': True}, **options)


def register(cls):
  """Makes a dataclass of arrays, and of other such dataclasses, a pytree. A class decorator."""
  fields = dataclasses.fields(cls)
  names = lambda static: [field.name for field in fields if _is_static(field) == static]
  return jax.tree_util.register_dataclass(cls, data_fields=names(False), meta_fields=names(True))


def _letters(value):
  fields = [field for field in dataclasses.fields(value) if not _is_static(field)]
  return dataclasses.replace(
    value, **{field.name: _field_letters(value, field) for field in fields}
  )


def _field_letters(value, field: dataclasses.Field):
  if 'axes' in field.metadata:
    return field.metadata['axes']
  inner, rows = _letters(getattr(value, field.name)), field.metadata.get('rows', 'B')
  own = lambda letters: ''.join(letter for letter in letters[1:] if letter not in rows)
  return jax.tree.map(lambda letters: rows + own(letters), inner)


def _is_static(field: dataclasses.Field) -> bool:
  return field.metadata.get('static', False)
