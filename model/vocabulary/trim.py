"""Trims a vocabulary to a corpus: tokens that its text does not need are dropped, with their rows.

After Abdaoui et al. 2020 (https://arxiv.org/abs/2010.05609) and Ushio et al. 2023
(https://arxiv.org/abs/2305.15020), but exact: `needed` keeps what the segmentation rests on, so
that text of the corpus is cut into the same tokens under new ids, which `trim` checks. Kept tokens
stay in order, so their logits are computed from the same rows. The softmax has fewer terms; with
tokens dropped, each kept one has its probability divided by what all kept ones had before.

On CPUs, XLA multiplies a matrix whose columns are no multiple of 16 in another order, and a kept
logit then differs in its last bits. A multiple of 64 rows, the default, gives the same bits (found
with jax 0.10, also for a head split into blocks), and suits the tiles of other devices. Rows are
filled up with the tokens of the lowest ids that are not needed, which in BPE are the most frequent.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from model import tokenizer as tokenizer_lib
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.vocabulary import needed, renumber, rows

LOG = logging.getLogger(__name__)
BATCH = 256  # documents that are encoded at once
MULTIPLE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What trimming did.

  kept: the old ids of the tokens that stay, in the order of their new ids.
  tokens: those of the model before and after.  used: tokens that occur in the text.
  parameters: those of the model before and after.
  documents: of the text.  changed: those that are cut into other tokens; 0 with min_count 1.
  occurrences: tokens of the text.  covered: of these, those that stay.
  """

  kept: np.ndarray = dataclasses.field(repr=False)
  tokens: tuple[int, int]
  used: int
  parameters: tuple[int, int]
  documents: int
  changed: int
  occurrences: int
  covered: int


def trim(
  model: Transformer,
  tokenizer: Tokenizer,
  texts: Sequence[str],
  *,
  min_count: int = 1,
  multiple: int = MULTIPLE,
) -> tuple[Transformer, Tokenizer, Report]:
  """Drops the tokens that occur fewer than `min_count` times in the texts.

  The text that the chat template puts around messages counts as text. With `min_count` above 1,
  rare tokens are spelled by smaller ones, which changes documents that have them. The rows are
  filled up to a multiple of `multiple`, as far as there are tokens.

  Raises:
    ValueError: there is no text, the tokenizer does not belong to the model, the kind of vocabulary
      is not known, or the embedding is stored in a way in which tokens cannot be told apart; or
      text is cut differently afterwards, as no vocabulary should.
  """
  _check(model, tokenizer, min_count, multiple)
  counts = count(tokenizer, texts)
  if not counts.any():
    raise ValueError('the text has no token of this vocabulary; give a text that is not empty')
  kept = _kept(model.config, tokenizer, counts, min_count, multiple)
  trimmed = renumber.renumbered(tokenizer, kept)
  own = kept[kept < model.config.vocab_size]
  new = {int(old): i for i, old in enumerate(kept)}
  config = renumber.renumbered_config(model.config, new, len(own))
  result = rows.take(model, config, own)
  changed = sum(1 for same in _same(tokenizer, trimmed, kept, texts) if not same)
  if changed and min_count == 1:
    raise ValueError(
      f'{changed} of {len(texts)} documents are cut into other tokens by the trimmed vocabulary, '
      'which its kind should not do; it cannot be trimmed'
    )
  return (
    result,
    trimmed,
    Report(
      kept=kept,
      tokens=(model.config.vocab_size, len(own)),
      used=int((counts > 0).sum()),
      parameters=(rows.count(model), rows.count(result)),
      documents=len(texts),
      changed=changed,
      occurrences=int(counts.sum()),
      covered=int(counts[kept].sum()),
    ),
  )


def count(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
  """How often each token occurs in the texts, int64 [tokens of the tokenizer]."""
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  for ids in _encoded(tokenizer, texts):
    counts += np.bincount(ids, minlength=len(counts))
  return counts


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
  for i in range(0, len(texts), BATCH):
    for ids in tokenizer.encode_many(texts[i : i + BATCH]):
      yield np.asarray(ids, np.int64)


def _same(old: Tokenizer, new: Tokenizer, kept: np.ndarray, texts) -> Iterator[bool]:
  """Whether each text is cut into the same tokens by both."""
  for theirs, ours in zip(_encoded(old, texts), _encoded(new, texts), strict=True):
    yield np.array_equal(kept[ours], theirs)


def _check(model, tokenizer, min_count: int, multiple: int) -> None:
  tokenizer_lib.check(tokenizer, model.config.vocab_size)
  for name, value in (('min_count', min_count), ('multiple', multiple)):
    if value < 1:
      raise ValueError(f'{name} must be at least 1, not {value}')


def _kept(
  config: ModelConfig, tokenizer: Tokenizer, counts: np.ndarray, min_count: int, multiple: int
) -> np.ndarray:
  """The old ids that stay, in order."""
  model = renumber.contents(tokenizer)['model']
  used = set(np.flatnonzero(counts >= min_count).tolist())
  used |= set(_template_ids(tokenizer))
  kept = needed.closure(model, used) | renumber.special_ids(tokenizer, config)
  rows_kept = sum(i < config.vocab_size for i in kept)
  spare = (i for i in needed.token_ids(model).values() if i not in kept)
  fill = [i for _, i in zip(range(-rows_kept % multiple), spare)]
  if len(fill) < -rows_kept % multiple:
    LOG.warning('there are too few tokens for a multiple of %d rows', multiple)
  return np.array(sorted(kept | set(fill)), np.int64)


def _template_ids(tokenizer: Tokenizer) -> list[int]:
  """The tokens that the chat template puts around messages, if it takes any of a few plain ones."""
  if tokenizer.chat_template is None:
    return []
  words = [{'role': role, 'content': ''} for role in ('system', 'user', 'assistant')]
  found = []
  for messages in (words, words[1:], words[1:2]):
    try:
      found += tokenizer.encode(tokenizer.apply_chat_template(messages))
    except ValueError:
      continue  # templates refuse roles that their models do not know
  return found
