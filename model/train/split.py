"""Divides documents into those to train on and those to measure on, by their content.

A document's part follows from the SHA-256 of its content, so copies of a document share a part, and
a part stays the same when other documents are added or removed.
"""

import dataclasses
import hashlib
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """The indices of the documents of both parts, in their order."""

  train: tuple[int, ...]
  held_out: tuple[int, ...]
  fingerprint: str  # SHA-256 over the contents and their parts


def by_content(contents: Sequence[str], *, held_out: float = 0.05) -> Split:
  """Holds out documents of about the fraction `held_out`, at least one.

  Where the hashes would leave a part empty, the documents with the lowest ones are held out.

  Raises:
    ValueError: the fraction is not within 0 and 1, or there are not two documents that differ.
  """
  if not 0 < held_out < 1:
    raise ValueError(f'held_out is a fraction between 0 and 1, not {held_out}')
  digests = [hashlib.sha256(content.encode()).digest() for content in contents]
  distinct = sorted(set(digests))
  if len(distinct) < 2:
    raise ValueError(
      f'{len(distinct)} documents that differ cannot be divided into two parts; give more'
    )
  chosen = {digest for digest in distinct if _fraction(digest) < held_out}
  if len(chosen) in (0, len(distinct)):
    chosen = set(distinct[: min(max(1, round(held_out * len(distinct))), len(distinct) - 1)])
  fingerprint = hashlib.sha256()
  for digest in digests:
    fingerprint.update((b'held out' if digest in chosen else b'train') + digest)
  return Split(
    train=tuple(i for i, digest in enumerate(digests) if digest not in chosen),
    held_out=tuple(i for i, digest in enumerate(digests) if digest in chosen),
    fingerprint=fingerprint.hexdigest(),
  )


def _fraction(digest: bytes) -> float:
  return int.from_bytes(digest[:8], 'big') / 2**64
