"""Steps of a recipe that train: on text, by the original model, and to be quantized.

  steps:
    - prune_ffn: {ratio: 0.25}
    - distill: {steps: 200, learning_rate: 5.0e-4}
    - qat: {steps: 100, format: int4, group_size: 32, teacher: true}

Each trains all parameters of the model that the steps before it left. What is learned from is the
school: the training part of the texts that the recipe is measured on, and the original model as the
teacher. The ledger says how many updates, tokens and seconds a step took. Quantization-aware
training that follows the original model is LLM-QAT (Liu et al. 2023,
https://arxiv.org/abs/2305.17888).
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import training
from model import fingerprint, learned
from model.compress.registry import Learned, technique
from model.layers.routed import RoutedConfig
from model.learned import QatConfig
from model.tokenizer import Tokenizer
from model.train import loop
from model.train.data import PackedDataset, excerpts
from model.train.distill import TEACHER, Distillation
from model.train.loop import FitConfig
from model.train.objectives import CrossEntropy, Objective
from model.train.optimizer import OptimizerConfig
from model.train.routing import Balanced
from model.train.step import StepConfig, Task
from model.transformer import Transformer, parameters
from ops import qat as qat_ops
from ops.divergences import Divergence
from ops.formats import FormatName
from ops.linear import Matrix


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class School:
  """What steps that train learn from."""

  original: Transformer
  tokenizer: Tokenizer
  texts: Sequence[str] = dataclasses.field(repr=False)  # of the training part
  seq_len: int
  seed: int = 0

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of everything that is learned from."""
    digest = hashlib.sha256(json.dumps([self.seq_len, self.seed, *self.texts]).encode())
    digest.update(fingerprint.of_model(self.original).encode())
    return digest.hexdigest()

  def rows(self, spec: 'LessonSpec') -> PackedDataset:
    """The rows of one lesson."""
    needed = spec.steps * spec.batch_size * self.seq_len * training.CHARACTERS_A_TOKEN
    return PackedDataset.from_texts(
      excerpts(self.texts, needed, seed=self.seed),
      self.tokenizer,
      seq_len=self.seq_len,
      batch_size=spec.batch_size,
      seed=self.seed,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LessonSpec:
  """The length of a lesson and the size of its updates; the rate falls to a tenth by a cosine."""

  steps: int = 200
  batch_size: int = 8
  learning_rate: float = 5e-4
  warmup_steps: int = 10
  weight_decay: float = 0.0
  accumulation: int = 1
  checkpoint_every: int = 50

  def __post_init__(self):
    self.config()

  def config(self) -> FitConfig:
    return FitConfig(
      optimizer=OptimizerConfig(
        steps=self.steps,
        learning_rate=self.learning_rate,
        warmup_steps=min(self.warmup_steps, self.steps - 1),
        weight_decay=self.weight_decay,
      ),
      step=StepConfig(accumulation=self.accumulation),
      checkpoint_every=self.checkpoint_every,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSpec(LessonSpec):
  """Follows the original model: soft targets, and the text itself where `hard_weight` is not 0."""

  temperature: float = 1.0
  hard_weight: float = 0.0

  def objective(self) -> Distillation:
    return Distillation(
      divergence=Divergence(temperature=self.temperature), hard_weight=self.hard_weight
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatSpec(LessonSpec):
  """Learns to be quantized, from the text or, with `teacher`, from the original model (QAD).

  The other fields are those of `learned.QatConfig`.
  """

  learning_rate: float = 1e-4
  format: FormatName = 'int4'
  group_size: int | None = None
  symmetric: bool = True
  held: bool = False
  teacher: bool = False

  def __post_init__(self):
    super().__post_init__()
    self.learner()

  def learner(self) -> QatConfig:
    return QatConfig(
      format=self.format, group_size=self.group_size, symmetric=self.symmetric, held=self.held
    )


@technique(
  'finetune',
  spec=LessonSpec,
  paper='Ma et al. 2023, https://arxiv.org/abs/2305.11627',
  scope='learn',
)
def finetune(model, school, spec, folder):
  """Train all parameters on text, as healing after pruning."""
  return _taught(model, school, spec, folder, _of_text(model))


@technique(
  'distill',
  spec=DistillSpec,
  paper='Hinton et al. 2015, https://arxiv.org/abs/1503.02531',
  scope='learn',
)
def distill(model, school, spec, folder):
  """Train all parameters to predict as the original model does."""
  return _taught(model, school, spec, folder, spec.objective())


def _becomes(w: Matrix, spec: QatSpec) -> Matrix:
  config = spec.learner()
  learning = qat_ops.learn(
    w.astype(jnp.float32),
    config.format,
    group_size=config.group_size,
    symmetric=config.symmetric,
    held=config.held,
  )
  return learning.stored()


@technique(
  'qat',
  spec=QatSpec,
  paper='Jacob et al. 2017, https://arxiv.org/abs/1712.05877',
  scope='learn',
  becomes=_becomes,
)
def qat(model, school, spec, folder):
  """Train with rounded weights, and store what they were rounded to."""
  objective = Distillation() if spec.teacher else _of_text(model)
  learning = learned.attach(model, spec.learner())
  result = _taught(learning, school, spec, folder, objective)
  return dataclasses.replace(result, model=learned.finish(result.model))


def _of_text(model: Transformer) -> Objective:
  """What is learned from text: with experts, to use them evenly as well."""
  routed = any(isinstance(layer.ffn, RoutedConfig) for layer in model.config.layers)
  return Balanced() if routed else CrossEntropy()


def _taught(
  model: Transformer,
  school: School,
  spec: LessonSpec,
  folder: pathlib.Path | None,
  objective: Objective,
) -> Learned:
  """Trains a model. Its parameters keep the dtypes that they had, but those that still learn."""
  references = {TEACHER: school.original} if isinstance(objective, Distillation) else {}
  task = Task(objective=objective, references=references)
  start = time.perf_counter()
  try:
    result = loop.fit(model, school.rows(spec), spec.config(), task=task, folder=folder)
  except FloatingPointError as error:
    raise ValueError(error) from error
  events: dict[str, Any] = {
    'updates': spec.steps,
    'tokens learned from': sum(record['tokens'] for record in result.records),
    'seconds': round(time.perf_counter() - start),
  }
  return Learned(model=_in_dtypes_of(model, result.model), events=events)


def _in_dtypes_of(before: Transformer, after: Transformer) -> Transformer:
  """The trained model in the dtypes that it had before."""
  dtypes = {path: param.get_value() for path, param in parameters(before).items()}
  for path, param in parameters(after).items():
    old = dtypes[path]
    param.set_value(jax.tree.map(lambda new, old: new.astype(old.dtype), param.get_value(), old))
  return after
