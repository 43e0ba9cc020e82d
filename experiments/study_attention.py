r"""Shows what each way to mix tokens remembers: recall near and far, at its cost.

  python -m experiments.study_attention --output=experiments/results/study_attention.jsonl

Two layers of width 64 learn to recall what a text told earlier (experiments/recall.py), from scratch
with each seed. The arms, by their two layers:

  dense        both see all tokens
  window       both see 12
  window_dense 12, then all, as in Gemma
  dilated      12, then 12 of every fourth
  global       12 and every eighth token, which sees all
  random       12 and two random blocks of 8
  linformer_*  16, and 4 summaries of each chunk of 8 tokens before, static and dynamic
  linear, retnet, gla, gated_delta   recurrent, with states of equal size but for the normaliser
  hybrid       gated_delta, then dense

`recall_near` counts answers to what was told fewer than 12 tokens ago, so that one layer of the
window sees it, and `recall_far` those to what was told beyond the reach of both windows, 2 * 11.
Chance is 1 / 32. The claims, counted over the seeds:

  A1  dense recalls far; a window alone is at chance beyond its reach, and dense near it
  A2  window_dense recalls as dense does
  A3  more than the window is seen far by dilated, global, random and linformer
  A4  softmax > gated_delta > gla > linear attention
  A5  hybrid recalls as dense does

Device: any. Minutes: some 40 on two CPU cores.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from experiments import arms, mixers, recall, small_models
from experiments.arms import Options, at_least, rises
from experiments.recall import Recall
from model.config import ModelConfig
from model.eval.records import Metric
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.sublayer import MixerConfig
from model.train import loop
from model.transformer import Transformer

STEPS, ROWS = 400, 512
WINDOW = 12
NEAR, FAR = WINDOW, 2 * (WINDOW - 1) + 1  # distances below, and from there on
WIDTH, HEADS = 64, AttentionConfig(query_heads=4, kv_heads=4, head_width=16)
CHANCE = 1.2 / 32  # with three standard errors of some thousand answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """The mixers of the two layers, by their names (`experiments.mixers`)."""

  layers: tuple[str, str]
  learning_rates: tuple[float, ...] = (4e-3, 1e-2)


SUMMARIES = 'linformer8x4'
ARMS = {
  'dense': Arm(layers=('attention', 'attention')),
  'window': Arm(layers=('window12', 'window12')),
  'window_dense': Arm(layers=('window12', 'attention')),
  'dilated': Arm(layers=('window12', 'window12x4')),
  'global': Arm(layers=('window12+global8',) * 2),
  'random': Arm(layers=('window12+random8x2', 'window12+random8x2@1')),
  'linformer_static': Arm(layers=('linformer16+8x4',) * 2),
  'linformer_dynamic': Arm(layers=('linformer16+8x4dynamic',) * 2),
  **{name: Arm(layers=(name, name)) for name in ('linear', 'retnet', 'gla', 'gated_delta')},
  'hybrid': Arm(layers=('gated_delta', 'attention')),
}
