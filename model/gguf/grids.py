"""Weights whose codes a GGUF type takes over as they are.

A symmetric matrix of integers with groups of 32 inputs, or of a multiple of 32, is a Q4_0, Q5_0 or
Q8_0: w = d * code, where d may be negative. An asymmetric one is a Q4_1 or Q5_1: (code - zero) *
scale = d * code + m with d = scale and m = -zero * scale. Codes are copied bit for bit. The scales
of a file are float16. Those of 8-bit codes here are float32, and minima have more digits than
scales, so `Copied` says how far rounding moved them.
"""

import dataclasses

import numpy as np
from gguf import GGMLQuantizationType as Kind

from model.gguf.blocks import BLOCK, GRIDS
from ops.activations import ActivationQuantized
from ops.formats import FORMATS
from ops.linear import Matrix, dense, stored
from ops.quantized import QuantizedTensor
from ops.transposed import TransposedTensor

FLOAT16 = np.finfo(np.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copied:
  """Codes [I, O] with float16 scales and minima [I / 32, O]; of a table [V, D] and [V, D / 32].

  moved: the largest relative change of a scale.  shifted: that of a minimum, in steps of the grid.
  """

  codes: np.ndarray
  scales: np.ndarray
  minima: np.ndarray | None
  moved: float
  shifted: float


def kinds_of(w: Matrix) -> tuple[Kind, ...]:
  """The types that hold the codes of a weight, the smallest first."""
  w = _quantized(w)
  if w is None:
    return ()
  bits, symmetric = FORMATS[w.format].bits, w.zeros is None
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
  return tuple(
    kind
    for kind, grid in GRIDS.items()
    if grid.minimum != symmetric and grid.low <= low and high <= grid.high
  )


def copy(w: Matrix) -> Copied:
  """The codes of a weight that `kinds_of` has a type for."""
  transposed, w = isinstance(w, TransposedTensor), _quantized(w)
  blocks = w.group_size // BLOCK
  scales_JO = np.asarray(dense(w.scales), np.float32)
  narrow_JO = scales_JO.astype(np.float16)
  # Groups of smaller scales are all zeros.
  held_JO = np.abs(scales_JO) >= FLOAT16.smallest_subnormal
  safe_JO = np.where(held_JO, scales_JO, 1)
  moved_JO = np.where(held_JO, np.abs(narrow_JO.astype(np.float32) / safe_JO - 1), 0)
  minima_JO, shifted_JO = None, np.zeros_like(scales_JO)
  if w.zeros is not None:
    exact_JO = -np.asarray(w.zeros, np.float32) * scales_JO
    minima_JO = exact_JO.astype(np.float16)
    shifted_JO = np.abs(minima_JO.astype(np.float32) - exact_JO) / np.abs(safe_JO)
  turned = lambda a: a.T if transposed else a
  spread = lambda a_JO: None if a_JO is None else turned(np.repeat(a_JO, blocks, axis=0))
  return Copied(
    codes=turned(np.asarray(w.codes())),
    scales=spread(narrow_JO),
    minima=spread(minima_JO),
    moved=float(moved_JO.max()),
    shifted=float(shifted_JO.max()),
  )


def rounds_inputs(w: Matrix) -> bool:
  """Whether a weight rounds its inputs, which a file cannot say."""
  return isinstance(_matrix(w), ActivationQuantized)


def _matrix(w: Matrix) -> Matrix:
  """A weight as it is saved; of a table, the weight whose outputs are the tokens."""
  w = stored(w)
  return w.weight if isinstance(w, TransposedTensor) else w


def _quantized(w: Matrix) -> QuantizedTensor | None:
  """The matrix of integers inside a weight, if a GGUF type has its groups and its scales."""
  w = _matrix(w)
  w = w.values if isinstance(w, ActivationQuantized) else w
  if not isinstance(w, QuantizedTensor) or not FORMATS[w.format].integer or w.group_size % BLOCK:
    return None
  return w if float(np.abs(dense(w.scales)).max()) <= FLOAT16.max else None
