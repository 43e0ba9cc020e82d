"""Registers half-quadratic quantization (HQQ) as a technique; the solver is ops/solvers/hqq.py."""

import dataclasses
from typing import Literal

from model.compress.registry import Outcome, technique
from model.compress.techniques import other_group
from ops import formats, quantized
from ops.linear import map_values
from ops.solvers import hqq as solver

USUAL_GROUP = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class HqqSpec:
  """An integer format with floating-point zero points, and the number of solver iterations.

  group_size: None is 64, or the group that `quantized.fitting_group` finds; -1 is a whole column.
  """

  format: Literal['int8', 'int4', 'int3', 'int2'] = 'int4'
  group_size: int | None = None
  iterations: int = solver.ITERATIONS

  def __post_init__(self):
    formats.check_form(self.format, symmetric=False)
    if self.group_size is not None and self.group_size < 1 and self.group_size != -1:
      raise ValueError(f'a group size is positive, or -1 for a whole column, not {self.group_size}')
    if self.iterations < 1:
      raise ValueError(f'hqq needs at least one iteration, not {self.iterations}')


@technique(
  'hqq',
  spec=HqqSpec,
  paper='Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/',
)
def hqq(w, statistics, spec):
  """Quantize with floating-point zero points of least weight error, without calibration."""
  del statistics
  events = {}

  def quantize(values):
    group = spec.group_size
    if group is None:
      group = quantized.fitting_group(values.shape[0], USUAL_GROUP)
      events.update(other_group(USUAL_GROUP, group, values.shape[0]))
    scales_JO, zeros_JO = solver.fit(
      values, spec.format, group_size=group, iterations=spec.iterations
    )
    result = quantized.encode(values, scales_JO, zeros_JO, spec.format)
    moved = (values == 0) & (result.dense() != 0)
    events['zeros that became nonzero, because zero points are not integers'] = moved.sum()
    return result

  return Outcome(map_values(quantize, w), events)
