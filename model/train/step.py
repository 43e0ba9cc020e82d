"""Computes one update of all parameters, as a pure function that is compiled once.

Master weights, gradients and optimizer state are float32. Activations have `compute_dtype`, and
weights are cast to it where they are multiplied. A batch is processed in `accumulation`
micro-batches; the sum of their losses is divided by the number of labels of the whole batch,
because a mean of means would give more weight to labels in micro-batches with fewer of them.
Nothing here names a mesh: parameters and batches arrive sharded, and the new state keeps the
shardings of the old one.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from model.train.data import Batch
from model.transformer import Transformer, matrices
from ops import losses, sparse
from ops.linear import Weight, innermost

DTYPES = ('float32', 'bfloat16')
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """How an update is computed; apart from rounding, the result does not depend on it."""

  compute_dtype: str = 'float32'
  accumulation: int = 1  # micro-batches per batch
  loss_chunk: int = 1024  # tokens whose logits are stored at a time

  def __post_init__(self):
    if self.compute_dtype not in DTYPES:
      raise ValueError(f'compute_dtype {self.compute_dtype!r} is not one of {", ".join(DTYPES)}')
    if self.accumulation < 1 or self.loss_chunk < 1:
      raise ValueError(
        f'accumulation and loss_chunk must be at least 1, not {self.accumulation}, '
        f'{self.loss_chunk}'
      )


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['params', 'opt_state', 'step'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an update changes. `step` counts the completed updates, int32."""

  params: nnx.State
  opt_state: optax.OptState
  step: jax.Array


def init(
  model: Transformer, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
  """Splits a model into its structure and an initial training state with float32 copies.

  A linear layer counts as pruned if more than a fifth of its matrix, but not all of it, is exactly
  zero (`sparse.looks_pruned`). Biases, norms, tables and matrices of zeros are initial values.

  Raises:
    ValueError: the model holds weights that gradients cannot reach, such as quantized codes, fp8
      ones included; or a pruned matrix, whose zeros the first update would undo.
  """
  graphdef, params = nnx.split(model)
  for path, leaf in jax.tree.leaves_with_path(params):
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize < 2:
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      raise ValueError(
        f'{name} is {leaf.dtype}: only floating-point weights of 16 or 32 bits can be trained, not '
        'codes; train first and quantize afterwards'
      )
  _check_unpruned(model)
  # Copies, because updates donate the state and the caller keeps the model.
  params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
  state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
  return graphdef, _replicate_scalars(state)


def _check_unpruned(model):
  for path, w in matrices(model).items():
    inner = innermost(w)
    if not isinstance(inner, Weight) and sparse.looks_pruned(inner):
      raise ValueError(
        f'{path}.weight is pruned (more than {sparse.PRUNED:.0%} of it is zero), and training '
        'would undo that; train first and prune afterwards'
      )


def make_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  like: TrainState,
  config: StepConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds the compiled update, which donates its state and keeps the shardings of `like`.

  The metrics are `loss` (mean nats per label), `tokens` (number of labels) and `grad_norm` (before
  clipping).
  """

  def step(state: TrainState, batch: Batch):
    loss, tokens, gradients = _gradients(graphdef, state.params, batch, config)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {'loss': loss, 'tokens': tokens, 'grad_norm': optax.tree.norm(gradients)}
    return TrainState(params, opt_state, state.step + 1), metrics

  shardings = None
  if _mesh(like) is not None:
    shardings = (jax.tree.map(lambda x: x.sharding, like), None)
  return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def nll_sum(
  graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, config: StepConfig
) -> jax.Array:
  """Sums the negative log likelihood of the labels of a batch, in nats."""
  model = nnx.merge(graphdef, params)
  model.dtype = jnp.dtype(config.compute_dtype)
  x_BTD, _ = model.hidden(
    batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT
  )
  nll_BT = losses.cross_entropy(x_BTD, batch.labels_BT, model.logits, chunk=config.loss_chunk)
  return jnp.sum(nll_BT)


def _gradients(graphdef, params, batch, config):
  """Returns the mean loss of a batch, its number of labels, and the gradient of the mean."""
  gradient_fn = jax.value_and_grad(lambda p, micro: nll_sum(graphdef, p, micro, config))

  def add(total, micro):
    return jax.tree.map(jnp.add, total, gradient_fn(params, micro)), None

  zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
  micro_batches = jax.tree.map(functools.partial(_split, n=config.accumulation), batch)
  (nll, gradients), _ = jax.lax.scan(add, zero, micro_batches)
  tokens = jnp.sum(batch.labels_BT >= 0)
  scale = 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)
  return nll * scale, tokens, jax.tree.map(lambda g: g * scale, gradients)


def _split(array_BT, n):
  """Distributes the rows over n micro-batches: [n, B/n, T]."""
  batch = array_BT.shape[0]
  if batch % n:
    raise ValueError(f'a batch of {batch} rows does not divide into {n} micro-batches')
  # Row b goes to micro-batch b % n, so that each micro-batch has rows of every device.
  return jnp.swapaxes(array_BT.reshape(batch // n, n, -1), 0, 1)


def _mesh(state: TrainState) -> jax.sharding.Mesh | None:
  shardings = (x.sharding for x in jax.tree.leaves(state))
  return next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)


def _replicate_scalars(state: TrainState) -> TrainState:
  """Replicates the scalars of the state over the mesh of the parameters, if they have one."""
  mesh = _mesh(state)
  if mesh is None:
    return state
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.tree.map(lambda x: jax.device_put(x, everywhere) if x.ndim == 0 else x, state)
