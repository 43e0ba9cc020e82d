"""Vectors of tokens from the text alone: what stands near a token says what it is like.

Positive pointwise mutual information of tokens and their neighbours, and its leading singular
vectors (Levy and Goldberg 2014, Neural word embedding as implicit matrix factorization). They are a
space in which tokens of a new vocabulary can be compared when no model has ever used it. Vectors
have the length 1, because how long one would be says how often its token occurs.
"""

from collections.abc import Sequence

import numpy as np

NEIGHBOURS = 2048  # tokens that count as neighbours: the most frequent ones
REACH = 4  # tokens to each side
SMOOTHING = 0.75  # the power of neighbours' frequencies, as in word2vec


def vectors(documents: Sequence[np.ndarray], vocab_size: int, width: int) -> np.ndarray:
  """A vector for each token, float32 [V, D] with at most `width` columns; zeros if it never occurs.

  Raises ValueError if the documents have no two tokens beside each other.
  """
  counts = np.zeros(vocab_size, np.int64)
  for ids in documents:
    counts += np.bincount(ids, minlength=vocab_size)
  common = np.sort(np.argsort(-counts, kind='stable')[: min(NEIGHBOURS, vocab_size)])
  place = np.full(vocab_size, -1)
  place[common] = np.arange(len(common))
  pairs = np.zeros((vocab_size, len(common)), np.float32)
  for ids in documents:
    for distance in range(1, min(REACH, len(ids) - 1) + 1):
      for tokens, near in ((ids[:-distance], ids[distance:]), (ids[distance:], ids[:-distance])):
        seen = place[near] >= 0
        np.add.at(pairs, (tokens[seen], place[near[seen]]), 1)
  if not pairs.any():
    raise ValueError('the text has no two tokens beside each other, so it says nothing of them')
  found_VD = _reduced(_mutual_information(pairs), width)
  lengths = np.linalg.norm(found_VD, axis=1, keepdims=True)
  return np.divide(found_VD, lengths, out=np.zeros_like(found_VD), where=lengths > 0)


def _mutual_information(pairs: np.ndarray) -> np.ndarray:
  """max(0, log(p(t, n) / (p(t) p(n)))) of counts, with smoothed frequencies of neighbours."""
  tokens, near = pairs.sum(1, keepdims=True), pairs.sum(0, keepdims=True) ** SMOOTHING
  expected = tokens * (near / near.sum())
  ratio = np.divide(pairs, expected, out=np.ones_like(pairs), where=pairs > 0)
  return np.maximum(np.log(ratio), 0)


def _reduced(information: np.ndarray, width: int) -> np.ndarray:
  """The rows in their leading singular directions, scaled by the roots of the singular values."""
  squares, directions = np.linalg.eigh(information.T @ information)
  kept = np.argsort(-squares)[:width]
  kept = kept[squares[kept] > squares.max() * 1e-7]
  scale = np.maximum(squares[kept], 0) ** -0.25
  return ((information @ directions[:, kept]) * scale).astype(np.float32)
