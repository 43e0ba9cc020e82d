"""Says how many bytes a training run will need, before it starts.

What a run holds from update to update follows from shapes: trained arrays, frozen arrays, the
optimizer's state and a batch are the arguments of the compiled update, to the byte. (Adafactor also
keeps a few numbers that it does not read, and these are not.) What an update needs on top while it
runs, gradients and activations, is in the compiler's own plan of its buffers (`memory_analysis`),
which exists once the update is compiled and before any of it is allocated.

All functions take real arrays or `jax.ShapeDtypeStruct`s, and count the bytes of one device: the
largest share, where arrays are sharded.
"""

import dataclasses
import math
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
  """Bytes on one device.

  activations: temporary arrays beside the gradients, and results that replace no argument. They
    include what the optimizer computes in passing. None before the update is compiled.
  """

  trained: int
  frozen: int
  optimizer: int
  batch: int
  gradients: int
  activations: int | None = None

  @property
  def arguments(self) -> int:
    """What stays allocated while the run waits for a batch, and the batch."""
    return self.trained + self.frozen + self.optimizer + self.batch

  @property
  def total(self) -> int:
    """The most that is allocated at a time; without activations before the update is compiled."""
    return self.arguments + self.gradients + (self.activations or 0)

  def __str__(self) -> str:
    parts = dataclasses.asdict(self) | {'in all': self.total}
    return ', '.join(f'{name} {n / 1e6:,.1f} MB' for name, n in parts.items() if n is not None)


def nbytes(tree: Any) -> int:
  """The bytes that the arrays of a tree take on one device."""
  return sum(map(_nbytes, jax.tree.leaves(tree)))


def optimizer_state(optimizer: optax.GradientTransformation, trained: Any) -> Any:
  """The shapes of an optimizer's state for these trained arrays, on one device."""
  return jax.eval_shape(optimizer.init, trained)


def plan(*, trained: Any, frozen: Any, opt_state: Any, batch: Any, compiled=None) -> MemoryPlan:
  """Counts the bytes of a run.

  `opt_state` is all that an update changes beside the trained arrays (`optimizer_state`, and a step
  counter). Gradients have the shapes of the trained arrays, in float32. `compiled` is the compiled
  update, `jax.jit(step).lower(...).compile()`, of these arguments.
  """
  gradients = sum(math.prod(_shard(leaf)) * 4 for leaf in jax.tree.leaves(trained))
  activations = None
  if compiled is not None:
    memory = compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # An update may need fewer buffers than all gradients, where one gives way to the next.
    activations = max(0, memory.temp_size_in_bytes + new - gradients)
  return MemoryPlan(
    trained=nbytes(trained),
    frozen=nbytes(frozen),
    optimizer=nbytes(opt_state),
    batch=nbytes(batch),
    gradients=gradients,
    activations=activations,
  )


def _nbytes(leaf) -> int:
  return math.prod(_shard(leaf)) * leaf.dtype.itemsize


def _shard(leaf) -> tuple[int, ...]:
  """The shape of the part of an array that one device holds."""
  sharding = getattr(leaf, 'sharding', None)
  return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
