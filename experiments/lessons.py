"""Steps of a recipe that train: on text, by the original model, to be quantized, and by adapters.

  steps:
    - wanda: {n: 2, m: 4}
    - distill: {steps: 200, learning_rate: 5.0e-4}
    - gptq: {format: int4}
    - lora: {steps: 100, rank: 8, teacher: true}

`finetune`, `distill` and `qat` train all parameters of the model that the steps before it left,
which must not be codes; `lora` trains adapters over whatever the weights are. Pruned weights stay
zero. What is learned from is the school: the training part of the texts that the recipe is measured
on, and the original model as the teacher. The ledger says how many updates, tokens and seconds a
step took. Quantization-aware training that follows the original model is LLM-QAT (Liu et al. 2023,
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

from experiments import training
from model import adapters, fingerprint, learned
from model.adapters import AdapterConfig
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
from model.train.partition import Selection
from model.train.routing import Balanced
from model.train.step import StepConfig, Task
from model.transformer import Transformer, matrices, parameters
from ops.divergences import Divergence
from ops.formats import FormatName
from ops.linear import roles

MEASURED_ROWS = 64  # of the loss before and after adapters are merged into codes


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
    row = self.seq_len * training.CHARACTERS_A_TOKEN
    needed = spec.steps * spec.batch_size * row
    return PackedDataset.from_texts(
      excerpts(self.texts, needed, seed=self.seed, shortest=row),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec(LessonSpec):
  """Learns by low-rank adapters, from the text or, with `teacher`, from the original model.

  rank, alpha, targets: those of `adapters.AdapterConfig`.
  merge: whether what was learned is added to the weights, in the form in which they are stored;
    otherwise the adapters stay beside them. A quantized matrix is rounded again when it is merged,
    which may lose more than was learned; the ledger has the loss before and after.
  """

  learning_rate: float = 2e-3
  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = ('layers.*',)
  teacher: bool = False
  merge: bool = True

  def __post_init__(self):
    super().__post_init__()
    self.adapter()

  def adapter(self) -> AdapterConfig:
    return AdapterConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)


def _of_values(model: Transformer, spec: LessonSpec) -> Transformer:
  """The model after all values are trained. Raises ValueError if some of them are codes."""
  for path, param in parameters(model).items():
    if 'code' in roles(param.get_value()):
      raise ValueError(
        f'{path} is stored in codes, which gradients do not reach; train before the step that '
        'quantizes, quantize by qat, which trains, or train adapters over the codes by lora'
      )
  return learned.shapes(model, spec.learner()) if isinstance(spec, QatSpec) else model


def _of_adapters(model: Transformer, spec: LoraSpec) -> Transformer:
  return adapters.shapes(model, spec.adapter(), 'base' if spec.merge else None)


@technique(
  'finetune',
  spec=LessonSpec,
  paper='Ma et al. 2023, https://arxiv.org/abs/2305.11627',
  scope='learn',
  becomes=_of_values,
)
def finetune(model, school, spec, folder):
  """Train all parameters on text, as healing after pruning."""
  return _taught(model, school, spec, folder, Task(objective=_of_text(model)))


@technique(
  'distill',
  spec=DistillSpec,
  paper='Hinton et al. 2015, https://arxiv.org/abs/1503.02531',
  scope='learn',
  becomes=_of_values,
)
def distill(model, school, spec, folder):
  """Train all parameters to predict as the original model does."""
  return _taught(model, school, spec, folder, Task(objective=spec.objective()))


@technique(
  'qat',
  spec=QatSpec,
  paper='Jacob et al. 2017, https://arxiv.org/abs/1712.05877',
  scope='learn',
  becomes=_of_values,
)
def qat(model, school, spec, folder):
  """Train with rounded weights, and store what they were rounded to."""
  objective = Distillation() if spec.teacher else _of_text(model)
  learning = learned.attach(model, spec.learner())
  result = _taught(learning, school, spec, folder, Task(objective=objective))
  return dataclasses.replace(result, model=learned.finish(result.model))


@technique(
  'lora',
  spec=LoraSpec,
  paper='Hu et al. 2021, https://arxiv.org/abs/2106.09685',
  scope='learn',
  becomes=_of_adapters,
)
def lora(model, school, spec, folder):
  """Train low-rank adapters over weights of any kind, and merge them."""
  objective = Distillation() if spec.teacher else _of_text(model)
  learning = adapters.attach(model, spec.adapter(), key=jax.random.key(school.seed))
  task = Task(objective=objective, selection=Selection(value=()))
  result = _taught(learning, school, spec, folder, task)
  if not spec.merge:
    return dataclasses.replace(result, model=adapters.narrowed(result.model))
  merged = adapters.merge(result.model, 'base')
  events = {**result.events, **_lost_by_merging(result.model, merged, school, spec)}
  return Learned(model=merged, events=events)


def _lost_by_merging(
  model: Transformer, merged: Transformer, school: School, spec: LessonSpec
) -> dict[str, int]:
  """Where codes were made again, the loss before and after, on some rows of the lesson."""
  weights = matrices(merged)
  if not any('code' in roles(weights[layer]) for layer in adapters.adapted(model)):
    return {}
  rows = school.rows(spec)
  tokens = MEASURED_ROWS * rows.seq_len + 1
  some = dataclasses.replace(
    rows, stream=rows.stream[:tokens], starts=rows.starts[rows.starts < tokens]
  )
  nll = lambda one: round(1000 * loop.mean_nll(one, some))
  return {
    'loss before merging into codes, in thousandths of a nat per token': nll(model),
    'loss after it': nll(merged),
  }


def _of_text(model: Transformer) -> Objective:
  """What is learned from text: with experts, to use them evenly as well."""
  routed = any(isinstance(layer.ffn, RoutedConfig) for layer in model.config.layers)
  return Balanced() if routed else CrossEntropy()


def _taught(
  model: Transformer, school: School, spec: LessonSpec, folder: pathlib.Path | None, task: Task
) -> Learned:
  """Trains a model. Its parameters keep the dtypes that they had, but those that still learn."""
  if isinstance(task.objective, Distillation):
    task = dataclasses.replace(task, references={TEACHER: school.original})
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
