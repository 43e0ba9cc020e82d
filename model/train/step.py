"""Computes one update of the trained arrays, as a pure function that is compiled once.

Trained arrays, their gradients and the optimizer state are float32. Frozen arrays keep the dtype
that they have, codes included, and are arguments of the update that it does not return. Activations
have `compute_dtype`, and weights are cast to it where they are multiplied. A batch is processed in
`accumulation` micro-batches; the sum of their losses is divided by the number of labels of the
whole batch, because a mean of means would give more weight to labels in micro-batches with fewer of
them. Nothing here names a mesh: arrays and batches arrive sharded, and the new state keeps the
shardings of the old one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from model import context_parallel, expert_parallel, stacked
from model.expert_parallel import DispatchConfig
from model.layers.checks import check_choice
from model.layers.routed import Dispatcher, Dropless
from model.train import partition
from model.train.data import Batch
from model.train.objectives import CrossEntropy, Models, Network, Objective, Sums
from model.train.on_policy import OnPolicy
from model.train.partition import Arrays, Selection, Structure
from model.transformer import Transformer

DTYPES = ('float32', 'bfloat16')
OWN = 'objective.'  # begins the names of trained arrays that belong to the objective
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
  """How an update is computed; apart from rounding, the result does not depend on it.

  The exceptions are `seed`, on which the random numbers of an objective depend, and a capacity of
  experts in `dispatch`.
  """

  compute_dtype: str = 'float32'
  accumulation: int = 1  # micro-batches per batch
  loss_chunk: int = 1024  # tokens whose logits are stored at a time
  remat: stacked.Remat = 'none'  # what the backward pass computes again; see model/stacked.py
  scan: bool = False  # stack layers that are alike, and run them in one loop
  dispatch: DispatchConfig = DispatchConfig()  # how tokens get to their experts, if there are any
  context: context_parallel.Strategy = 'auto'  # how keys get to queries of other devices
  seed: int = 0

  def __post_init__(self):
    if self.compute_dtype not in DTYPES:
      raise ValueError(f'compute_dtype {self.compute_dtype!r} is not one of {", ".join(DTYPES)}')
    if self.remat not in stacked.REMATS:
      raise ValueError(f'remat {self.remat!r} is not one of {", ".join(stacked.REMATS)}')
    check_choice('context', self.context, get_args(context_parallel.Strategy))
    if self.accumulation < 1 or self.loss_chunk < 1:
      raise ValueError(
        f'accumulation and loss_chunk must be at least 1, not {self.accumulation}, '
        f'{self.loss_chunk}'
      )

  @property
  def looped(self) -> bool:
    """Whether layers that are alike are stacked and run in a loop."""
    return self.scan or self.remat != 'none'


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
  """What a run learns: which arrays, by which objective, against which frozen models.

  With `on_policy`, the student writes some of the batches itself.
  """

  objective: Objective = CrossEntropy()
  selection: Selection = Selection()
  references: Mapping[str, Transformer] = dataclasses.field(default_factory=dict)
  on_policy: OnPolicy | None = None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['trained', 'opt_state', 'step', 'buffers'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an update changes. `step` counts the completed updates, int32.

  `buffers` are arrays of the model that have no gradient and that the objective changes.
  """

  trained: Arrays
  opt_state: optax.OptState
  step: jax.Array
  buffers: Arrays = dataclasses.field(default_factory=dict)

  @property
  def arrays(self) -> Arrays:
    """The arrays of the model that an update changes, and the objective's own."""
    return self.trained | self.buffers


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['arrays', 'references'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Frozen:
  """Everything that an update reads: the frozen arrays of the model, and reference models."""

  arrays: Arrays
  references: dict[str, nnx.State]


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """What is static about the updates of a run: structures, the objective, the configs."""

  structure: Structure
  references: Mapping[str, nnx.GraphDef]
  objective: Objective
  optimizer: optax.GradientTransformation
  config: StepConfig
  dispatcher: Dispatcher = Dropless()
  context: context_parallel.Plan = context_parallel.Plan(None)

  def model(self, trained: Arrays, frozen: Frozen) -> Transformer:
    """The student with these trained arrays; its layers are stacked if updates run in loops."""
    return self.structure.model({**frozen.arrays, **trained})

  def models(
    self, trained: Arrays, frozen: Frozen, key: jax.Array, whole: Sums | None = None
  ) -> Models:
    """What the objective compares; `whole` is what it knows of the whole batch."""
    references = {
      name: nnx.merge(self.references[name], state) for name, state in frozen.references.items()
    }
    own = {n.removeprefix(OWN): a for n, a in trained.items() if n.startswith(OWN)}
    student = self.model(trained, frozen)
    expert_parallel.use(student, self.dispatcher)
    for model in (student, *references.values()):
      self.context.use(model)
    return Models(
      network(student, self.config),
      {name: network(model, self.config) for name, model in references.items()},
      own,
      key,
      whole or {},
    )

  def sums(
    self, trained: Arrays, frozen: Frozen, batch: Batch, key: jax.Array, whole: Sums | None = None
  ) -> Sums:
    """The sums of the objective over the labelled tokens of a batch."""
    return self.objective(self.models(trained, frozen, key, whole), batch)


def network(model: Transformer, config: StepConfig) -> Network:
  """The model as objectives see it. Its compute dtype changes."""
  model.dtype = jnp.dtype(config.compute_dtype)
  return Network(model, config.loss_chunk, config.remat if config.looped else None)


def init(
  model: Transformer,
  optimizer: optax.GradientTransformation,
  task: Task | None = None,
  config: StepConfig | None = None,
) -> tuple[Setup, TrainState, Frozen]:
  """Divides a model into a training state with float32 copies, and what stays as it is.

  Where updates run in loops, the layers of all models are stacked, in arrays of their own.

  Raises:
    ValueError: the selection does not fit the model (see `partition`), the objective does not suit
      the models, or the experts or the mixers do not fit the mesh (see `expert_parallel.make`,
      `context_parallel.plan`).
  """
  task, config = task or Task(), config or StepConfig()
  configs = {name: reference.config for name, reference in task.references.items()}
  task.objective.check(model.config, configs)
  structure, trained, frozen = partition.partition(model, task.selection)
  references = dict(task.references)
  if config.looped and not stacked.has_stacks(model):
    structure, trained, frozen = partition.stack(model, trained)
  if config.looped:
    references = {name: stacked.stack(reference) for name, reference in references.items()}
  own = task.objective.parameters(model.config, configs, key=jax.random.key(config.seed))
  trained = trained | {OWN + name: array for name, array in own.items()}
  # Copies, because updates donate the state and the caller keeps the model.
  trained = {name: jnp.array(a, jnp.float32, copy=True) for name, a in trained.items()}
  split = {name: nnx.split(reference) for name, reference in references.items()}
  graphs = {name: graphdef for name, (graphdef, _) in split.items()}
  mesh, rows = _mesh(nnx.state(model)), expert_parallel.batch_axes(config.dispatch)
  dispatcher = expert_parallel.make(config.dispatch, model.config, mesh)
  context = context_parallel.plan(config.context, (model.config, *configs.values()), mesh, rows)
  setup = Setup(structure, graphs, task.objective, optimizer, config, dispatcher, context)
  buffers = {n: jnp.array(frozen.pop(n), jnp.float32, copy=True) for n in structure.buffers}
  state = TrainState(trained, optimizer.init(trained), jnp.zeros((), jnp.int32), buffers)
  read = Frozen(frozen, {name: state for name, (_, state) in split.items()})
  return setup, _replicate(state, _mesh(read) or _mesh(state)), read


def make_step(
  setup: Setup, like: TrainState
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]:
  """Builds the compiled update, which donates its state and keeps the shardings of `like`.

  The metrics are what the objective reports of the means per label of its sums (`loss` among them),
  `tokens` (number of labels) and `grad_norm` (before clipping).
  """

  def step(state: TrainState, frozen: Frozen, batch: Batch):
    key = jax.random.fold_in(jax.random.key(setup.config.seed), state.step)
    read = dataclasses.replace(frozen, arrays=frozen.arrays | state.buffers)
    batch = setup.context.placed(batch)
    sums, tokens, gradients = _gradients(setup, state.trained, read, batch, key)
    updates, opt_state = setup.optimizer.update(gradients, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    buffers = setup.objective.updated(state.buffers, sums)
    means = jax.tree.map(lambda a: a * _part(tokens), sums)
    metrics = {
      **setup.objective.report(means),
      'tokens': tokens,
      'grad_norm': optax.tree.norm(gradients),
    }
    return TrainState(trained, opt_state, state.step + 1, buffers), metrics

  shardings = None
  if _mesh(like) is not None:
    shardings = (jax.tree.map(lambda x: x.sharding, like), None)
  return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def _gradients(setup, trained, frozen, batch, key):
  """Returns the sums of a batch, its number of labels, and the gradient of the mean loss."""
  n = setup.config.accumulation
  parts = jax.tree.map(functools.partial(_split, n=n), batch), jax.random.split(key, n)
  before = lambda micro, key: setup.objective.before(setup.models(trained, frozen, key), micro)
  first = jax.tree.map(lambda a: a[0], parts)
  whole = _total(before, parts, jax.eval_shape(before, *first)) if n > 1 else {}

  def loss(trained, micro, key):
    sums = setup.sums(trained, frozen, micro, key, whole)
    return sums['loss'], sums

  gradient_fn = jax.grad(loss, has_aux=True)

  shapes = trained, jax.eval_shape(functools.partial(loss, trained), *first)[1]
  gradients, sums = _total(functools.partial(gradient_fn, trained), parts, shapes)
  tokens = jnp.sum(batch.labels_BT >= 0)
  return sums, tokens, jax.tree.map(lambda a: a * _part(tokens), gradients)


def _part(tokens):
  return 1.0 / jnp.maximum(tokens, 1).astype(jnp.float32)


def _total(fn, parts, shapes):
  """The sum of `fn(*part)`, which has these shapes, over the leading axis of the parts."""
  add = lambda total, part: (jax.tree.map(jnp.add, total, fn(*part)), None)
  zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  return jax.lax.scan(add, zero, parts)[0]


def _split(array_BT, n):
  """Distributes the rows over n micro-batches: [n, B/n, T]."""
  batch = array_BT.shape[0]
  if batch % n:
    raise ValueError(f'a batch of {batch} rows does not divide into {n} micro-batches')
  # Row b goes to micro-batch b % n, so that each micro-batch has rows of every device.
  return jnp.swapaxes(array_BT.reshape(batch // n, n, *array_BT.shape[1:]), 0, 1)


def _mesh(tree) -> jax.sharding.Mesh | None:
  shardings = (x.sharding for x in jax.tree.leaves(tree))
  return next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)


def _replicate(state: TrainState, mesh: jax.sharding.Mesh | None) -> TrainState:
  """Replicates what is new over the mesh of the parameters, if they have one.

  Scalars are new, and the objective's own arrays with their optimizer state.
  """
  if mesh is None:
    return state
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = lambda x: x.ndim and isinstance(x.sharding, jax.sharding.NamedSharding)
  return jax.tree.map(lambda x: x if placed(x) else jax.device_put(x, everywhere), state)
