"""What the studies on small models share: a trained base, its texts, and a training run.

The base has the shape of the embedded base with four layers, and is trained once on the source of
Python's standard library. No study needs a network.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import base as embedded
from experiments import common, training
from experiments.arms import TEACHER, Options
from model import fingerprint
from model.compress import pipeline, recipe
from model.config import ModelConfig
from model.corpus import Corpus
from model.eval import perplexity
from model.eval.records import Metric
from model.layers.routed import RoutedConfig
from model.tokenizer import Tokenizer
from model.train import loop
from model.train.data import PackedDataset, excerpts
from model.train.loop import FitConfig
from model.train.optimizer import OptimizerConfig
from model.train.step import StepConfig, Task
from model.transformer import Transformer
from ops.moe import Router

PLAN = embedded.Plan(layers=4, steps=1200)
SMOKE_PLAN = dataclasses.replace(embedded.SMOKE, layers=4)
WINDOWS, SMOKE_WINDOWS = 256, 8
SMOKE_STEPS = 4
CALIBRATION_ROWS = 64
SHORTEST_PASSAGE = 800  # characters
WARMUP_STEPS = 20
LAST = 10  # the loss at the end of a run is the mean over its last tenth


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallModels:
  """The base that all arms start from or follow, and what they learn and are measured on.

  steps: updates of an arm that does not say another number.
  more: what else records say of the study.
  """

  base: Transformer
  plan: embedded.Plan
  tokenizer: Tokenizer
  texts: Corpus
  windows: perplexity.Windows
  steps: int
  more: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def about(self) -> dict[str, Any]:
    """What records of one study share, as JSON values."""
    return {
      'teacher': dataclasses.asdict(self.plan),
      TEACHER: fingerprint.of_model(self.base),
      'steps': self.steps,
      'text_fingerprint': self.texts.fingerprint,
      **self.more,
    }

  @functools.cached_property
  def base_loss(self) -> float:
    """The base's cross entropy of the held-out text, in nats per token."""
    return quality(self, self.base)['cross_entropy'].value

  def data(self, seed: int, steps: int) -> PackedDataset:
    """Rows for one epoch of `steps` updates, or all of the text where it is shorter."""
    tokens = steps * self.plan.batch_size * self.plan.seq_len + 1
    whole = PackedDataset.from_texts(
      _passages(self.texts.train, training.CHARACTERS_A_TOKEN * tokens, seed),
      self.tokenizer,
      seq_len=self.plan.seq_len,
      batch_size=self.plan.batch_size,
      seed=seed,
    )
    starts = whole.starts[whole.starts < tokens]
    return dataclasses.replace(whole, stream=whole.stream[:tokens], starts=starts)

  def calibration(self, seed: int) -> np.ndarray:
    """Rows of the calibration text, [rows, seq_len]; each seed draws its own."""
    return common.calibration_rows(
      self.tokenizer, self.texts, self.plan.seq_len, CALIBRATION_ROWS, seed
    )


def prepare(
  options: Options,
  *,
  steps: int,
  plan: embedded.Plan = PLAN,
  texts: Corpus | None = None,
  **more,
) -> SmallModels:
  """Loads or trains the base. `texts` are learned and measured instead of the base's own."""
  plan = SMOKE_PLAN if options.smoke else plan
  trained = embedded.load_or_train(common.cache_folder(), plan=plan)
  texts = trained.texts if texts is None else texts
  ids_T, ends_T = trained.tokenizer.encode_with_bytes('\n'.join(texts.held_out))
  count = SMOKE_WINDOWS if options.smoke else WINDOWS
  return SmallModels(
    base=trained.model,
    plan=plan,
    tokenizer=trained.tokenizer,
    texts=texts,
    windows=perplexity.windows(ids_T, ends_T, plan.seq_len, count),
    steps=SMOKE_STEPS if options.smoke else options.steps or steps,
    more=more,
  )


def routed(config: ModelConfig, experts: int = 8, choices: int = 2) -> ModelConfig:
  """The same model with experts of the width of its feed-forward networks."""

  def ffn(dense):
    router = Router(choices=choices, renormalize=True)
    return RoutedConfig(experts=experts, width=dense.width, router=router)

  layers = tuple(dataclasses.replace(layer, ffn=ffn(layer.ffn)) for layer in config.layers)
  return config.replace(family='mixtral', layers=layers)


def _passages(texts: Sequence[str], characters: int, seed: int) -> list[str]:
  """A passage from each text, or from some of them where it would be shorter than a few windows."""
  most = max(1, characters // SHORTEST_PASSAGE)
  if most < len(texts):
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:most]]
  return excerpts(texts, characters, seed=seed)


def fit_config(steps: int, learning_rate: float, optimizer: str = 'adamw') -> FitConfig:
  """The config of a short run without checkpoints."""
  return FitConfig(
    optimizer=OptimizerConfig(
      steps=steps,
      learning_rate=learning_rate,
      warmup_steps=min(WARMUP_STEPS, steps // 4),
      name=optimizer,
    ),
    step=StepConfig(loss_chunk=256),
  )


def fit(
  model: Transformer, data: PackedDataset, config: FitConfig, task: Task | None = None
) -> tuple[Transformer, dict[str, Metric]]:
  """Trains a copy of a model; returns it with the tokens that it learned from and its loss."""
  result = loop.fit(model, data, config, task=task, progress=False)
  tokens = sum(record['tokens'] for record in result.records)
  last = [record['loss'] for record in result.records[-max(1, len(result.records) // LAST) :]]
  return result.model, {
    'train_tokens': Metric(tokens, 'token'),
    'train_loss': Metric(np.mean(last), 'nat/token', len(last)),
    'update_time': Metric(result.update_s, 's', len(result.records)),
  }


def quality(setting: SmallModels, model: Transformer) -> dict[str, Metric]:
  """How well a model predicts the held-out text."""
  found = perplexity.evaluate(model, setting.windows)
  return {
    'cross_entropy': Metric(found.nll_sum / found.tokens, 'nat/token', found.tokens),
    'bits_per_byte': Metric(found.bits_per_byte, 'bit/byte', found.tokens),
  }


def recovered(best: float, worst: float, loss: float) -> Metric:
  """The share of what the worst model lost against the best that is not lost, of three losses."""
  return Metric((worst - loss) / (worst - best), '1')


def compress(model: Transformer, step: dict[str, dict], rows_BT: np.ndarray) -> Transformer:
  """Applies one technique, {name: options}, calibrated on rows of tokens."""
  one = recipe.parse({'name': 'step', 'steps': [step]})
  return pipeline.compress(model, one, rows_BT)[0]
