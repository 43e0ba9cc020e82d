"""The methods of fine-tuning: how a model is made ready to learn by each.

docs/training.md says what they are. `experiments.finetune` trains by them, and
`experiments.benchmark_training` times their updates.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from model import adapters, learned
from model.adapters import AdapterConfig
from model.compress import pipeline, recipe
from model.config import ModelConfig
from model.learned import QatConfig
from model.train.partition import Selection
from model.train.step import Task
from model.transformer import Transformer, matrices

NF4 = {'name': 'nf4', 'steps': [{'round_to_nearest': {'format': 'nf4', 'double': True}}]}
FULL_RATE = 2e-5
LORA_RATE = 10 * FULL_RATE  # "LoRA Without Regret" (Schulman et al. 2025) fits 9.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """How a model is made ready to learn, and its usual learning rate."""

  kind: Literal['full', 'adapter', 'qat']
  rate: float = LORA_RATE
  quantized: bool = False  # the base is in NF4
  options: dict = dataclasses.field(default_factory=dict)  # of AdapterConfig


METHODS = {
  'full': Method(kind='full', rate=FULL_RATE),
  'lora': Method(kind='adapter'),
  'rslora': Method(kind='adapter', options={'rslora': True}),
  'dora': Method(kind='adapter', options={'dora': True}),
  'pissa': Method(kind='adapter', options={'start': 'pissa'}),
  'qlora': Method(kind='adapter', quantized=True),
  'loftq': Method(kind='adapter', quantized=True, options={'start': 'loftq'}),
  'qat': Method(kind='qat', rate=FULL_RATE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a user may choose within a method: the adapters, or the format that weights learn."""

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = ('layers.*',)
  format: str = 'int4'
  group_size: int | None = None

  def adapter(self, method: Method) -> AdapterConfig:
    """The config of a method's adapters."""
    return AdapterConfig(rank=self.rank, alpha=self.alpha, targets=self.targets, **method.options)

  def qat(self) -> QatConfig:
    """The config of quantization-aware training."""
    return QatConfig(format=self.format, group_size=self.group_size, targets=self.targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
  """A model that is ready to learn, and what it was made of."""

  model: Transformer
  task: Task
  adapter: AdapterConfig | None


def prepare(base: Transformer, method: Method, options: Options, seed: int) -> Ready:
  """Makes a model ready to learn by a method; the base does not change."""
  if method.kind == 'full':
    return Ready(model=base, task=Task(), adapter=None)
  if method.kind == 'qat':
    return Ready(model=learned.attach(base, options.qat()), task=Task(), adapter=None)
  config = options.adapter(method)
  quantized = base
  if method.quantized:
    quantized, _ = pipeline.compress(base, recipe.parse(NF4))
  model = adapters.attach(quantized, config, key=jax.random.key(seed), originals=matrices(base))
  return Ready(model=model, task=Task(selection=Selection(value=())), adapter=config)


def prepare_random(
  config: ModelConfig, method: Method, options: Options, *, dtype: jnp.dtype, seed: int
) -> Ready:
  """Makes a model of random weights ready block by block.

  No more than one block is held before it is quantized, so that a model fits whose weights would
  not fit in `dtype`. Patterns of targets see every block as 'layers.0'.
  """

  def one(l: int, vocab_size: int) -> Ready:
    single = config.replace(layers=config.layers[l : l + 1], vocab_size=vocab_size)
    base = Transformer(single, rngs=nnx.Rngs(seed + l), dtype=dtype)
    return prepare(base, method, options, seed + l)

  whole = one(0, config.vocab_size)
  others = [one(l, 1).model.layers[0] for l in range(1, len(config.layers))]
  model = whole.model
  model.config, model.layers = config, nnx.List([model.layers[0], *others])
  return dataclasses.replace(whole, model=model)
