"""The quality of models on long texts: perplexity by position, and needles by depth.

Of each context there are the perplexity of the tokens between the context before it and this one,
with all before them in sight as far as the layers see, and the probability of the right words of
needles in texts of this length. Models are read without a cache.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import common
from model import corpus
from model.config import ModelConfig
from model.eval import needle, positions
from model.eval.needle import Haystack
from model.eval.records import Metric
from model.infer.prepare import prepare
from model.tokenizer import Tokenizer, window_bos
from model.transformer import Transformer

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STRIDE = 997  # tokens by which the filler of each further haystack is turned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
  """The texts that are measured: rows for perplexity, and haystacks by context."""

  rows_BT: np.ndarray
  contexts: tuple[int, ...]
  haystacks: Mapping[int, list[Haystack]]
  about: dict  # for the records


def probe(
  text: str,
  tokenizer: Tokenizer,
  config: ModelConfig,
  contexts: Sequence[int],
  *,
  rows: int,
  haystacks: Mapping[int, int],
) -> Probe:
  """Cuts the held-out part of a text into rows of the longest context, and makes haystacks of it.

  `haystacks` says how many there are of each length, which is one of the contexts; `config`
  whether rows begin with a BOS. Raises ValueError if the text is too short.
  """
  split, longest = corpus.load(text), max(contexts)
  bos_id = window_bos(tokenizer, config, 'auto')
  tokens_T = np.asarray(tokenizer.encode('\n'.join(split.held_out)), np.int32)
  length = longest if bos_id is None else longest - 1
  if len(tokens_T) < rows * length:
    raise ValueError(
      f'the held-out part of {text} has {len(tokens_T):,} tokens, fewer than {rows} x {longest:,}; '
      'choose shorter contexts or a longer text'
    )
  rows_BT = tokens_T[: rows * length].reshape(rows, length)
  if bos_id is not None:
    rows_BT = np.pad(rows_BT, ((0, 0), (1, 0)), constant_values=bos_id)
  make = lambda context, i: needle.haystack(
    tokenizer.encode, np.roll(tokens_T, -i * STRIDE), context, DEPTHS, seed=i, bos_id=bos_id
  )
  return Probe(
    rows_BT=rows_BT,
    contexts=tuple(sorted(contexts)),
    haystacks={length: [make(length, i) for i in range(n)] for length, n in haystacks.items()},
    about={
      'text': split.source,
      'text_fingerprint': split.fingerprint,
      'rows': rows,
      'haystacks': max(haystacks.values(), default=0),
      'bos': 'none' if bos_id is None else 'window',
    },
  )


def measure(model: Transformer, found: Probe, name: str) -> dict[int, dict[str, Metric]]:
  """The metrics of each context."""
  model = prepare(model)
  nll_BT = np.concatenate(
    [positions.nll(model, row[None]) for row in common.progress(list(found.rows_BT), name)]
  )
  metrics = {}
  for span in positions.spans(nll_BT, [0, *found.contexts]):
    metrics[span.end] = {'ppl': Metric(span.ppl, '1', n=span.tokens)}
  for context, stacks in found.haystacks.items():
    if stacks:
      progress = common.labelled(f'{name}, needles in {context} tokens')
      metrics[context] |= _needles(needle.scores(model, stacks, progress=progress), len(stacks))
  return metrics


def _needles(scores: list[needle.Score], count: int) -> dict[str, Metric]:
  mean = lambda field: float(np.mean([getattr(score, field) for score in scores]))
  metrics = {
    'needle_probability': Metric(mean('probability'), '1', n=count * len(scores)),
    'needle_found': Metric(mean('found'), '1', n=count * len(scores)),
  }
  for score in scores:
    metrics[f'needle_probability:{score.depth}'] = Metric(score.probability, '1', n=count)
    metrics[f'needle_rank:{score.depth}'] = Metric(score.rank, '1', n=count)
  return metrics
