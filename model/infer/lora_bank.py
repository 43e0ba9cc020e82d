"""Several low-rank adapters over one base, one of them for each row of a batch.

All rows share one product with the base, and the corrections are two small products for each row,
after Chen et al. (2023), "Punica", https://arxiv.org/abs/2310.18547. The adapter of a row is an
entry of an array, so requests for other adapters need no other program.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ops import axes
from ops.linear import Matrix, Weight, array, dense, map_values, matmul, require, weight_type
from ops.lora import LoraTensor


@weight_type
@dataclasses.dataclass(frozen=True)
class LoraBank(Weight):
  """base, and for row b of the inputs + scales[choice[b]] * a[choice[b]] @ b[choice[b]].

  a: [adapters, I, R], b: [adapters, R, O], scales: [adapters]; the first one is zero, for rows
  without an adapter. choice: int32 [rows]. As one matrix it is the base.
  """

  base: Matrix = array('IO')
  a: jax.Array = array('_IR', 'adapter')
  b: jax.Array = array('_RO', 'adapter')
  scales: jax.Array = array('_', 'adapter')
  choice: jax.Array = array('_', 'mask')

  passes_to = 'base'

  def check_fields(self):
    axes.check('IO,AIR,ARO,A', self.base, self.a, self.b, self.scales)
    require(self.choice.dtype == jnp.int32, f'a choice is of int32, not {self.choice.dtype}')

  @classmethod
  def of(cls, base: Matrix, adapters: Sequence[LoraTensor | None], choice: jax.Array) -> 'LoraBank':
    """Makes a bank of adapters; None stands for an adapter that does not change this matrix."""
    inputs, outputs = base.shape
    rank = max((one.a_IR.shape[-1] for one in adapters if one is not None), default=1)
    a = jnp.zeros((len(adapters) + 1, inputs, rank))
    b = jnp.zeros((len(adapters) + 1, rank, outputs))
    for i, one in enumerate(adapters, 1):
      if one is not None:
        a = a.at[i, :, : one.a_IR.shape[-1]].set(one.a_IR.astype(jnp.float32))
        b = b.at[i, : one.b_RO.shape[-2]].set(one.b_RO.astype(jnp.float32))
    scales = jnp.asarray([0.0, *(0.0 if one is None else one.scale for one in adapters)])
    return cls(base, a, b, scales, choice)

  @property
  def shape(self):
    return self.base.shape

  @property
  def dtype(self):
    return self.base.dtype

  def dense(self):
    return dense(self.base)

  def matmul(self, x):
    if len(x) != len(self.choice):
      raise ValueError(
        f'the inputs have {len(x)} rows, but {len(self.choice)} chose an adapter; layers of '
        'experts mix the rows of a batch and take no bank'
      )
    own = lambda side: jnp.take(side, self.choice, axis=0).astype(x.dtype)
    low = jnp.einsum('b...i,bir->b...r', x, own(self.a))
    scales = own(self.scales).reshape(-1, *(1,) * (x.ndim - 1))
    return matmul(x, self.base) + scales * jnp.einsum('b...r,bro->b...o', low, own(self.b))

  def map_values(self, fn):
    return dataclasses.replace(self, base=map_values(fn, self.base))
