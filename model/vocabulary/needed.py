"""Which tokens a vocabulary cannot lose without cutting a text differently.

BPE. Of the merges that are possible, BPE always applies the one of the lowest rank, leftmost first.
If some merges are taken away, but none of those that were applied to a text, the choice at each
step is the same, so the segmentation is the same. The merges inside a token are those that are
applied to its own text alone, because no merge crosses its ends; `derivation` finds them. A token
that is not the result of merges (`ignore_merges` of Llama 3 looks whole words up) needs itself
alone.

Unigram. The best path through a text stays the best among fewer pieces if its own pieces stay. The
score of an unknown character is the lowest score of all pieces less a constant, and counts only
where the character is no piece, so the lowest piece and the characters of kept pieces stay as well.

Special and added tokens stay, and what spells text that nobody has seen: all bytes, and, if there
are no bytes to fall back to, all single characters.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

BYTE = re.compile(r'<0x[0-9A-F]{2}>')
KINDS = ('BPE', 'Unigram')

Ranks = Mapping[tuple[str, str], int]


def check(model: Mapping[str, Any]) -> None:
  """Raises ValueError unless `model` of a tokenizer.json is of a kind that can lose tokens."""
  if model['type'] not in KINDS:
    raise ValueError(
      f'a vocabulary of the kind {model["type"]} is not changed; {" and ".join(KINDS)} are'
    )
  marks = ('continuing_subword_prefix', 'end_of_word_suffix', 'dropout')
  found = [name for name in marks if model.get(name)]
  if found:
    raise ValueError(f'a vocabulary with {found[0]}={model[found[0]]!r} is not changed')


def token_ids(model: Mapping[str, Any]) -> dict[str, int]:
  """The ids of the tokens of `model`, added tokens left out, in the order of ids."""
  if model['type'] == 'Unigram':
    return {piece: i for i, (piece, _) in enumerate(model['vocab'])}
  return dict(sorted(model['vocab'].items(), key=lambda item: item[1]))


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
  """The merges of BPE in both forms of tokenizer.json: pairs, or texts with a space between."""
  pairs = (m.split(' ') if isinstance(m, str) else m for m in model.get('merges', ()))
  return [(left, right) for left, right in pairs]


def closure(model: Mapping[str, Any], used: Iterable[int]) -> set[int]:
  """The ids of `used` tokens with those that they need, and those that any text needs.

  Raises ValueError for a kind of vocabulary that is not known.
  """
  check(model)
  ids = token_ids(model)
  names = {i: token for token, i in ids.items()}
  tokens = {names[i] for i in used if i in names} | _of_any_text(model, ids)
  if model['type'] == 'BPE':
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(merge_pairs(model))))}
    for token in list(tokens):
      tokens |= derivation(token, ranks)
  else:
    scores = [score for _, score in model['vocab']]
    tokens |= {character for token in tokens for character in token}
    tokens.add(names[scores.index(min(scores))])
  return {ids[token] for token in tokens if token in ids} | set(used)


def derivation(token: str, ranks: Ranks) -> set[str]:
  """The tokens from which BPE builds one, its characters and itself included.

  Where merges do not lead to it, it is itself alone.
  """
  parts = list(token)
  found = {*parts, token}
  while len(parts) > 1:
    known = [(ranks[pair], at) for at, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
    if not known:
      return {token}
    _, at = min(known)
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found.add(parts[at])
  return found


def _of_any_text(model, ids) -> set[str]:
  """Bytes, the token of what is unknown, and characters where nothing else can spell them."""
  spelled = {token for token in ids if BYTE.fullmatch(token)}
  falls_back = bool(model.get('byte_fallback')) and len(spelled) == 256
  kept = spelled if falls_back else spelled | {token for token in ids if len(token) == 1}
  if model['type'] == 'Unigram':
    unknown = model.get('unk_id')
    return kept | ({model['vocab'][unknown][0]} if unknown is not None else set())
  return kept | ({model['unk_token']} if model.get('unk_token') in ids else set())
