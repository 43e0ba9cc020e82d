"""Long rows on several devices: each has a part of the tokens, and attention fetches the keys.

The P devices of the mesh axis 'context' divide the tokens of a row, S / P on each. Norms, products
with weights and losses take tokens one by one, so attention alone needs tokens of other devices.
Its forms, and how many numbers per element of a key or value a device gets:

  gather  Each device gets all keys and values. Any pattern. 2 S (P - 1) / P numbers, and as many
          for the gradients. All keys and values are held at once.
  ring    The keys and values of a device go around in P - 1 steps, and the results of the steps
          are merged by the logarithms of their sums. Any pattern. As many numbers as `gather`; the
          backward pass sends the keys and values around again, and their gradients in float32 with
          them: three times as many in all. Two parts of the keys are held at a time.
  halo    A window of W keys: a device gets the last W - 1 of the device before it, and W - 1 is at
          most S / P. 2 (W - 1) numbers, and as many for the gradients. With the first F tokens of a
          text, which StreamingLLM keeps, each device also gives those of its last document: 2 P F.

A device whose tokens come later has more work in causal attention. For `gather` and `ring` a row is
therefore cut into 2 P chunks, of which device r takes chunks r and 2 P - 1 - r (zigzag); `halo`
needs the tokens in order. Positions and segments travel with the keys, so packed documents are
exact.

Ring: Liu et al. (2023), https://arxiv.org/abs/2310.01889. Gathered keys in zigzag order: Llama 3
(Dubey et al., 2024, section 3.3.2, https://arxiv.org/abs/2407.21783).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import sharding
from model.config import ModelConfig
from model.layers.checks import check_choice
from model.layers.mixers.attention import Attention, AttentionConfig
from ops import blocked
from ops.attention import attention
from ops.masks import AttentionMask
from ops.patterns import Pattern

Strategy = Literal['auto', 'gather', 'ring', 'halo']
AXIS = sharding.RULES['T']
HEADS = sharding.RULES['K']


@dataclasses.dataclass(frozen=True)
class Divided:
  """`ops.attention.attention` of rows whose tokens are divided among devices.

  `rows` are the mesh axes that divide the batch. Heads are divided by the mesh axis 'model'.
  """

  mesh: Mesh
  strategy: Strategy = 'auto'
  rows: tuple[str, ...] = sharding.RULES['B']

  def __post_init__(self):
    check_choice('strategy', self.strategy, get_args(Strategy))

  @property
  def devices(self) -> int:
    """Among which the tokens of a row are divided."""
    return self.mesh.shape[AXIS]

  def pick(self, pattern: Pattern | None, length: int, group: int) -> Strategy:
    """The form for rows of `length` tokens, where `group` query heads read a key/value head.

    'auto' takes `halo` where it can. Otherwise it takes `gather` if all keys and values have no
    more numbers than a device's own queries and outputs, 2 S K H <= 2 (S / P) N H, that is P <= N /
    K, and else `ring`.

    Raises ValueError if the tokens do not divide, or `halo` is asked for and cannot do it.
    """
    if length % self.devices:
      raise ValueError(
        f'{length} tokens of a row do not divide among {self.devices} devices of the mesh axis '
        f'{AXIS}; choose rows of a multiple of {self.devices} tokens'
      )
    obstacle = _halo_obstacle(pattern, length // self.devices)
    if self.strategy == 'halo' and obstacle:
      raise ValueError(f"{obstacle}; use strategy 'auto'")
    if self.strategy != 'auto':
      return self.strategy
    if obstacle is None:
      return 'halo'
    return 'gather' if self.devices <= group else 'ring'

  def __call__(
    self, q_BTNH, k_BTKH, v_BTKH, mask: AttentionMask, *, scale, softcap=None, sinks_N=None
  ):
    batch, length, query_heads, _ = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    form = FORMS[self.pick(mask.pattern, length, query_heads // kv_heads)]
    scores = _Scores(self.devices, mask.pattern, scale, softcap)

    def local(q_BTNH, k_BTKH, v_BTKH, marks, sinks_N):
      return form(scores, q_BTNH, (k_BTKH, v_BTKH, *marks), sinks_N)

    rows, heads = self._dividing(self.rows, batch), self._dividing((HEADS,), kv_heads)
    # Axes that do not divide their arrays stay with the compiler; axes of one device divide all.
    single = tuple(name for name, size in self.mesh.shape.items() if size == 1)
    rows = (*rows, *(name for name in single if name not in (AXIS, *rows, *heads)))
    wide, narrow = PartitionSpec(rows, AXIS, heads), PartitionSpec(rows, AXIS)
    divided = jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(wide, wide, wide, narrow, PartitionSpec(heads)),
      out_specs=wide,
      axis_names={AXIS, *rows, *heads},
      check_vma=False,
    )
    return divided(q_BTNH, k_BTKH, v_BTKH, (mask.q_positions_BT, mask.q_segments_BT), sinks_N)

  def _dividing(self, names: Sequence[str], size: int) -> tuple[str, ...]:
    """These axes if they divide this number of rows or heads, else none."""
    names = tuple(name for name in names if name in self.mesh.shape)
    return () if size % math.prod(self.mesh.shape[name] for name in names) else names


def _halo_obstacle(pattern: Pattern | None, own: int) -> str | None:
  """The reason why a halo is not enough where a device has `own` tokens, or None if it is."""
  if pattern is None or pattern.recent is None:
    what = 'all keys before a query' if pattern is None else f'the pattern {pattern}'
    return f'a halo brings the keys of a window, not {what}'
  window, _ = pattern.recent
  if window - 1 > own:
    return f'a window of {window} keys reaches beyond the {own} tokens of the device before'
  return None


# Keys, values, positions and segments: what travels.
Part = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class _Scores:
  """The settings that all keys share, and the number of devices that divide them."""

  devices: int
  pattern: Pattern | None
  scale: float
  softcap: float | None

  def mask(self, own: Part, part: Part) -> AttentionMask:
    """The mask of a device's own queries over some keys."""
    return AttentionMask(own[2], part[2], own[3], part[3], pattern=self.pattern)

  def attention(self, q_BTNH, own: Part, part: Part, sinks_N):
    """Attention to some keys."""
    mask, score = self.mask(own, part), self.score
    return attention(q_BTNH, *part[:2], mask, sinks_N=sinks_N, **score)

  @property
  def score(self):
    return {'scale': self.scale, 'softcap': self.softcap}


def _gather(scores: _Scores, q_BTNH, own: Part, sinks_N):
  whole = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True), own)
  return scores.attention(q_BTNH, own, whole, sinks_N)


def _halo(scores: _Scores, q_BTNH, own: Part, sinks_N):
  window, first = scores.pattern.recent
  reach, length = window - 1, q_BTNH.shape[1]
  parts = [_first_tokens(first, reach, own)] if first else []
  if reach:
    last = jax.tree.map(lambda x: x[:, length - reach :], own)
    to_next = [(r, r + 1) for r in range(scores.devices - 1)]
    before = jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, to_next), last)
    parts.append(_only_where(before, jax.lax.axis_index(AXIS) > 0))
  part = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts, own)
  return scores.attention(q_BTNH, own, part, sinks_N)


def _first_tokens(count: int, reach: int, own: Part) -> Part:
  """The first tokens of the documents that cross from one device to the next.

  Each device gives those of its last document, as far as it has them. Those that a device has
  anyway, of its own or in the halo of `reach` tokens, are left out.
  """
  _, _, positions_BT, segments_BT = own
  length = positions_BT.shape[1]
  is_first_BT = positions_BT < count
  if segments_BT is not None:
    is_first_BT &= segments_BT == segments_BT[:, -1:]
  place_BS = jnp.argmax(is_first_BT, 1)[:, None] + jnp.arange(count)[None]
  there_BS = jnp.minimum(place_BS, length - 1)

  def take(x):
    return jnp.take_along_axis(x, there_BS.reshape(*there_BS.shape, *(1,) * (x.ndim - 2)), 1)

  is_one_BS = (place_BS < length) & take(is_first_BT)
  gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
  found, place_BS = jax.tree.map(lambda x: gather(take(x)), own), gather(place_BS)
  here = jax.lax.axis_index(AXIS)
  source_S = jnp.arange(place_BS.shape[1])[None] // count
  in_halo_BS = (source_S == here - 1) & (place_BS >= length - reach)
  return _only_where(found, gather(is_one_BS) & (source_S < here) & ~in_halo_BS)


def _only_where(part: Part, seen) -> Part:
  """The part with the keys outside `seen` hidden from all queries."""
  k, v, positions, segments = part
  return k, v, jnp.where(seen, positions, blocked.AFTER_ALL), segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(scores: _Scores, q_BTNH, own: Part, sinks_N):
  return _ring_forward(scores, q_BTNH, own, sinks_N)[0]


def _ring_forward(scores: _Scores, q_BTNH, own: Part, sinks_N):
  def add(found, part):
    new = blocked.partial(q_BTNH, *part[:2], scores.mask(own, part), None, **scores.score)
    return blocked.merged([found, new])

  def step(carried, _):
    found, part = carried
    coming = _to_next(scores, part)  # while those that are here are multiplied
    return (add(found, part), coming), None

  # Sinks are a part of the keys, with values of zero.
  logs_N = jnp.full(q_BTNH.shape[2], blocked.MASKED / 2) if sinks_N is None else sinks_N
  logs_BTN = jnp.broadcast_to(logs_N.astype(jnp.float32)[None, None], q_BTNH.shape[:3])
  start = jnp.zeros(q_BTNH.shape, jnp.float32), logs_BTN
  (found, part), _ = jax.lax.scan(step, (start, own), length=scores.devices - 1)
  y_BTNH, logs_BTN = add(found, part)
  y_BTNH = y_BTNH.astype(q_BTNH.dtype)
  return y_BTNH, (q_BTNH, own, sinks_N, y_BTNH, logs_BTN)


def _ring_backward(scores: _Scores, saved, y_bar_BTNH):
  q_BTNH, own, sinks_N, y_BTNH, logs_BTN = saved

  def add(bars, part):
    """Adds the gradients from one part to those of q, and of the part's k and v."""
    found, mask = (y_BTNH, logs_BTN), scores.mask(own, part)
    new = blocked.gradients(q_BTNH, *part[:2], mask, found, y_bar_BTNH, **scores.score)
    return tuple(map(jnp.add, bars, new))

  def step(carried, _):
    bars, part = carried
    coming = _to_next(scores, part)
    q_bar, *bars = add(bars, part)
    return ((q_bar, *_to_next(scores, bars)), coming), None

  primals = q_BTNH, *own[:2]
  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in primals)
  (bars, part), _ = jax.lax.scan(step, (start, own), length=scores.devices - 1)
  q_bar, *bars = add(bars, part)
  bars = q_bar, *_to_next(scores, bars)  # home
  q_bar, k_bar, v_bar = (bar.astype(x.dtype) for bar, x in zip(bars, primals))
  return q_bar, (k_bar, v_bar, None, None), _sinks_bar(sinks_N, y_BTNH, logs_BTN, y_bar_BTNH)


_ring.defvjp(_ring_forward, _ring_backward)


def _sinks_bar(sinks_N, y_BTNH, logs_BTN, y_bar_BTNH):
  if sinks_N is None:
    return None
  delta_BTN = jnp.sum(y_bar_BTNH.astype(jnp.float32) * y_BTNH.astype(jnp.float32), -1)
  weights_BTN = jnp.exp(sinks_N.astype(jnp.float32)[None, None] - logs_BTN)
  return -jnp.sum(weights_BTN * delta_BTN, (0, 1)).astype(sinks_N.dtype)


def _to_next(scores: _Scores, tree):
  pairs = [(r, (r + 1) % scores.devices) for r in range(scores.devices)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


FORMS = {'gather': _gather, 'ring': _ring, 'halo': _halo}


@dataclasses.dataclass(frozen=True)
class Plan:
  """How some models attend together to rows whose tokens are divided, if they are."""

  divided: Divided | None  # None: each row is on one device
  models: tuple[ModelConfig, ...] = ()

  def use(self, model: nnx.Module) -> None:
    """Sets how all attention layers of a model are computed."""
    for _, module in nnx.iter_modules(model):
      if self.divided is not None and type(module) is Attention:
        module.compute = self.divided

  def picks(self, length: int) -> set[Strategy]:
    """The forms that the layers take. Raises ValueError as `Divided.pick` does."""
    if self.divided is None:
      return set()
    mixers = [layer.mixer for model in self.models for layer in model.layers]
    return {self.divided.pick(mixer.pattern, length, mixer.copies) for mixer in mixers}

  def placed(self, batch):
    """The batch with its tokens in the order in which causal attention gives devices equal work.

    Every array [B, T, ...] of the batch is put in that order, and the positions say what it is. A
    batch stays as it is if a layer needs the order of the text, or 2 P chunks do not divide it.
    """
    if self.divided is None:
      return batch
    rows, length = batch.tokens_BT.shape
    if 'halo' in self.picks(length) or length % (2 * self.divided.devices):
      return batch
    if batch.positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
      batch = dataclasses.replace(batch, positions_BT=positions_BT)
    order_T = zigzag(length, self.divided.devices)
    places = NamedSharding(self.divided.mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, AXIS))
    move = lambda x: jax.lax.with_sharding_constraint(jnp.take(x, order_T, axis=1), places)
    return jax.tree.map(move, batch)


def plan(
  strategy: Strategy, models: Sequence[ModelConfig], mesh: Mesh | None, rows: tuple[str, ...]
) -> Plan:
  """How attention of these models is computed on a mesh; `rows` are the axes that divide the batch.

  Raises ValueError if a layer has a mixer of a kind that needs all tokens on one device.
  """
  if mesh is None or mesh.shape.get(AXIS, 1) == 1:
    return Plan(None)
  for model in models:
    for l, layer in enumerate(model.layers):
      if type(layer.mixer) is not AttentionConfig:
        raise ValueError(
          f'the mixer of layer {l} ({type(layer.mixer).__name__}) needs all tokens of a row on one '
          f'device; choose a mesh whose axis {AXIS} is 1'
        )
  return Plan(Divided(mesh, strategy, rows), tuple(models))


def zigzag(length: int, devices: int) -> np.ndarray:
  """Which token comes to each place: device r has the chunks r and 2 P - 1 - r of 2 P."""
  chunks = np.arange(length).reshape(2 * devices, -1)
  pairs = [chunks[[r, 2 * devices - 1 - r]] for r in range(devices)]
  return np.concatenate(pairs).reshape(-1)
