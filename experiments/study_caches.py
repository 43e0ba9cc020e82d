r"""Shows what a trained model still knows of a text when its cache keeps a part of it.

  python -m experiments.study_caches --model=DIR --text=python-docs \
      --output=experiments/results/study_caches.jsonl

The arms are formats and policies of the cache (docs/compressing.md); policies keep a quarter of the
tokens. Each seed has other stretches of the held-out text:

  cross_entropy   of text that is fed in pieces of 32 tokens, each predicted from what was kept
  aware_*         the share of needles that are found by a question within the text that is
                  compressed, `agnostic_*` by one that comes after it (model/eval/recall.py)
  *_near, *_far   by the needle's place: in the last quarter, which streaming keeps, or before it

A needle is a sentence of a name and a word; it is found if each token of the word is the most
likely of all. Guessing finds none. The claims, counted over the seeds:

  K1  int8 and int4 change the loss by less than 0.1 and 1 %
  K2  whichever quarter of the tokens is kept, the loss is at most 5 % higher
  K3  what snapkv finds depends on whether it has seen the question
  K4  streaming finds no needle beyond what it keeps, and the others find more

Device: any. Minutes: 15 a seed on two CPU cores for a model of 135 M.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import arms, common
from experiments import base as embedded
from experiments.arms import Claim, Options, at_best, ratio, rises
from model import corpus, fingerprint
from model.eval import cost, perplexity, recall
from model.eval.needle import NAMES, WORDS
from model.eval.records import Metric
from model.infer.prepare import prepare as prepared
from model.tokenizer import Tokenizer
from model.transformer import Transformer

CONTEXT, KEPT = 512, 128  # tokens
SMOKE_CONTEXT = 256
FAR, NEAR = (0.1, 0.25, 0.4, 0.55), (0.8, 0.9)  # depths of needles
ROWS_A_DEPTH = 2
WINDOWS = 4
POLICIES = tuple(f'{name}{KEPT}' for name in ('streaming', 'knorm', 'h2o', 'snapkv'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """A cache, as `--kv_cache` names it."""

  cache: str


ARMS = {
  cache: Arm(cache=cache) for cache in ('float', 'int8', 'int4', *POLICIES, f'int8+snapkv{KEPT}')
}
STREAMING, SNAPKV = f'streaming{KEPT}', f'snapkv{KEPT}'
LOSS = 'cross_entropy'


def _finds_none(metric: str) -> Claim:
  holds = lambda runs: at_best(runs, STREAMING)[metric] == 0
  return Claim('K4', f'{metric} of {STREAMING} is 0', (STREAMING,), holds)


def _sees_the_question() -> Claim:
  holds = lambda runs: at_best(runs, SNAPKV)['aware_far'] > at_best(runs, SNAPKV)['agnostic_far']
  return Claim('K3', f'agnostic_far < aware_far, {SNAPKV}', (SNAPKV,), holds)


CLAIMS = (
  ratio('K1', LOSS, ('int8', 'float'), 0.999, 1.001),
  ratio('K1', LOSS, ('int4', 'float'), 0.99, 1.01),
  *(ratio('K2', LOSS, (name, 'float'), 0.95, 1.05) for name in POLICIES),
  _sees_the_question(),
  rises('K3', 'aware_far', (STREAMING, SNAPKV, 'float'), slack=1.001),
  *(_finds_none(metric) for metric in ('aware_far', 'agnostic_far')),
  *(rises('K4', 'agnostic_far', (STREAMING, name)) for name in POLICIES if name != STREAMING),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """The model, and the held-out text as tokens."""

  model: Transformer
  tokenizer: Tokenizer
  tokens_T: np.ndarray
  ends_T: np.ndarray
  context: int
  about: dict[str, Any]

  def windows(self, seed: int) -> perplexity.Windows:
    """Text of one seed."""
    size = WINDOWS * self.context
    here = slice(seed * size, (seed + 1) * size)
    return perplexity.windows(self.tokens_T[here], self.ends_T[here], self.context)

  def questions(self, seed: int) -> tuple[np.ndarray, ...]:
    """Contexts with a needle each, by depth, their questions and the answers.

    Only the names and words of the most frequent number of tokens are used, so that rows are as
    long as each other.
    """
    rng = np.random.default_rng(seed)
    names = _alike([self.tokenizer.encode(f'\nThe secret word of {n} is') for n in NAMES])
    words = _alike([self.tokenizer.encode(f' {word}') for word in WORDS])
    rows = np.repeat(FAR + NEAR, ROWS_A_DEPTH)
    asks_BT, answers_BT = rng.choice(names, len(rows)), rng.choice(words, len(rows))
    end = np.asarray(self.tokenizer.encode('.\n'))
    needles_BT = np.concatenate([asks_BT, answers_BT, np.tile(end, (len(rows), 1))], 1)
    room = self.context - needles_BT.shape[1]
    starts = rng.integers(0, len(self.tokens_T) - room, len(rows))
    contexts = [
      recall.placed(self.tokens_T[None, start : start + room], needle[None], depth)
      for start, needle, depth in zip(starts, needles_BT, rows)
    ]
    return np.concatenate(contexts), asks_BT, answers_BT


def _alike(tokens: Sequence[Sequence[int]]) -> np.ndarray:
  """Those of the most frequent length: [texts, tokens]."""
  length = collections.Counter(map(len, tokens)).most_common(1)[0][0]
  return np.array([one for one in tokens if len(one) == length])


def prepare(options: Options) -> Setting:
  if options.smoke:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    model, tokenizer, texts = trained.model, trained.tokenizer, trained.texts
  else:
    path, text = flags.FLAGS.model, flags.FLAGS.text
    if path is None or text is None:
      raise ValueError('study_caches needs --model and --text (or --smoke)')
    model, tokenizer = common.load_model(path)
    texts = corpus.load(text)
  context = SMOKE_CONTEXT if options.smoke else CONTEXT
  tokens_T, ends_T = tokenizer.encode_with_bytes('\n'.join(texts.held_out))
  seeds = options.first_seed + (1 if options.smoke else options.seeds)
  if len(tokens_T) < seeds * WINDOWS * context:
    raise ValueError(
      f'the held-out part of the text has {len(tokens_T):,} tokens, and {seeds} seeds need '
      f'{seeds * WINDOWS * context:,}; choose a longer text or fewer seeds'
    )
  about = {
    'text': texts.source,
    'text_fingerprint': texts.fingerprint,
    'context': context,
    arms.TEACHER: fingerprint.of_model(model),
  }
  return Setting(
    model=prepared(model),
    tokenizer=tokenizer,
    tokens_T=np.asarray(tokens_T, np.int32),
    ends_T=np.asarray(ends_T),
    context=context,
    about=about,
  )


def train(
  setting: Setting, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Measures the model through a cache; nothing is trained."""
  del rate, before
  windows = setting.windows(seed)
  quality = perplexity.evaluate(setting.model, windows, cache_format=arm.cache)
  contexts_BT, questions_BT, answers_BT = setting.questions(seed)
  depths_B, found = np.repeat(FAR + NEAR, ROWS_A_DEPTH), {}
  for protocol, case in recall.PROTOCOLS.items():
    # The last token of the question is fed to the cache, in place of a second question.
    rest_BT = np.concatenate([questions_BT[:, -1:], answers_BT], 1)
    asked = case(contexts_BT, questions_BT[:, :-1], rest_BT, given=1)
    answers_B = recall.measure(setting.model, asked, arm.cache).answers_B
    for place, depths in (('far', FAR), ('near', NEAR)):
      right = answers_B[np.isin(depths_B, depths)]
      name = f'{protocol.removeprefix("query-")}_{place}'
      found[name] = Metric(right.mean(), '1', len(right))
  held = cost.kv_cache_bytes(setting.model.config, setting.context, setting.model.dtype, arm.cache)
  return setting.model, {
    LOSS: Metric(quality.nll_sum / quality.tokens, 'nat/token', quality.tokens),
    **found,
    'cache_bytes': Metric(held, 'B'),
  }


STUDY = arms.Study(
  name='study_caches',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('float', STREAMING, SNAPKV),
  prepare=prepare,
  train=train,
)


def main() -> None:
  # Defined here, because the tables of all studies are made in one process.
  flags.DEFINE_string('model', None, 'A folder, a hub id or a .gguf file; --smoke has its own.')
  flags.DEFINE_string('text', None, 'A file or folder, or python-docs.')
  arms.main(STUDY)


if __name__ == '__main__':
  main()
