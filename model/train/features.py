"""Losses on what lies inside a teacher and a student: last hidden states, attention relations.

Hidden states: one minus the cosine, as in DistilBERT (Sanh et al. 2019,
https://arxiv.org/abs/1910.01108), or the mean squared error, as in TinyBERT (Jiao et al. 2019,
https://arxiv.org/abs/1909.10351). They are those after the final norm. Where the widths differ, a
trained matrix maps the student's to the teacher's.

Attention relations: MiniLM v2 (Wang et al. 2020, https://arxiv.org/abs/2012.15828). The queries of
one layer are divided anew into `heads` relation heads, and softmax(Q Q^T / sqrt(width)) of the
teacher is compared with the student's by the forward KL; the same for the keys and the values. Only
the number of relation heads must agree, so widths and heads of the models may differ. Apart from
the paper, a token relates to those that it may attend to: earlier ones of its document. Queries and
keys are taken before the head norms and the rotation, whose parts a relation head would cut.

Relations cost memory as attention without a fused kernel does, chunk by chunk: chunk * heads * T.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from model import stacked
from model.config import ModelConfig
from model.layers.lending import Lenders
from model.layers.mixers.attention import AttentionConfig
from model.train.data import Batch
from model.train.objectives import Network
from model.transformer import Context
from ops import axes, divergences
from ops.masks import AttentionMask

HiddenKind = Literal['cosine', 'mse']
PROJECTION = 'projection'
FAR = -1e30  # the logit of a relation that the mask excludes; a row of them has finite gradients


@dataclasses.dataclass(frozen=True)
class View:
  """A model and its normalized last hidden states of a batch, [B, T, D]."""

  network: Network
  hidden_BTD: jax.Array


class Feature(abc.ABC):
  """A loss between two models beside that of their logits. Subclasses are frozen dataclasses."""

  weight: float  # its factor in the loss

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """The name of its sum among the metrics."""

  @abc.abstractmethod
  def __call__(
    self, student: View, teacher: View, batch: Batch, own: Mapping[str, jax.Array]
  ) -> jax.Array:
    """The loss of each token, without the weight: [B, T] in float32."""

  def parameters(
    self, student: ModelConfig, teacher: ModelConfig, *, key: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns arrays that are trained with the student."""
    del student, teacher, key
    return {}

  @abc.abstractmethod
  def check(self, student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises ValueError if the models do not suit the feature."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hidden(Feature):
  """The distance of the last hidden states: 1 - cosine, or the mean of their squared difference."""

  kind: HiddenKind = 'cosine'
  weight: float = 1.0

  def __post_init__(self):
    if self.kind not in get_args(HiddenKind):
      raise ValueError(f'kind {self.kind!r} is not one of {", ".join(get_args(HiddenKind))}')
    _check_weight(self.weight)

  @property
  def name(self):
    return f'hidden_{self.kind}'

  def __call__(self, student, teacher, batch, own):
    x_BTD, y_BTD = (v.hidden_BTD.astype(jnp.float32) for v in (student, teacher))
    if PROJECTION in own:
      x_BTD = x_BTD @ own[PROJECTION]
    axes.check('BTD,BTD', x_BTD, y_BTD)
    if self.kind == 'mse':
      return jnp.mean(jnp.square(x_BTD - y_BTD), axis=-1)
    return 1 - jnp.sum(_unit(x_BTD) * _unit(y_BTD), axis=-1)

  def parameters(self, student, teacher, *, key):
    if student.width == teacher.width:
      return {}
    shape = (student.width, teacher.width)
    return {PROJECTION: student.width**-0.5 * jax.random.normal(key, shape)}

  def check(self, student, teacher):
    del student, teacher  # every pair of widths will do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relations(Feature):
  """The relations of queries, of keys and of values in one layer of each model.

  heads: relation heads; they divide the widths of queries, keys and values of both layers.
  student_layer, teacher_layer: negative numbers count from the last layer, as in lists.
  """

  heads: int
  student_layer: int = -1
  teacher_layer: int = -1
  weight: float = 1.0

  def __post_init__(self):
    if self.heads < 1:
      raise ValueError(f'there must be at least 1 relation head, not {self.heads}')
    _check_weight(self.weight)

  @property
  def name(self):
    return 'relations'

  def __call__(self, student, teacher, batch, own):
    ours = self._split(projections(student.network, batch, self.student_layer))
    theirs = self._split(projections(teacher.network, batch, self.teacher_layer))

    def loss(ours_part, theirs_part, positions_BT, segments_BT):
      mask = AttentionMask(
        positions_BT, batch.positions_BT, q_segments_BT=segments_BT, k_segments_BS=batch.segments_BT
      )
      seen_BTS = mask.dense()
      logs = [
        [_log_relations(q, k, seen_BTS) for q, k in zip(part, whole)]
        for part, whole in ((theirs_part, theirs), (ours_part, ours))
      ]
      return sum(jnp.mean(divergences.kl(p, q), axis=1) for p, q in zip(*logs))

    arrays = (ours, theirs, batch.positions_BT, batch.segments_BT)
    return student.network.over_tokens(loss, *arrays)

  def _split(self, arrays_BTI):
    split = lambda x: rearrange(x, 'B T (heads H) -> B T heads H', heads=self.heads)
    return tuple(split(x.astype(jnp.float32)) for x in arrays_BTI)

  def check(self, student, teacher):
    for who, config, index in (
      ('student', student, self.student_layer),
      ('teacher', teacher, self.teacher_layer),
    ):
      count = len(config.layers)
      if not -count <= index < count:
        raise ValueError(f'the {who} has the layers 0 to {count - 1}, and {index} is none of them')
      mixer = config.layers[index].mixer
      if not isinstance(mixer, AttentionConfig) or mixer.back:
        raise ValueError(
          f'layer {index} of the {who} has no attention whose relations could be compared: it is a '
          f'{type(mixer).__name__}'
        )
      for what in ('query_heads', 'kv_heads'):
        width = getattr(mixer, what) * mixer.head_width
        if width % self.heads:
          raise ValueError(
            f'{self.heads} relation heads do not divide the {width} numbers of the {who}: '
            f'{what} {getattr(mixer, what)} of width {mixer.head_width} in layer {index}'
          )


def projections(
  network: Network, batch: Batch, index: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The queries, keys and values of one layer, as its matrices give them: each [B, T, I].

  The blocks below the layer run once more for this; the compiler joins them with those of another
  forward pass of the program where both are written out alike.
  """
  model = network.model
  context = Context.of(model.config, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
  x_BTD = model.embed(batch.tokens_BT, batch.positions_BT)
  layers = list(stacked.unstack(model).layers)
  lenders = Lenders(model.config.layers)
  for block in layers[: index % len(layers)]:
    mixer = block.layer.mixer
    x_BTD, found = context.run(block, x_BTD, lenders.given(mixer, None))
    lenders.taken(mixer, found)
  block = layers[index]
  return block.attention.project(block.mixer_input(x_BTD))


def _log_relations(q, k, seen_BTS):
  """Log softmax over the keys of q k^T / sqrt(H) for [B, T, heads, H]: [B, heads, T, S]."""
  logits = jnp.einsum('BT...H,BS...H->B...TS', q, k) / q.shape[-1] ** 0.5
  return jax.nn.log_softmax(jnp.where(seen_BTS[:, None], logits, FAR))


def _unit(x_BTD):
  """Scales vectors to length 1, with a gradient at zero too."""
  return x_BTD * jax.lax.rsqrt(jnp.sum(jnp.square(x_BTD), axis=-1, keepdims=True) + 1e-12)


def _check_weight(weight: float) -> None:
  if not weight > 0:
    raise ValueError(f'the weight of a feature must be positive, not {weight}; or leave it out')
