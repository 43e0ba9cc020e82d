r"""Shows what each way to mix tokens remembers: recall near and far, at its cost.

  python -m experiments.study_attention --output=experiments/results/study_attention.jsonl

Two layers of width 64 learn to recall what a text told earlier (experiments/recall.py), from
scratch with each seed. The arms, by the tokens that their layers see:

  dense         all
  window        the last 12 in both layers
  window_dense  the last 12, then all, as in Gemma
  dilated       the last 12, then 12 of every fourth
  global        the last 12 and every eighth token, which itself sees all
  random        the last 12 and two blocks of 8
  moba          two blocks of 4 that each query chooses, and its own: at most 12
  linformer_*   the last 12, and 4 summaries of each 8 tokens before, static or dynamic
  linear, retnet, gla, gated_delta   recurrent, with states of about equal size
  hybrid        gated_delta, then dense

`recall_near` counts answers to what was told fewer than 12 tokens ago, which one layer of the
window sees, `recall_far` those to what was told beyond the reach of both of its layers, 2 * 11
tokens. `cached` is how many numbers both layers keep of a text. Chance is 1 / 16. The claims,
counted over the seeds:

  A1  dense recalls far; a window is at chance beyond its reach, whatever it recalls near
  A2  one dense layer after a window recalls as two do, and one after a gated_delta
  A3  dilated, global, random, moba and linformer see beyond the window: they recall more than it
  A4  softmax > gated_delta > gla > linear attention, where texts have more than a state holds

Device: any. Minutes: 40 on two CPU cores.
"""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import arms, mixers, recall, small_models
from experiments.arms import Claim, Options, at_best, rises
from experiments.recall import Recall
from model import kv_cache
from model.config import ModelConfig
from model.eval.records import Metric
from model.layers import kinds
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.linformer import LinformerConfig
from model.layers.mixers.moba import MobaConfig
from model.layers.sublayer import MixerConfig
from model.train import loop
from model.transformer import Transformer
from ops import patterns

STEPS, ROWS = 400, 512
LENGTH, PAIRS, KINDS = 64, 12, 16
WINDOW = 12
NEAR, FAR = WINDOW, 2 * (WINDOW - 1) + 1  # distances below, and from there on
FULL = AttentionConfig(query_heads=4, kv_heads=4, head_width=16)
FFN = FeedForwardConfig(width=128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """The mixers of the two layers."""

  layers: tuple[MixerConfig, MixerConfig]
  learning_rates: tuple[float, ...] = (4e-3,)

  def described(self) -> dict[str, Any]:
    """As JSON values."""
    return {'layers': [kinds.to_json(mixer) for mixer in self.layers]}


def _sees(text: str) -> AttentionConfig:
  return dataclasses.replace(FULL, sparse=patterns.parse(text))


def _sums(weights) -> LinformerConfig:
  window = {'window': WINDOW, 'chunk': 8, 'summaries': 4, 'weights': weights}
  return LinformerConfig(**{**vars(FULL), **window})


LOCAL = _sees(f'window{WINDOW}')
RECURRENT = {name: make(FULL) for name, make in mixers.RECURRENT.items()}
ARMS = {
  'dense': Arm(layers=(FULL, FULL)),
  'window': Arm(layers=(LOCAL, LOCAL)),
  'window_dense': Arm(layers=(LOCAL, FULL)),
  'dilated': Arm(layers=(LOCAL, _sees(f'window{WINDOW}x4'))),
  'global': Arm(layers=(_sees(f'window{WINDOW}+global8'),) * 2),
  'random': Arm(layers=tuple(_sees(f'window{WINDOW}+random8x2@{seed}') for seed in (1, 2))),
  'moba': Arm(layers=(MobaConfig.of(FULL, block=4, top_k=2),) * 2),
  'linformer_static': Arm(layers=(_sums('static'),) * 2),
  'linformer_dynamic': Arm(layers=(_sums('dynamic'),) * 2),
  **{name: Arm(layers=(mixer, mixer)) for name, mixer in RECURRENT.items()},
  'hybrid': Arm(layers=(RECURRENT['gated_delta'], FULL)),
}


def _at_chance(metric: str, arm: str) -> Claim:
  """Within three standard errors of chance; the metric's own number of answers is beside it."""

  def holds(runs):
    found, share = at_best(runs, arm), 1 / KINDS
    error = (share * (1 - share) / found[f'{metric}_answers']) ** 0.5
    return abs(found[metric] - share) <= 3 * error

  return Claim('A1', f'{metric} of {arm} within three errors of 1 / {KINDS}', (arm,), holds)


def _as_good(name: str, arm: str, other: str) -> Claim:
  holds = lambda runs: at_best(runs, arm)['recall_far'] >= 0.95 * at_best(runs, other)['recall_far']
  return Claim(name, f'recall_far of {arm} >= 0.95 x that of {other}', (arm, other), holds)


SEEING_MORE = ('dilated', 'global', 'random', 'moba', 'linformer_static', 'linformer_dynamic')
CLAIMS = (
  rises('A1', 'recall_far', ('window', 'dense'), slack=0.5),
  _at_chance('recall_far', 'window'),
  _as_good('A2', 'window_dense', 'dense'),
  _as_good('A2', 'hybrid', 'dense'),
  *(rises('A3', 'recall_far', ('window', name), slack=0.8) for name in SEEING_MORE),
  rises('A4', 'recall', ('linear', 'gla', 'gated_delta', 'dense')),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """The task, and the number of updates."""

  task: Recall
  steps: int

  @property
  def about(self) -> dict[str, Any]:
    task = dataclasses.asdict(dataclasses.replace(self.task, seed=0))
    digest = hashlib.sha256(repr(sorted(task.items())).encode()).hexdigest()
    return {'task': task, 'steps': self.steps, arms.TEACHER: digest}


def prepare(options: Options) -> Setting:
  batch, steps = (8, 4) if options.smoke else (32, options.steps or STEPS)
  task = Recall(seq_len=LENGTH, batch_size=batch, pairs=PAIRS, kinds=KINDS)
  return Setting(task=task, steps=steps)


def config(arm: Arm, task: Recall) -> ModelConfig:
  """The model of an arm."""
  layers = tuple(LayerConfig(mixer=mixer, ffn=FFN) for mixer in arm.layers)
  return ModelConfig(
    family='llama', vocab_size=task.vocabulary, width=64, layers=layers, max_positions=task.seq_len
  )


def train(
  setting: Setting, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Trains a model of the arm from scratch and measures it."""
  del before
  start = Transformer(config(arm, setting.task), rngs=nnx.Rngs(seed))
  return learn(setting, start, seed, rate)


def learn(
  setting: Setting, start: Transformer, seed: int, rate: float, far: int = FAR
) -> tuple[Transformer, arms.Metrics]:
  """Trains a model on the task and measures what it recalls, and what of it from `far` on."""
  task = dataclasses.replace(setting.task, seed=seed)
  fit = small_models.fit_config(setting.steps, rate)
  result = loop.fit(start, task, fit, progress=False)
  found = recall.measure(result.model, task, 2 * task.batch_size if setting.steps < 10 else ROWS)
  shares = {'recall': found.accuracy(), 'recall_near': found.accuracy(high=NEAR)}
  shares['recall_far'] = found.accuracy(far)
  caches = jax.eval_shape(functools.partial(kv_cache.init, result.model.config, 1, task.seq_len))
  numbers = sum(leaf.size for leaf in jax.tree.leaves(caches))
  return result.model, {
    'cross_entropy': Metric(float(np.mean(found.nll)), 'nat/answer', len(found.nll)),
    **{name: Metric(share, '1', n) for name, (share, n) in shares.items()},
    'recall_far_answers': Metric(shares['recall_far'][1], 'answer'),
    'cached': Metric(numbers, 'number'),
    'update_time': Metric(result.update_s, 's', len(result.records)),
  }


STUDY = arms.Study(
  name='study_attention',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('dense', 'dilated', 'linformer_dynamic', 'hybrid'),
  prepare=prepare,
  train=train,
  describe=Arm.described,
)

if __name__ == '__main__':
  arms.main(STUDY)
