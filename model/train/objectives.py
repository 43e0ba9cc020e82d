"""Objectives: what a training run minimizes, as functions of models and a batch.

An objective maps the student, frozen reference models and a batch to sums over the labelled tokens.
The sum 'loss' is minimized; every sum is reported, divided by the number of labelled tokens of the
whole batch. Sums, not means, so that the micro-batches of one update count by their tokens. What
an objective has to know of the whole batch first, it says in `before`.

An objective is a frozen dataclass, so that a run can say in its identity which one it followed.
Logits are never held for all tokens: `Network.over_tokens` is the one place with chunks.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from model import stacked
from model.config import ModelConfig
from model.train.data import Batch
from model.transformer import Context, Transformer
from ops import losses

Sums = dict[str, Any]  # pytrees of float32 arrays


@dataclasses.dataclass(frozen=True)
class Network:
  """A model as an objective sees it, with the choices that do not change what it computes."""

  model: Transformer
  chunk: int  # tokens whose logits are stored at a time
  remat: stacked.Remat | None  # None: layer after layer, not in a loop

  def hidden(self, batch: Batch) -> jax.Array:
    """The normalized last hidden states of a batch, [B, T, D]."""
    places = {'positions_BT': batch.positions_BT, 'segments_BT': batch.segments_BT}
    if self.remat is None:
      return self.model.hidden(batch.tokens_BT, **places)[0]
    return stacked.hidden(self.model, batch.tokens_BT, **places, remat=self.remat)

  def hidden_and_read(self, batch: Batch, read: stacked.Read) -> tuple[jax.Array, list[Any]]:
    """The same hidden states, and what is read of the model's own blocks.

    There is one entry for each of `stacked.block_paths`; see `stacked.hidden_and_read`.
    """
    context = Context.of(self.model.config, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    x_BTD = self.model.embed(batch.tokens_BT, batch.positions_BT)
    model = self.model if self.remat is None else stacked.stack(self.model)
    x_BTD, found = stacked.hidden_and_read(model, x_BTD, context, read, self.remat or 'none')
    return x_BTD, found if model is self.model else stacked.by_layer(model, found)

  def logits(self, x: jax.Array) -> jax.Array:
    """Maps normalized hidden states [..., D] to float32 logits [..., V]."""
    return self.model.logits(x)

  def over_tokens(self, fn: Callable[..., Any], *arrays_BT: jax.Array) -> Any:
    """Applies `fn` to chunks of positions; see `losses.over_tokens`."""
    return losses.over_tokens(fn, *arrays_BT, chunk=self.chunk)


@dataclasses.dataclass(frozen=True)
class Models:
  """What an objective compares.

  own: trained arrays of the objective itself, from `Objective.parameters`.
  key: a random key of this update.
  whole: the sums of `Objective.before` over the batch of which this is a part, if it is a part.
  """

  student: Network
  references: Mapping[str, Network]
  own: Mapping[str, jax.Array]
  key: jax.Array
  whole: Sums = dataclasses.field(default_factory=dict)


class Objective(abc.ABC):
  """A loss over the labelled tokens of a batch. Subclasses are frozen dataclasses."""

  @abc.abstractmethod
  def __call__(self, models: Models, batch: Batch) -> Sums:
    """Returns sums over the labelled tokens. The scalar 'loss' is minimized."""

  def before(self, models: Models, batch: Batch) -> Sums:
    """Returns sums over the whole batch on which the loss of a part depends; usually none.

    Where a batch has several parts, this costs another forward pass of each.
    """
    del models, batch
    return {}

  def report(self, means: Sums) -> Sums:
    """Returns what is reported of an update, from the means of the sums over the whole batch."""
    return means

  def updated(self, buffers: Mapping[str, jax.Array], sums: Sums) -> dict[str, jax.Array]:
    """Returns the buffers of the student after an update, by their paths; usually as they were.

    The sums are those over the whole batch.
    """
    del sums
    return dict(buffers)

  def parameters(
    self, student: ModelConfig, references: Mapping[str, ModelConfig], *, key: jax.Array
  ) -> dict[str, jax.Array]:
    """Returns arrays of the objective's own that are trained with the student; usually none."""
    del student, references, key
    return {}

  def check(self, student: ModelConfig, references: Mapping[str, ModelConfig]) -> None:
    """Raises ValueError, before any work, if the models do not suit the objective."""
    del student, references


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
  """The negative log likelihood of the labels, in nats."""

  def __call__(self, models, batch):
    student = models.student
    nll = lambda x_BTD, labels_BT: losses.label_nll(student.logits(x_BTD), labels_BT)
    return {'loss': jnp.sum(student.over_tokens(nll, student.hidden(batch), batch.labels_BT))}
