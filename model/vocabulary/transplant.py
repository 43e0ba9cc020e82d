"""Gives a model another vocabulary: each new token gets rows that are made of old ones.

A token that both vocabularies have keeps its row. For the others there is a choice:

  omp      a sum of few shared tokens, the coefficients of which are found by orthogonal matching
           pursuit in another space where both have vectors: the embeddings of a donor, which is a
           model of the new vocabulary, or else their neighbours in a text (`cooccurrence`).
           Goddard and Fernandes Neto 2025, https://arxiv.org/abs/2506.06607
  mean     the mean of the old tokens that spell it (Gee et al. 2022, Fast Vocabulary Transfer,
           https://arxiv.org/abs/2402.09977)
  average  the mean of all old rows, so all new tokens begin alike (Hewitt 2021)
  random   drawn from the normal distribution with the mean and spread of each column

The head of a model whose head is its own gets the same sums of its own rows, and so does its bias.
The model has to be trained afterwards; all that is saved here is part of that training. Tokens are
compared by their bytes, so the two vocabularies may spell in different ways.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from model import token_files
from model import tokenizer as tokenizer_lib
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.vocabulary import rows
from model.vocabulary.spelling import Speller, token_bytes
from ops.solvers import omp

Method = Literal['omp', 'mean', 'average', 'random']
METHODS = get_args(Method)
Parts = tuple[Sequence[int], Sequence[float]]  # old ids, and what each is multiplied by
BATCH = 256  # tokens whose sums are sought at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What became of the tokens of the new vocabulary.

  tokens: of the vocabulary before and after.  shared: those that keep their row.
  made: those whose rows the method made.
  averaged: those that the method has nothing for, which get the mean of all rows.
  parameters: of the model before and after.
  """

  method: Method
  tokens: tuple[int, int]
  shared: int
  made: int
  averaged: int
  parameters: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
  """New rows as sums of old ones: of row `ids_VR` times `parts_VR`; a part of 0 adds nothing.

  The mean of all old rows times `mean_V` is added.
  """

  ids_VR: np.ndarray
  parts_VR: np.ndarray
  mean_V: np.ndarray

  @classmethod
  def of(cls, tokens: int, known: Mapping[int, Parts], centred: Iterable[int]) -> 'Sums':
    """Sums of what is known of tokens, those that are `centred` of distances from the mean.

    What nothing is known of is the mean itself.
    """
    longest = max(len(ids) for ids, _ in known.values())
    ids_VR = np.zeros((tokens, longest), np.int32)
    parts_VR = np.zeros((tokens, longest), np.float32)
    for i, (ids, parts) in known.items():
      ids_VR[i, : len(ids)], parts_VR[i, : len(ids)] = ids, parts
    unknown = [i for i in range(tokens) if i not in known]
    mean_V, about = np.zeros(tokens, np.float32), [*unknown, *centred]
    mean_V[about] = 1 - parts_VR[about].sum(1)
    return cls(ids_VR=ids_VR, parts_VR=parts_VR, mean_V=mean_V)

  def __call__(self, table: jax.Array) -> jax.Array:
    """table: [old V, ...] -> [new V, ...], float32."""
    old = table.astype(jnp.float32)
    column = lambda values_V: jnp.asarray(values_V).reshape(-1, *[1] * (old.ndim - 1))
    total = column(self.mean_V) * old.mean(0, keepdims=True)
    for ids_V, part_V in zip(self.ids_VR.T, self.parts_VR.T):
      total = total + column(part_V) * jnp.take(old, ids_V, axis=0)
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """How rows are made.

  space_VD: vectors of the new tokens by their ids, for omp.  atoms: the most in a sum.
  centred: whether omp adds up distances from the mean, in the space and in the model. The origin of
  the space means nothing in the model then, and a token that is far from all others is near the
  mean. The paper does not; its space is that of embeddings.
  """

  method: Method = 'mean'
  space_VD: np.ndarray | None = None
  atoms: int = 8
  centred: bool = False
  seed: int = 0

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f'the method is one of {", ".join(METHODS)}, not {self.method!r}')
    if self.method == 'omp' and self.space_VD is None:
      raise ValueError('omp needs vectors of the new tokens: a donor, or a text')
    if self.atoms < 1:
      raise ValueError(f'atoms must be at least 1, not {self.atoms}')


def transplant(
  model: Transformer, tokenizer: Tokenizer, new: Tokenizer, plan: Plan
) -> tuple[Transformer, Tokenizer, Report]:
  """Gives the model the vocabulary of `new`.

  Raises ValueError if `tokenizer` does not belong to the model, the embedding or the head is
  compressed, the vocabularies share no token, or `plan.space_VD` has another number of tokens.
  """
  tokenizer_lib.check(tokenizer, model.config.vocab_size)
  old, spelled, size = Speller(tokenizer), token_bytes(new), model.config.vocab_size
  shared = _shared(old, tokenizer, new, spelled)
  shared = {ours: theirs for ours, theirs in shared.items() if theirs < size}
  if not shared:
    raise ValueError('the two vocabularies have no token in common; nothing can be carried over')
  known = _known(plan, old, spelled, shared)
  pursued = [i for i in known if i not in shared] if plan.method == 'omp' else []
  sums = Sums.of(new.vocab_size, known, pursued if plan.centred else ())
  random = np.random.default_rng(plan.seed)
  made = [i for i in range(new.vocab_size) if i not in shared]

  def fill(table):
    result = sums(table)
    if plan.method != 'random':
      return result
    own = np.asarray(table, np.float32)
    drawn = random.normal(own.mean(0), own.std(0), (len(made), *own.shape[1:]))
    return result.at[jnp.asarray(made, jnp.int32)].set(drawn.astype(np.float32))

  config = model.config.replace(
    vocab_size=new.vocab_size, bos_id=new.bos_id, eos_ids=new.eos_ids, pad_id=_pad_id(new)
  )
  result = rows.map_rows(model, config, fill)
  by_method = len(made) if plan.method in ('random', 'average') else len(known) - len(shared)
  report = Report(
    method=plan.method,
    tokens=(size, new.vocab_size),
    shared=len(shared),
    made=by_method,
    averaged=len(made) - by_method,
    parameters=(rows.count(model), rows.count(result)),
  )
  return result, new, report


def _shared(old: Speller, tokenizer, new, spelled) -> dict[int, int]:
  """New id -> old id of the tokens that both have: by their bytes, names and places in a text."""
  found = {i: old.ids[data] for i, data in enumerate(spelled) if data in old.ids}
  for i in new.codec.added_ids():
    same = tokenizer.codec.id_of(new.codec.token_of(i))
    if same is not None:
      found[i] = same
  pairs = [(new.bos_id, tokenizer.bos_id), *zip(new.eos_ids, tokenizer.eos_ids)]
  for ours, theirs in pairs:
    if ours is not None and theirs is not None:
      found.setdefault(ours, theirs)
  return found


def _known(plan: Plan, old: Speller, spelled, shared) -> dict[int, Parts]:
  """The old ids and their parts of each new token that the method has something for."""
  found = {i: ([theirs], [1.0]) for i, theirs in shared.items()}
  rest = [i for i in range(len(spelled)) if i not in shared]
  if plan.method == 'mean':
    for i in rest:
      ids = old.spell(spelled[i]) if spelled[i] else []
      if ids:
        found[i] = ids, [1 / len(ids)] * len(ids)
  elif plan.method == 'omp':
    found |= _pursued(plan, shared, rest, len(spelled))
  return found


def _pursued(plan: Plan, shared, rest: list[int], tokens: int) -> dict[int, Parts]:
  space_VD = np.asarray(plan.space_VD, np.float32)
  if len(space_VD) < tokens:
    raise ValueError(
      f'the space has vectors of {len(space_VD)} tokens, but the new vocabulary has {tokens}; '
      'take a donor of the new vocabulary'
    )
  anchors = np.array([i for i in shared if space_VD[i].any()], np.int64)
  rest = [i for i in rest if space_VD[i].any()]
  if not len(anchors):
    raise ValueError('no token that both vocabularies have occurs in the space; take more text')
  count = min(plan.atoms, len(anchors), space_VD.shape[1])
  theirs = np.array([shared[i] for i in anchors])
  if plan.centred:
    space_VD = space_VD - space_VD[anchors].mean(0)
  found = {}
  for at in range(0, len(rest), BATCH):
    batch = rest[at : at + BATCH]
    filled = np.resize(batch, BATCH) if len(rest) > BATCH else batch  # one program for all batches
    taken, parts = map(np.asarray, omp.pursue(space_VD[filled], space_VD[anchors], count=count))
    for i, ids, values in zip(batch, taken, parts):
      found[i] = theirs[ids].tolist(), values.tolist()
  return found


def _pad_id(tokenizer: Tokenizer) -> int | None:
  text = token_files.content(token_files.read_settings(tokenizer.files).get('pad_token'))
  return tokenizer.codec.id_of(text) if isinstance(text, str) else None
