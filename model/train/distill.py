"""Knowledge distillation: a student learns to predict as a frozen teacher does.

  loss = soft_weight * divergence(teacher, student) + hard_weight * cross entropy(labels)
       + the features' losses

Hinton et al. (2015), https://arxiv.org/abs/1503.02531. The teacher is a reference of the training
task and never part of its state. It may be compressed: its weights stay as they are.

Naive distillation holds four or five arrays of B T V numbers. Here only the hidden states of both
models are held; the logits are computed a chunk of tokens at a time and again in the backward pass.
That costs one more product with each head.

DistilBERT's loss is Distillation(soft_weight=5, hard_weight=2, features=(Hidden(),),
divergence=Divergence(temperature=2)); that of Minitron is Distillation().
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from model.config import ModelConfig
from model.train.data import Batch
from model.train.features import Feature, View
from model.train.objectives import Models, Objective, Sums
from ops import losses
from ops.divergences import Divergence

TEACHER = 'teacher'  # the name of the reference that every objective here reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
  """Follows the reference named 'teacher'.

  The sums are 'loss', 'soft' (the divergence), 'hard' (the cross entropy, which is reported even if
  its weight is 0), and one for each feature.

  vocabulary: the tokens of the shared tokenizer, where the models are padded to different widths;
    see `model.shared_vocabulary.length`. The padding is cut before the softmax of the divergence,
    so it gets a gradient from the hard loss alone.
  """

  divergence: Divergence = Divergence()
  soft_weight: float = 1.0
  hard_weight: float = 0.0
  features: tuple[Feature, ...] = ()
  vocabulary: int | None = None

  def __post_init__(self):
    check_weights(self.soft_weight, self.hard_weight, also=len(self.features))
    names = [feature.name for feature in self.features]
    if len(set(names)) < len(names):
      raise ValueError(f'each feature may occur once, but they are {", ".join(names)}')

  def __call__(self, models: Models, batch: Batch) -> Sums:
    student, teacher = (
      View(network, network.hidden(batch))
      for network in (models.student, models.references[TEACHER])
    )
    real_BT = batch.labels_BT >= 0
    soft_BT, hard_BT = self._of_logits(student, teacher, batch)
    sums = {'hard': jnp.sum(hard_BT)}
    loss = self.hard_weight * sums['hard']
    if self.soft_weight:
      sums['soft'] = jnp.sum(jnp.where(real_BT, soft_BT, 0.0))
      loss += self.soft_weight * sums['soft']
    for feature in self.features:
      loss_BT = feature(student, teacher, batch, models.own)
      sums[feature.name] = jnp.sum(jnp.where(real_BT, loss_BT, 0.0))
      loss += feature.weight * sums[feature.name]
    return {'loss': loss, **sums}

  def _of_logits(self, student: View, teacher: View, batch: Batch):
    """The divergence and the cross entropy of each token, [B, T] each."""

    def of_chunk(x_BTD, y_BTD, labels_BT):
      logits_BTV = student.network.logits(x_BTD)
      hard_BT = losses.label_nll(logits_BTV, labels_BT)
      if not self.soft_weight:
        return jnp.zeros_like(hard_BT), hard_BT
      soft_BT = self.divergence(teacher.network.logits(y_BTD), logits_BTV, self.vocabulary)
      return soft_BT, hard_BT

    arrays = student.hidden_BTD, teacher.hidden_BTD, batch.labels_BT
    return student.network.over_tokens(of_chunk, *arrays)

  def parameters(self, student, references, *, key):
    teacher, own = references[TEACHER], {}
    for feature in self.features:
      own |= feature.parameters(student, teacher, key=key)
    return own

  def check(self, student: ModelConfig, references: Mapping[str, ModelConfig]) -> None:
    teacher = teacher_of(references)
    widths = student.vocab_size, teacher.vocab_size
    if self.vocabulary is None and widths[0] != widths[1]:
      raise ValueError(
        f'the student has {widths[0]} tokens and the teacher {widths[1]}: a teacher of another '
        'tokenizer, or one that is padded to another width. If the tokenizer is the same, give its '
        'length as `vocabulary`'
      )
    check_vocabulary(self.vocabulary, *widths)
    for feature in self.features:
      feature.check(student, teacher)


def teacher_of(references: Mapping[str, ModelConfig]) -> ModelConfig:
  """The config of the teacher; raises ValueError if there is none."""
  if TEACHER not in references:
    names = ', '.join(references) or 'none'
    raise ValueError(f'distillation needs a reference {TEACHER!r}; the task has {names}')
  return references[TEACHER]


def check_vocabulary(vocabulary: int | None, *widths: int) -> None:
  """Raises ValueError unless 1 <= vocabulary <= the widths."""
  if vocabulary is not None and not 1 <= vocabulary <= min(widths):
    raise ValueError(f'vocabulary must be within 1 and {min(widths)}, not {vocabulary}')


def check_weights(soft: float, hard: float, *, also: int = 0) -> None:
  """Raises ValueError for a negative weight, or if nothing is left to learn."""
  if soft < 0 or hard < 0:
    raise ValueError(f'soft_weight and hard_weight must not be negative, as {soft} or {hard} is')
  if not (soft or hard or also):
    raise ValueError('soft_weight and hard_weight are 0 and there is no feature: nothing to learn')
