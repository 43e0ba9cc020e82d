"""Defines the modules that blocks are built of: linear layers, norms and tables.

Every matrix is the `weight` of a `Linear`, has the shape (I, O), and is multiplied only by
`ops.linear.matmul` or `matmuls`, so that any `Weight` can take its place. The table of a `Table` is
read only by `rows` and `matmul_transposed`, for the same reason. `axes` names the axes of a
module's parameter by the letters of `ops.axes`: `model.sharding` maps those of matrices to mesh
axes, and `model.units` finds what is removed together with a channel or a head.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ops import norms
from ops.linear import grouped_matmul, matmul, matmul_transposed, matmuls, rows

NormKind = Literal['rms', 'layer']
INIT_STDDEV = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
  """The residual stream: its width, the norms that read it, and the number of blocks on it."""

  width: int
  depth: int
  norm: NormKind
  norm_eps: float
  norm_offset: float  # added to the norm's scale (Gemma: 1)

  @property
  def write_stddev(self) -> float:
    """The initial spread of matrices that write to the stream.

    GPT-2's initialisation keeps the variance of the stream independent of the depth; each block
    writes twice.
    """
    return INIT_STDDEV / (2 * self.depth) ** 0.5


class Buffer(nnx.Param):
  """A parameter that has no gradient; training changes it by a rule of its own."""


class Linear(nnx.Module):
  """x[..., I] @ weight[I, O] (+ bias[O]), or E experts of that kind, which `grouped` multiplies."""

  def __init__(self, shape, *, axes: tuple[str, ...], bias: bool, rngs, dtype, stddev=INIT_STDDEV):
    self.weight = nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype))
    self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1]), dtype)) if bias else None
    self.axes = axes

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.add_bias(matmul(x, self.weight.get_value()))

  def add_bias(self, y: jax.Array) -> jax.Array:
    if self.bias is None:
      return y
    bias_O = self.bias.get_value().astype(y.dtype)
    return y + jnp.broadcast_to(bias_O, y.shape)

  @property
  def decides(self) -> bool:
    """Whether its outputs are decisions, not channels: scores of experts, or gates of a token.

    Such a layer is small, and compression leaves it as it is, because an error changes which
    experts run, or how long a head remembers.
    """
    return decides(self.axes)

  def grouped(self, x_TI: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiplies consecutive groups of rows, each by its own expert, and adds its bias: [T, O].

    The group sizes add up to at most the number of rows. Output rows after the last group are not
    defined.
    """
    y_TO = grouped_matmul(x_TI, self.weight.get_value(), group_sizes_E)
    if self.bias is None:
      return y_TO
    bias_EO = self.bias.get_value().astype(y_TO.dtype)
    return y_TO + jnp.repeat(bias_EO, group_sizes_E, axis=0, total_repeat_length=len(y_TO))


def decides(axes: tuple[str, ...]) -> bool:
  """Whether a parameter with these letters takes part in a decision, by its last axis."""
  return axes[-1] in ('E', 'Y', '_')


def letters(module: nnx.Module, rank: int) -> tuple[str, ...]:
  """The letters of the axes of a module's parameter; a bias, of lower rank, has no inputs."""
  axes = module.axes
  return axes if rank == len(axes) else (*axes[:-2], axes[-1])


def apply(x: jax.Array, *linears: Linear) -> tuple[jax.Array, ...]:
  """Applies several linear layers to the same input, so that their products can share work."""
  products = matmuls(x, [linear.weight.get_value() for linear in linears])
  return tuple(linear.add_bias(y) for linear, y in zip(linears, products))


class Norm(nnx.Module):
  """RMS norm or layer norm over the last axis, with the epsilon and the offset of the stream's."""

  def __init__(
    self, width: int, stream: StreamConfig, *, dtype, kind: NormKind | None = None, axes=('D',)
  ):
    self.kind, self.axes = kind or stream.norm, axes
    self.eps, self.offset = stream.norm_eps, stream.norm_offset
    self.scale = nnx.Param(jnp.full(width, 1 - self.offset, dtype))
    self.bias = nnx.Param(jnp.zeros(width, dtype)) if self.kind == 'layer' else None

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.bias is None:
      return norms.rms_norm(x, self.scale.get_value(), eps=self.eps, offset=self.offset)
    return norms.layer_norm(x, self.scale.get_value(), self.bias.get_value(), eps=self.eps)


class Table(nnx.Module):
  """A table of vectors that are looked up by index: token or position embeddings.

  The embedding of a tied model is its head too: `project` multiplies by the transpose.
  """

  def __init__(self, rows: int, width: int, *, axes: tuple[str, str], rngs, dtype):
    self.table = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), (rows, width), dtype))
    self.axes = axes

  def __call__(self, index: jax.Array) -> jax.Array:
    return rows(self.table.get_value(), index)

  def project(self, x: jax.Array) -> jax.Array:
    """Multiplies x[..., D] by each vector of the table: [..., V]."""
    return matmul_transposed(x, self.table.get_value())
