"""On-policy distillation: the student writes, and the teacher says how it should go on.

Generalized knowledge distillation (GKD, Agarwal et al. 2024, https://arxiv.org/abs/2306.13649): a
fraction of the batches are continuations that the student draws itself, so it learns on the texts
that it will meet when it generates. Nothing is differentiated through the drawing. On such a batch
the loss is the divergence on the student's tokens alone; its own tokens are no hard labels.

Which batches those are, and the seeds of their rows, follow from the seed and the step; what is
written follows from them and the weights. So a killed run that resumes writes the same texts.

Watch the number of `tokens` of the updates: students that learn to end at once, or to repeat
themselves, have a low loss too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from model.train.data import NO_LABEL, Batch
from model.train.distill import Distillation
from model.train.objectives import Objective
from model.transformer import Transformer

Tokens = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OnPolicy:
  """Replaces a fraction of the batches by what the student writes.

  write: continues prompts: (model, prompts, number of new tokens, a seed for each prompt) to the
    new tokens of each, the end token included where a text ends early. Equal arguments must give
    equal tokens. `model.infer.generate` is such a function, with a line that adds the end token.
  settings: what `write` depends on besides its arguments, such as a temperature, as JSON values.
    They are part of a run's identity.
  fraction: of the batches; 1 for all.
  prompt_length: a prompt is a piece of one document within the first `prompt_length` tokens of a
    row; in a chat, the part before the assistant's first words.
  new_tokens: the largest number of tokens that the student writes for a row.
  """

  write: Callable[[Transformer, Tokens, int, Sequence[int]], Tokens]
  settings: Mapping[str, Any]
  prompt_length: int
  new_tokens: int
  fraction: float = 0.5
  seed: int = 0

  def __post_init__(self):
    if self.prompt_length < 1 or self.new_tokens < 1:
      raise ValueError(
        f'prompt_length and new_tokens must be at least 1, not {self.prompt_length} and '
        f'{self.new_tokens}'
      )
    if not 0 <= self.fraction <= 1:
      raise ValueError(f'fraction is a part of the batches, within 0 and 1, not {self.fraction}')

  @property
  def identity(self) -> dict[str, Any]:
    """All that the written texts depend on besides the weights, as JSON values."""
    names = ('fraction', 'prompt_length', 'new_tokens', 'seed')
    return {**{name: getattr(self, name) for name in names}, 'settings': dict(self.settings)}

  def check(self, objective: Objective, seq_len: int) -> None:
    """Raises ValueError if the objective or the rows do not suit texts that a student writes."""
    if not isinstance(objective, Distillation):
      raise ValueError(
        f'{type(objective).__name__} has no teacher that reads what the student writes; on-policy '
        'training needs Distillation'
      )
    if objective.hard_weight:
      raise ValueError(
        f'hard_weight is {objective.hard_weight}, but the tokens that a student has written are no '
        'labels for it; on-policy training needs hard_weight=0'
      )
    if self.prompt_length + self.new_tokens > seq_len + 1:
      raise ValueError(
        f'prompts of {self.prompt_length} and {self.new_tokens} new tokens do not fit into rows of '
        f'{seq_len} tokens and a label'
      )

  def __call__(self, batch: Batch, step: int, student: Transformer) -> Batch:
    """Returns the batch of update `step`: the given one, or the student's continuations of it."""
    random = np.random.default_rng([self.seed, step])
    if random.random() >= self.fraction:
      return batch
    prompts = [self._prompt(batch, row) for row in range(len(batch.tokens_BT))]
    seeds = [int(seed) for seed in random.integers(2**31, size=len(prompts))]
    written = self.write(student, prompts, self.new_tokens, seeds)
    self._check_written(written, len(prompts), student.config.vocab_size)
    length = batch.tokens_BT.shape[1]
    rows = [_row(prompt, new, length) for prompt, new in zip(prompts, written)]
    tokens_BT, labels_BT, segments_BT, positions_BT = map(np.stack, zip(*rows))
    return dataclasses.replace(
      batch,
      tokens_BT=tokens_BT,
      labels_BT=labels_BT,
      segments_BT=segments_BT,
      positions_BT=positions_BT,
    )

  def _prompt(self, batch: Batch, row: int) -> list[int]:
    """The longest prompt among the pieces of documents in the beginning of a row."""
    tokens, labels = (
      np.asarray(array[row][: self.prompt_length]) for array in (batch.tokens_BT, batch.labels_BT)
    )
    segments = np.asarray(batch.segments_BT[row][: self.prompt_length + 1])
    changes = np.flatnonzero(np.diff(segments)) + 1
    bounds = [0, *changes, len(segments)]
    found = [tokens[:1]]
    for start, stop, after in zip(bounds, bounds[1:], [*bounds[2:], None]):
      whole = after is not None  # another segment follows, so the last token is the end token
      piece = slice(start, max(start + 1, stop - 1) if whole else self.prompt_length)
      if segments[start] and start < len(tokens):
        found.append(_up_to_labels(tokens[piece], labels[piece]))
    return max(found, key=len).tolist()

  def _check_written(self, written: Tokens, rows: int, vocabulary: int) -> None:
    if len(written) != rows:
      raise ValueError(f'{rows} prompts were to be continued, but {len(written)} texts came back')
    for new in written:
      if len(new) > self.new_tokens or not all(0 <= token < vocabulary for token in new):
        raise ValueError(
          f'a continuation should have at most {self.new_tokens} tokens of {vocabulary}, not {new}'
        )


def _up_to_labels(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """The tokens before the first label, if a piece does not begin with one, as a chat does not."""
  labelled = np.flatnonzero(labels != NO_LABEL)
  begins = labelled[0] if len(labelled) else 0
  return tokens[: begins + 1] if begins else tokens


def _row(prompt: Sequence[int], new: Sequence[int], length: int) -> tuple[np.ndarray, ...]:
  """Tokens, labels, segments and positions of one text, each [length] int32, padded at the end.

  Only the new tokens are labels.
  """
  text = np.asarray([*prompt, *new], np.int32)
  tokens, labels = (np.zeros(length, np.int32), np.full(length, NO_LABEL, np.int32))
  used = len(text) - 1  # the last one is a label alone
  tokens[:used] = text[:-1]
  labels[len(prompt) - 1 : used] = new
  index = np.arange(length, dtype=np.int32)
  segments = (index < used).astype(np.int32)
  return tokens, labels, segments, np.where(index < used, index, index - used).astype(np.int32)
