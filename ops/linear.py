"""The only matrix product of the models, and what a weight must offer to take part in it.

Every linear layer calls `matmul(x, w)`, or `matmuls` together with those that share its input. `w`
is a `jax.Array` or a `Weight`: a frozen dataclass, registered as a pytree, that stands for an array
of shape (I, O) and stores it in its own way. What it costs and how it multiplies is the type's own
business, so a compressed model is the same model with other weight types in its tree. A table is
looked up by `rows`; as the head of a tied model it is multiplied by `matmul_transposed`.

A new weight type is a subclass under `@weight_type`; each of its arrays says which axes it has in
the alphabet of `ops.axes`, in terms of the weight's own I and O (and J for the groups along I), and
its role. That is all that saving, sharding, training and the contract tests need to know of it.
`check_fields` says what must hold of its shapes, dtypes and static fields, and is called when a
weight is built.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from ops import axes, grouped

ROWS = 8  # the fewest rows that XLA multiplies on a matrix unit
WEIGHT_TYPES: dict[str, type['Weight']] = {}

# What an array is to a weight:
#   value    numbers that are multiplied and can be trained
#   adapter  a correction of them that is trained by itself
#   scale    scales and zero points of codes; trained only where that is asked for
#   code     numbers of few bits, which gradients do not reach
#   mask     which values are kept, or where they belong
# A parameter that training changes by a rule of its own, without gradients, is a buffer.
Role = Literal['value', 'adapter', 'scale', 'code', 'mask', 'buffer']


class Weight(abc.ABC):
  """A matrix of logical shape (..., I, O), stored as some arrays.

  Experts add a leading axis to every array in the pytree: `jax.vmap(quantize)(w_EIO)`, or
  `ops.experts.stack`.
  """

  dtype: jnp.dtype  # of `dense()`; a field or a property

  # True for a type that changes the inputs, or the order of the axes, around its field `weight`.
  # That inner weight is then calibrated and compressed, on the inputs that reach it; see `core`.
  transforms_input = False

  # Name of the field whose weight performs the product, for a type that changes or rounds the
  # inputs of that product, or corrects its result. Packing for a platform descends into it.
  passes_to: ClassVar[str | None] = None

  def __post_init__(self):
    if _holds_arrays(self):
      self.check()

  def check(self) -> None:
    """Checks ranks, then what the type asks of its fields, and the weights inside it.

    Building a weight does this by itself, unless its leaves stand for something else: a map over
    the pytree may leave None, a sharding, or fewer axes (a sum, a factored statistic) in their
    place. Raises ValueError.
    """
    lead = None
    for field, value in _arrays(self):
      if isinstance(value, Weight):
        value.check()
      elif not axes.is_array(value):
        raise ValueError(f'{field.name} is a {type(value).__name__}, not an array')
      rank = len(field.metadata['axes'])
      if len(value.shape) < rank:
        raise ValueError(f'{field.name} has the shape {value.shape}, not at least {rank} axes')
      own = tuple(value.shape[: len(value.shape) - rank])
      lead = own if lead is None else lead
      if own != lead:
        raise ValueError(f'{field.name} has the leading axes {own}, and others have {lead}')
    self.check_fields()

  def check_fields(self) -> None:
    """Raises ValueError where shapes, dtypes or static fields do not fit one another."""
    return

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """The shape as if it were dense, (..., I, O)."""

  @abc.abstractmethod
  def dense(self) -> jax.Array:
    """The matrix as one array; the oracle of every test."""

  @abc.abstractmethod
  def map_values(self, fn: Callable[[jax.Array], 'Matrix']) -> 'Weight':
    """The same type with `fn` applied to the matrix of values inside it.

    This is how compressions nest: quantizing the values of an N:M-sparse matrix, for example.
    Raises ValueError if the values are codes, to which functions of numbers do not apply.
    """

  def refit(self, w_IO: jax.Array) -> 'Weight':
    """Stores another matrix as this one is stored: in its format, with its options and places.

    Raises ValueError for a type that cannot be made from a matrix alone.
    """
    raise ValueError(f'a {type(self).__name__} cannot store another matrix')

  def stored(self) -> 'Weight':
    """The form in which it is saved and multiplied once training has ended; usually itself."""
    changes = {f.name: stored(v) for f, v in _arrays(self) if isinstance(v, Weight)}
    return dataclasses.replace(self, **changes) if changes else self

  def matmul(self, x: jax.Array) -> jax.Array:
    """Multiplies x[..., I] by the weight: [..., O] in the dtype of x."""
    return matmul(x, self.dense())

  def grouped_matmul(self, x_TI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiplies consecutive groups of rows, each by its own expert, as `linear.grouped_matmul`.

    Each block of rows is multiplied by the expert that it belongs to (ops/grouped.py). One expert
    at a time is decoded; on a GPU, all experts that have rows are decoded at once.
    """
    return _in_groups(x_TI, self, group_sizes_E)

  def matmul_transposed(self, x: jax.Array) -> jax.Array:
    """Multiplies x[..., O] by the transpose: [..., I] in the dtype of x."""
    return matmul(x, self.dense().T)

  def rows(self, index: jax.Array) -> jax.Array:
    """Looks up rows by their numbers: [..., O]."""
    return self.dense()[index]

  def columns(self, index: jax.Array) -> 'Matrix':
    """Selects columns by their numbers: a weight that is stored as this one is."""
    some = {f.name: columns(v, index, f.metadata['axes']) for f, v in _arrays(self)}
    return dataclasses.replace(self, **some)

  @classmethod
  def matmuls(cls, x: jax.Array, weights: Sequence['Weight']) -> tuple[jax.Array, ...]:
    """Multiplies x by several weights of this type: a product each, unless it has a joint form."""
    return tuple(w.matmul(x) for w in weights)

  def round_inputs(self, x: jax.Array) -> jax.Array:
    """Returns x as `matmul` takes it: rounded, by a type that rounds its inputs."""
    return x

  def kernel(self, platform: str) -> str | None:
    """Names what makes `matmul` fast on 'cpu', 'gpu' or 'tpu', or None if nothing does."""
    return None if self.passes_to is None else kernel(getattr(self, self.passes_to), platform)

  @property
  def nbytes(self) -> int:
    """Bytes really stored: values, scales, zeros, indices."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


Matrix = jax.Array | Weight


def array(axes: str, role: Role = 'value', *, optional: bool = False) -> Any:
  """A dataclass field that holds an array (or a nested Weight), or None if it is `optional`.

  `axes` has one letter an axis; '_' is an axis that is never sharded. `role` is that of a plain
  array in this field; a nested Weight has roles of its own.
  """
  return dataclasses.field(metadata={'axes': axes, 'role': role, 'optional': optional})


def roles(w: Any, role: Role = 'value') -> list[Role]:
  """The role of each array of a weight, in the order of `jax.tree.leaves`.

  A plain array has the role of the field that holds it: `role`.
  """
  if not isinstance(w, Weight):
    return [role]
  return [found for field, v in _arrays(w) for found in roles(v, field.metadata['role'])]


def _arrays(w: Weight) -> Iterator[tuple[dataclasses.Field, Any]]:
  """The fields made by `array` and what they hold; an optional one that is absent is left out."""
  for field in dataclasses.fields(w):
    if 'axes' in field.metadata:
      value = getattr(w, field.name)
      if value is not None or not field.metadata['optional']:
        yield field, value


def _holds_arrays(w: Weight) -> bool:
  """Whether the leaves of a weight are its arrays, not what a map over the tree made of them."""
  return all(
    _holds_arrays(value)
    if isinstance(value, Weight)
    else axes.is_array(value) and len(value.shape) >= len(field.metadata['axes'])
    for field, value in _arrays(w)
  )


def require(condition: bool, message: str) -> None:
  """Raises ValueError with the message unless the condition holds; for `Weight.check_fields`."""
  if not condition:
    raise ValueError(message)


def is_count(value: Any) -> bool:
  """Whether a static field is a whole number above zero."""
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def weight_type(cls):
  """Registers a frozen dataclass as a weight type: fields made by `array` are its leaves."""
  fields = dataclasses.fields(cls)
  data = [f.name for f in fields if 'axes' in f.metadata]
  meta = [f.name for f in fields if 'axes' not in f.metadata]
  jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)
  WEIGHT_TYPES[cls.__name__] = cls
  return cls


def matmul(x: jax.Array, w: Matrix) -> jax.Array:
  """Multiplies x[..., I] by w[I, O] and returns [..., O] in the dtype of x."""
  _check_inputs(x, w)
  if isinstance(w, Weight):
    return w.matmul(x)
  w = w.astype(x.dtype)
  if w.ndim > 2:
    return jnp.matmul(x, w)
  if x.size // x.shape[-1] >= ROWS:
    return _product(x, w)
  eights = functools.partial(in_eights, jnp.matmul)
  return jax.lax.platform_dependent(x, w, tpu=eights, cuda=eights, default=jnp.matmul)


def matmul_transposed(x: jax.Array, table: Matrix) -> jax.Array:
  """Multiplies x[..., D] by the transpose of a table [V, D]: [..., V] in the dtype of x."""
  if isinstance(table, Weight):
    return table.matmul_transposed(x)
  return jnp.matmul(x, table.astype(x.dtype).T)


def rows(table: Matrix, index: jax.Array) -> jax.Array:
  """Looks up rows of a table [V, D] by their numbers: [..., D] in the table's dtype."""
  return table.rows(index) if isinstance(table, Weight) else table[index]


def columns(w: Matrix, index: jax.Array, letters: str = 'IO') -> Matrix:
  """Selects columns of a weight by their numbers; of an array, along axis O of its `letters`."""
  return w.columns(index) if isinstance(w, Weight) else axes.take(w, letters, 'O', index)


@jax.custom_vjp
def _product(x: jax.Array, w_IO: jax.Array) -> jax.Array:
  """x[..., I] @ w, with the gradient of w computed in the layout of w.

  JAX computes it transposed, [O, I], from a transposed copy of the gradient of the result. On CPUs
  such copies took a third of the time of LoRA's update, and a sixth of that of all parameters.
  """
  return jnp.matmul(x, w_IO)


def _forward(x, w_IO):
  # Not by `_product`, in which policies of rematerialization would not see the product.
  return jnp.matmul(x, w_IO), (x, w_IO)


def _backward(saved, y_bar):
  x, w_IO = saved
  rows = tuple(range(x.ndim - 1))
  return jnp.matmul(y_bar, w_IO.T), jnp.tensordot(x, y_bar, (rows, rows))


_product.defvjp(_forward, _backward)


def matmuls(x: jax.Array, weights: Sequence[Matrix]) -> tuple[jax.Array, ...]:
  """Multiplies x[..., I] by each of several weights, together where their type can do that.

  What depends on x alone is then done once. Returns what `matmul` does for each.
  """
  kind = type(weights[0])
  if issubclass(kind, Weight) and all(type(w) is kind for w in weights):
    for w in weights:
      _check_inputs(x, w)
    return kind.matmuls(x, weights)
  return tuple(matmul(x, w) for w in weights)


def in_eights(product: Callable, x: jax.Array, w: Matrix) -> jax.Array:
  """Multiplies x[..., I] by `product`, with its rows filled up to a multiple of eight.

  XLA takes a product of one row apart into multiplications and sums. On a TPU they go to the vector
  unit, by the compiler's own estimate at a fifteenth of the speed; a GPU may write all the products
  to memory before it adds them up, and with groups it widens the weight for them.
  """
  rows = x.reshape(-1, x.shape[-1])
  y_TO = product(jnp.pad(rows, ((0, -len(rows) % ROWS), (0, 0))), w)[: len(rows)]
  return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])


def _check_inputs(x, w):
  if x.shape[-1] != w.shape[-2]:
    raise ValueError(f'x has {x.shape[-1]} inputs, but the weight takes {w.shape[-2]}')


def grouped_matmul(x_TI: jax.Array, w: Matrix, group_sizes_E: jax.Array) -> jax.Array:
  """Multiplies consecutive groups of rows, each by its own expert.

  Row t belongs to expert e where e is the first with sum(group_sizes[:e + 1]) > t. `w` has the
  shape (E, I, O). Rows past the last group give zeros. Returns [T, O] in the dtype of x.
  Raises ValueError if the shapes do not fit.
  """
  _check_inputs(x_TI, w)
  if len(w.shape) != 3 or group_sizes_E.shape != w.shape[:1]:
    raise ValueError(f'{group_sizes_E.shape} group sizes do not fit experts of shape {w.shape}')
  if isinstance(w, Weight):
    return w.grouped_matmul(x_TI, group_sizes_E)
  # XLA expands ragged_dot to the product of all rows with all experts on CPUs, and on GPUs too: the
  # program that it compiles for an H200 (jax 0.10) holds the rows once for each expert.
  ragged = lambda x, w, sizes: jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)
  return _in_groups(x_TI, w, group_sizes_E, tpu=ragged)


def _in_groups(x_TI, w, group_sizes_E, **platforms) -> jax.Array:
  """A product for each group, in the form that is fast on the platform."""
  at_once, in_blocks = (functools.partial(f, matmul) for f in (grouped.at_once, grouped.product))
  operands = x_TI, w, group_sizes_E.astype(jnp.int32)
  return jax.lax.platform_dependent(*operands, **platforms, cuda=at_once, default=in_blocks)


def dense(w: Matrix) -> jax.Array:
  """The array that `w` stands for; leading axes are mapped over."""
  if not isinstance(w, Weight):
    return w
  fn = lambda v: v.dense()
  for _ in range(len(w.shape) - 2):
    fn = jax.vmap(fn)
  return fn(w)


def core(w: Matrix) -> Matrix:
  """The weight inside all types with `transforms_input`; `w` itself if it has none of them."""
  while isinstance(w, Weight) and w.transforms_input:
    w = w.weight
  return w


def with_core(w: Matrix, new: Matrix) -> Matrix:
  """The same weight with another core."""
  if isinstance(w, Weight) and w.transforms_input:
    return dataclasses.replace(w, weight=with_core(w.weight, new))
  return new


def map_inner(fn: Callable[[Matrix], Matrix], w: Matrix) -> Matrix:
  """Applies `fn` to the weight inside `w` that performs the product, or to `w` if none does."""
  field = w.passes_to if isinstance(w, Weight) else None
  if field is None:
    return fn(w)
  inner = getattr(w, field)
  new = map_inner(fn, inner)
  return w if new is inner else dataclasses.replace(w, **{field: new})


def innermost(w: Matrix) -> Matrix:
  """The weight inside `w` that performs the product; `w` itself if it has no such field."""
  while isinstance(w, Weight) and w.passes_to is not None:
    w = getattr(w, w.passes_to)
  return w


def kernel(w: Matrix, platform: str) -> str | None:
  """Names what makes products with `w` fast on 'cpu', 'gpu' or 'tpu', or None if nothing does."""
  if isinstance(w, Weight):
    return w.kernel(platform)
  # XLA:CPU widens half-precision weights before it multiplies.
  half_on_cpu = platform == 'cpu' and w.dtype.itemsize < 4
  return None if half_on_cpu else f'XLA, {w.dtype}'


def on_one_device(w: Matrix) -> bool:
  """Whether all arrays of a weight are on one device, and the same."""
  return len({d for leaf in jax.tree.leaves(w) for d in leaf.sharding.device_set}) <= 1


def stored(w: Matrix) -> Matrix:
  """The form in which a weight is saved once training has ended; an array stays as it is."""
  return w.stored() if isinstance(w, Weight) else w


def refit(w: Matrix, w_IO: jax.Array) -> Matrix:
  """Stores a matrix as `w` is stored: a plain array in its dtype, a weight by `Weight.refit`."""
  return w.refit(w_IO) if isinstance(w, Weight) else w_IO.astype(w.dtype)


def map_values(fn: Callable[[jax.Array], Matrix], w: Matrix) -> Matrix:
  """Applies `fn` to an array, or to the values inside a `Weight`."""
  return w.map_values(fn) if isinstance(w, Weight) else fn(w)
