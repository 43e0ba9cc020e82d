"""Distillation from stored targets (`model.train.targets`), without a teacher in memory.

The loss of a token is the cross entropy to its target minus the teacher's entropy: an unbiased
estimate of the forward KL, and of its gradient. With no draws, it is the KL to the renormalized
head, which is biased.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp

from model.tokenizer import Tokenizer
from model.train.data import Batch, PackedDataset
from model.train.distill import check_vocabulary, check_weights
from model.train.objectives import Objective
from model.train.targets import StoredTargets
from ops import axes, losses


@dataclasses.dataclass(frozen=True)
class TargetBatch(Batch):
  """A batch with the stored targets of its rows: a head of K tokens, then N draws."""

  ids_BT_: jax.Array  # [B, T, K + N] int32
  log_probs_BT_: jax.Array  # [B, T, K] float32, of the head
  entropy_BT: jax.Array  # of the teacher, in nats


jax.tree_util.register_dataclass(
  TargetBatch, [field.name for field in dataclasses.fields(TargetBatch)], []
)


@dataclasses.dataclass(frozen=True, eq=False)
class TargetDataset:
  """A data set whose batches carry the targets of their rows, for `StoredDistillation`."""

  dataset: PackedDataset
  targets: StoredTargets
  tokenizer: dataclasses.InitVar[Tokenizer | None] = None

  def __post_init__(self, tokenizer):
    self.targets.check(self.dataset, tokenizer)

  highest = property(lambda self: self.dataset.highest)
  seq_len = property(lambda self: self.dataset.seq_len)
  batch_size = property(lambda self: self.dataset.batch_size)

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the fingerprints of both."""
    both = self.dataset.fingerprint + self.targets.fingerprint
    return hashlib.sha256(both.encode()).hexdigest()

  def batch(self, step: int) -> TargetBatch:
    """The rows of update `step`, with their targets."""
    rows = self.dataset.rows_of(step)
    batch = self.dataset.take(rows)
    found = self.targets.read(rows, batch)
    return TargetBatch(
      **vars(batch),
      ids_BT_=found['ids'],
      log_probs_BT_=found['log_probs'],
      entropy_BT=found['entropy'],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredDistillation(Objective):
  """The forward KL to stored targets, with a share of hard labels; see `distill.Distillation`.

  The temperature and the vocabulary are those of the file: `of` takes them from there.
  """

  temperature: float
  vocabulary: int
  soft_weight: float = 1.0
  hard_weight: float = 0.0

  def __post_init__(self):
    check_weights(self.soft_weight, self.hard_weight)

  @classmethod
  def of(cls, targets: StoredTargets, **weights: float) -> 'StoredDistillation':
    """The objective that fits these targets; `weights` are soft_weight and hard_weight."""
    config = targets.config
    return cls(temperature=config.temperature, vocabulary=config.vocabulary, **weights)

  def __call__(self, models, batch):
    student = models.student

    def of_chunk(x_BTD, labels_BT, ids_BT_, log_probs_BT_, entropy_BT):
      logits_BTV = student.logits(x_BTD)
      soft_BT = self.temperature**2 * divergence(
        logits_BTV[..., : self.vocabulary] / self.temperature, ids_BT_, log_probs_BT_, entropy_BT
      )
      return soft_BT, losses.label_nll(logits_BTV, labels_BT)

    arrays = (batch.labels_BT, batch.ids_BT_, batch.log_probs_BT_, batch.entropy_BT)
    soft_BT, hard_BT = student.over_tokens(of_chunk, student.hidden(batch), *arrays)
    soft = jnp.sum(jnp.where(batch.labels_BT >= 0, soft_BT, 0.0))
    hard = jnp.sum(hard_BT)
    return {
      'loss': self.soft_weight * soft + self.hard_weight * hard,
      'soft': soft,
      'hard': hard,
    }

  def check(self, student, references):
    del references
    check_vocabulary(self.vocabulary, student.vocab_size)


def divergence(
  logits: jax.Array, ids: jax.Array, log_probs: jax.Array, entropy: jax.Array
) -> jax.Array:
  """Estimates KL(teacher || student) from a target: [...] in float32.

  Args:
    logits: of the student, [..., V], divided by the temperature.
    ids: [..., K + N], the head and the draws.
    log_probs: [..., K], of the head.
    entropy: [...], of the teacher.
  """
  axes.check('...V,..._,..._', logits, ids, log_probs)
  weights, own_entropy = target_weights(log_probs, ids.shape[-1] - log_probs.shape[-1])
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, ids, axis=-1)
  cross_entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(weights * picked, axis=-1)
  return cross_entropy - (entropy if own_entropy is None else own_entropy)


def target_weights(log_probs: jax.Array, draws: int) -> tuple[jax.Array, jax.Array | None]:
  """The probabilities of a target's tokens, which sum to 1: [..., K + N].

  With no draws, the head is renormalized, and its own entropy is returned with it.
  """
  head = jnp.exp(log_probs)
  mass = jnp.sum(head, axis=-1, keepdims=True)
  if not draws:
    head = head / mass
    return head, -jnp.sum(head * jnp.log(head), axis=-1)
  tail = jnp.maximum(1 - mass, 0) / draws
  return jnp.concatenate([head, jnp.repeat(tail, draws, axis=-1)], axis=-1), None
