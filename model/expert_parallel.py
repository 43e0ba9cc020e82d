"""Divides experts among devices, and brings the rows of tokens to their experts and back.

The experts are divided among the devices of the mesh axis 'expert', E / N on each of N. Both ways
run under `jax.shard_map`, and so does the choice of the experts, because XLA would gather the
scores of all tokens on every device to find the highest.

  psum        Each device has all tokens of its part of the batch, and multiplies the rows of its
              own experts; one sum over the devices follows. Exact, for any load.
              An all-reduce of T D numbers per layer and device with T tokens, and another one for
              the gradient of x in the backward pass, with T X for that of the weights.
  all_to_all  The batch is divided over the axis 'expert' too. A device fills a buffer of C rows for
              each expert, sends each to the device of its expert, and gets the outputs back. Of the
              T tokens of a device, C = factor T X / E; choices beyond it are dropped and counted.
              Without a factor C is T, and nothing is dropped.
              Two all-to-alls of E C D numbers per layer and device, of which (N - 1) / N leave it,
              and two more in the backward pass.

An all-reduce sends 2 T D (N - 1) / N numbers per device, the two all-to-alls send
2 factor T X D (N - 1) / N, but with `psum` a device has N times as many tokens. So `psum` moves
less where N is below factor X. After GShard (Lepikhin et al., 2020, https://arxiv.org/abs/2006.16668).
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from model import sharding
from model.config import ModelConfig
from model.layers.checks import check_choice
from model.layers.routed import Dispatcher, Dropless, Routed, RoutedConfig
from ops import moe

Strategy = Literal['psum', 'all_to_all']
AXIS = sharding.RULES['E']
BATCH = (*sharding.RULES['B'], AXIS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchConfig:
  """How the rows of tokens get to their experts in training. In inference no choice is dropped.

  strategy: on several devices; see the module.
  capacity_factor: an expert takes at most this multiple of an even share of the choices of a
    device's tokens. None drops nothing. On several devices, only `all_to_all` has a capacity.
  drop_order: which choices find room; see `moe.within_capacity`.
  """

  strategy: Strategy = 'psum'
  capacity_factor: float | None = None
  drop_order: moe.DropOrder = 'token'

  def __post_init__(self):
    check_choice('strategy', self.strategy, get_args(Strategy))
    check_choice('drop_order', self.drop_order, get_args(moe.DropOrder))
    if self.capacity_factor is not None and not self.capacity_factor > 0:
      raise ValueError(f'capacity_factor must be above 0, not {self.capacity_factor}')


@dataclasses.dataclass(frozen=True)
class Buffered(Dispatcher):
  """Buffers of a capacity for each expert, filled by the tokens of all devices together."""

  config: DispatchConfig

  def __call__(self, ffn, x_TD, routing):
    shape = self._shape(routing.experts_TX, ffn.config.experts)
    network = functools.partial(_in_rows, ffn.experts)
    return moe.mix_in_buffers(x_TD, routing, shape, network, self.config.drop_order)

  def kept(self, experts_TX, count):
    _, rows = self._shape(experts_TX, count)
    return moe.within_capacity(experts_TX, count, rows, self.config.drop_order)

  def _shape(self, experts_TX, count):
    return count, moe.capacity(*experts_TX.shape, count, self.config.capacity_factor)


@dataclasses.dataclass(frozen=True)
class OnMesh(Dispatcher):
  """The common part of both strategies on several devices; `axes` divide the tokens."""

  mesh: Mesh
  axes: ClassVar[tuple[str, ...]]

  def route(self, logits_TE, router, bias_E):
    self._check(logits_TE)
    local = lambda logits_TE, bias_E: moe.route(logits_TE, router, bias_E)
    inputs = self._tokens, PartitionSpec()
    return self._map(local, inputs, self._tokens, self.axes)(logits_TE, bias_E)

  @property
  def _tokens(self) -> PartitionSpec:
    return PartitionSpec(self.axes)

  @property
  def _groups(self) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes)

  def _check(self, x):
    if len(x) % self._groups:
      raise ValueError(f'{len(x)} tokens do not divide among {self._groups} devices')

  def _map(self, fn, inputs, outputs, axes):
    """Runs `fn` on each device's part; other axes than these stay with the compiler."""
    # Kernels and loops inside need not say what varies from device to device.
    options = {'mesh': self.mesh, 'axis_names': {*axes}, 'check_vma': False}
    return jax.shard_map(fn, in_specs=inputs, out_specs=outputs, **options)

  def _with_experts(self, local, ffn: Routed, x_TD, routing, outputs: PartitionSpec):
    """Runs `local(experts, count, x_TD, routing)` on each device's tokens and experts."""
    self._check(x_TD)
    count = ffn.config.experts // self.mesh.shape[AXIS]
    is_of_experts = lambda path, _: path[0] in ('gate', 'up', 'down')
    graphdef, own, rest = nnx.split(ffn, is_of_experts, ...)
    body = lambda own, x_TD, routing: local(
      nnx.merge(graphdef, own, rest).experts, count, x_TD, routing
    )
    inputs = PartitionSpec(AXIS), self._tokens, self._tokens
    return self._map(body, inputs, outputs, BATCH)(own, x_TD, routing)


@dataclasses.dataclass(frozen=True)
class Psum(OnMesh):
  """Devices multiply the rows of their own experts, and add up the outputs."""

  axes = sharding.RULES['B']

  def __call__(self, ffn, x_TD, routing):
    outputs = PartitionSpec(AXIS, self.axes)
    return jnp.sum(self._with_experts(self._local, ffn, x_TD, routing, outputs), axis=0)

  def _local(self, experts, count, x_TD, routing):
    first = jax.lax.axis_index(AXIS) * count
    ids_TX = routing.experts_TX - first
    is_own_TX = (ids_TX >= 0) & (ids_TX < count)
    # The rows of other devices' experts come last, in no group.
    plan = moe.dispatch(jnp.where(is_own_TX, ids_TX, count), count + 1)
    sizes_E = plan.sizes_E[:count]
    y_MD = experts(moe.to_experts(x_TD, plan), sizes_E)
    is_own_M = jnp.arange(len(y_MD)) < jnp.sum(sizes_E)
    y_MD = jnp.where(is_own_M[:, None], y_MD, 0)
    return moe.from_experts(y_MD, plan, jnp.where(is_own_TX, routing.weights_TX, 0))[None]


@dataclasses.dataclass(frozen=True)
class AllToAll(OnMesh):
  """Devices send buffers of rows to the devices of their experts, and get the outputs back."""

  config: DispatchConfig
  axes = BATCH

  def __call__(self, ffn, x_TD, routing):
    return self._with_experts(self._local, ffn, x_TD, routing, self._tokens)

  def kept(self, experts_TX, count):
    own = experts_TX.reshape(self._groups, -1, experts_TX.shape[-1])
    one = functools.partial(Buffered(self.config).kept, count=count)
    return jax.vmap(one)(own).reshape(experts_TX.shape)

  def _local(self, experts, count, x_TD, routing):
    devices, (tokens, choices) = self.mesh.shape[AXIS], routing.experts_TX.shape
    rows = moe.capacity(tokens, choices, devices * count, self.config.capacity_factor)
    exchange = functools.partial(jax.lax.all_to_all, axis_name=AXIS, tiled=True)

    def network(x_ECD):
      x_ECD = exchange(x_ECD, split_axis=0, concat_axis=1)  # own experts, rows of all devices
      y_ECD = _in_rows(experts, x_ECD)
      return exchange(y_ECD, split_axis=1, concat_axis=0)

    shape = devices * count, rows
    return moe.mix_in_buffers(x_TD, routing, shape, network, self.config.drop_order)


def make(config: DispatchConfig, model: ModelConfig, mesh: Mesh | None) -> Dispatcher:
  """The dispatcher of a mesh, or of one device or a mesh without an axis for experts.

  Raises ValueError if the mesh does not divide the experts of a layer, or the strategy has no
  capacity.
  """
  if mesh is None or mesh.size == 1 or AXIS not in mesh.shape:
    return Dropless() if config.capacity_factor is None else Buffered(config)
  check_experts(model, mesh)
  if config.strategy == 'all_to_all':
    return AllToAll(mesh, config)
  if config.capacity_factor is not None:
    raise ValueError("strategy 'psum' drops nothing; with a capacity_factor take 'all_to_all'")
  return Psum(mesh)


def check_experts(model: ModelConfig, mesh: Mesh) -> None:
  """Raises ValueError unless the axis 'expert' divides the experts of each layer equally."""
  devices = mesh.shape[AXIS]
  for l, layer in enumerate(model.layers):
    if isinstance(layer.ffn, RoutedConfig) and layer.ffn.experts % devices:
      raise ValueError(
        f'the {layer.ffn.experts} experts of layer {l} do not divide among {devices} devices; '
        'choose a mesh whose axis expert divides them'
      )


def batch_axes(config: DispatchConfig) -> tuple[str, ...]:
  """The mesh axes that divide the rows of a batch."""
  return BATCH if config.strategy == 'all_to_all' else sharding.RULES['B']


def use(model: nnx.Module, dispatcher: Dispatcher) -> None:
  """Sets the dispatcher of all routed layers of a model."""
  for _, module in nnx.iter_modules(model):
    if isinstance(module, Routed):
      module.dispatcher = dispatcher


def _in_rows(experts, x_ECD):
  """Runs experts on buffers of equal sizes."""
  count, size, width = x_ECD.shape
  sizes_E = jnp.full(count, size, jnp.int32)
  return experts(x_ECD.reshape(-1, width), sizes_E).reshape(count, size, -1)
