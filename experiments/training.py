"""What the training scripts share: their flags, their text, and the run itself."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import get_args

import jax
from absl import flags

from experiments import base as embedded
from experiments import common
from model import context_parallel, corpus, expert_parallel, hf, sharding, stacked
from model.config import ModelConfig
from model.eval.records import Metric
from model.tokenizer import Tokenizer
from model.train import chats, loop, split
from model.train.data import PackedDataset, excerpts
from model.train.loop import FitConfig, FitResult, HeldOut
from model.train.optimizer import OPTIMIZERS, Decay, OptimizerConfig
from model.train.step import DTYPES, StepConfig, Task
from model.transformer import Transformer

CHARACTERS_A_TOKEN = 6  # the mean length of a token is rarely above this
HELD_OUT_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The sizes of a training run; None takes the default of the script or the method."""

  steps: int
  seq_len: int
  batch_size: int
  learning_rate: float
  warmup_steps: int = 0
  weight_decay: float = 0.0
  optimizer: str = 'adamw'
  decay: str = 'cosine'
  dtype: str = 'float32'
  accumulation: int = 1
  remat: str = 'none'
  context_strategy: str = 'auto'
  checkpoint_every: int = 100
  evaluate_every: int = 0  # 0: held-out text is measured before and after alone
  seed: int = 0

  def fit_config(self, rates: tuple[tuple[str, float], ...] = ()) -> FitConfig:
    """The config of the run; `rates` are multipliers of the rate by paths."""
    return FitConfig(
      optimizer=OptimizerConfig(
        steps=self.steps,
        name=self.optimizer,
        decay=self.decay,
        rates=rates,
        learning_rate=self.learning_rate,
        warmup_steps=self.warmup_steps,
        weight_decay=self.weight_decay,
      ),
      step=StepConfig(
        compute_dtype=self.dtype,
        accumulation=self.accumulation,
        remat=self.remat,
        context=self.context_strategy,
        seed=self.seed,
      ),
      checkpoint_every=self.checkpoint_every,
    )


def define(defaults: Settings) -> dict[str, flags.FlagHolder]:
  """The flags of a training run; `settings` reads them."""
  whole = {
    'steps': 'Updates.',
    'seq_len': 'Tokens per row; a row may hold several documents, which do not see each other.',
    'batch_size': 'Rows per update.',
    'warmup_steps': 'Updates during which the learning rate rises.',
    'accumulation': 'Micro-batches into which a batch is divided.',
    'checkpoint_every': 'Updates between checkpoints.',
    'evaluate_every': 'Updates between measurements on held-out text; 0: before and after alone.',
    'seed': 'Seed of the order of the text, and of random initial values.',
  }
  holders = {
    name: flags.DEFINE_integer(name, getattr(defaults, name), text, lower_bound=0)
    for name, text in whole.items()
  }
  holders['learning_rate'] = flags.DEFINE_float(
    'learning_rate', None, 'Peak learning rate. Default: what suits the method.', lower_bound=0.0
  )
  holders['weight_decay'] = flags.DEFINE_float(
    'weight_decay', defaults.weight_decay, 'Decoupled decay of matrices.', lower_bound=0.0
  )
  holders['optimizer'] = flags.DEFINE_enum(
    'optimizer', defaults.optimizer, list(OPTIMIZERS), 'How gradients become updates.'
  )
  holders['decay'] = flags.DEFINE_enum(
    'decay', defaults.decay, get_args(Decay), 'How the learning rate goes on after the warm-up.'
  )
  holders['dtype'] = flags.DEFINE_enum(
    'dtype', defaults.dtype, DTYPES, 'Type of activations; what is trained stays float32.'
  )
  holders['remat'] = flags.DEFINE_enum(
    'remat', defaults.remat, stacked.REMATS, 'What the backward pass computes again.'
  )
  holders['context_strategy'] = common.define_context_strategy()
  return holders


def settings(holders: Mapping[str, flags.FlagHolder], defaults: Settings, **changes) -> Settings:
  """The flags that were given, over `changes`, over the defaults."""
  given = {name: holder.value for name, holder in holders.items() if holder.present}
  found = dataclasses.replace(defaults, **{**changes, **given})
  common.check_positive(
    **{name: getattr(found, name) for name in ('steps', 'seq_len', 'batch_size', 'learning_rate')}
  )
  return found


def load(model: str | None, *, smoke: bool) -> tuple[Transformer, Tokenizer]:
  """Loads a model and its tokenizer; without a name, the embedded base model.

  Raises ValueError if it cannot be read or has no tokenizer.
  """
  if model is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=smoke)
    return trained.model, trained.tokenizer
  loaded, tokenizer = hf.load_pretrained(model)
  if tokenizer is None:
    raise ValueError(f'{model} has no tokenizer; put its tokenizer.json into the folder')
  return loaded, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """The rows that are trained on and those that are held out, and what a record says of them."""

  train: PackedDataset
  held_out: PackedDataset
  about: dict


def text(data: str | None, tokenizer: Tokenizer, settings: Settings) -> Text:
  """Reads a text, or chats as JSON lines, and packs it; documents are held out by their hash.

  Raises ValueError if there is no text, the tokenizer has no token that ends a document, or a line
  is no chat that the model's template renders.
  """
  if data is not None and data not in corpus.BUILT_IN and chats.holds_chats(data):
    return _chats(data, tokenizer, settings)
  parts = corpus.load(data)
  needed = settings.steps * settings.batch_size * settings.seq_len * CHARACTERS_A_TOKEN
  sizes = {'seq_len': settings.seq_len, 'batch_size': settings.batch_size, 'seed': settings.seed}
  train = excerpts(parts.train, needed, seed=settings.seed)
  held_out = excerpts(parts.held_out, HELD_OUT_ROWS * settings.seq_len * CHARACTERS_A_TOKEN)
  return Text(
    train=PackedDataset.from_texts(train, tokenizer, **sizes),
    held_out=PackedDataset.from_texts(held_out, tokenizer, **sizes),
    about={'data': parts.source, 'data_fingerprint': parts.fingerprint},
  )


def held_out(text: Text, settings: Settings) -> HeldOut | None:
  """What is measured along the way, if anything is."""
  if not settings.evaluate_every:
    return None
  return HeldOut(dataset=text.held_out, every=settings.evaluate_every)


def _chats(data: str, tokenizer: Tokenizer, settings: Settings) -> Text:
  found = chats.load(data)
  parts = split.by_content([chat.content for chat in found])
  sizes = {'seq_len': settings.seq_len, 'batch_size': settings.batch_size, 'seed': settings.seed}
  pack = lambda indices: chats.dataset([found[i] for i in indices], tokenizer, **sizes)
  train, held_out = pack(parts.train), pack(parts.held_out)
  counts = train.counts
  print(
    f'{counts.documents} chats of {counts.tokens:,} tokens, {counts.labels:,} of them the '
    f"assistant's; {counts.truncated} lost their end beyond {settings.seq_len} tokens, "
    f'{counts.dropped} were left out because nothing of the assistant remained'
  )
  return Text(
    train=train,
    held_out=held_out,
    about={'data': pathlib.Path(data).name, 'data_fingerprint': parts.fingerprint},
  )


def check_mesh(
  mesh: jax.sharding.Mesh, step: StepConfig, configs: Sequence[ModelConfig], seq_len: int
) -> None:
  """Raises ValueError if the mesh does not divide the experts of the first model, or the rows."""
  expert_parallel.make(step.dispatch, configs[0], mesh)
  axes = expert_parallel.batch_axes(step.dispatch)
  context_parallel.plan(step.context, configs, mesh, axes).picks(seq_len)


def fit(
  model: Transformer,
  data: PackedDataset,
  config: FitConfig,
  task: Task,
  *,
  folder: pathlib.Path,
  mesh: jax.sharding.Mesh,
  held_out: HeldOut | None = None,
) -> FitResult:
  """Places the models on the mesh and trains.

  Raises ValueError, before any work, if the mesh does not divide the experts, the batch or its
  rows; and if the loss is not finite.
  """
  configs = [each.config for each in (model, *task.references.values())]
  check_mesh(mesh, config.step, configs, data.seq_len)
  axes = expert_parallel.batch_axes(config.step.dispatch)
  devices = math.prod(mesh.shape[axis] for axis in axes)
  if data.batch_size % devices:
    raise ValueError(
      f'a batch of {data.batch_size} rows does not divide among the {devices} devices of the mesh '
      f'axes {", ".join(axes)}'
    )
  for each in (model, *task.references.values()):
    sharding.shard(each, mesh)
  batches = sharding.batch_sharding(mesh, axes)
  try:
    return loop.fit(
      model,
      data,
      config,
      task=task,
      folder=folder,
      batch_sharding=batches,
      held_out=held_out,
    )
  except FloatingPointError as error:
    raise ValueError(error) from error


def curve(result: FitResult) -> dict[int, float]:
  """The held-out losses along the way, by the number of updates before."""
  name = 'held_out_loss'
  return {record['step']: record[name] for record in result.records if name in record}


def metrics(result: FitResult, settings: Settings) -> dict[str, Metric]:
  """What a record says of any run: held-out losses along the way, tokens, speed and memory.

  `device_peak_bytes` is the most that this process held on the device, where the device counts it.
  What was left to do of a resumed run may be too little to be timed.
  """
  tokens = settings.batch_size * settings.seq_len
  counted = jax.local_devices()[0].memory_stats() or {}
  found = {
    **{f'held_out_loss_after_{n}': Metric(nll, 'nats') for n, nll in curve(result).items()},
    'train_tokens': Metric(sum(record['tokens'] for record in result.records), '1'),
  }
  if not math.isnan(result.update_s):
    found['update_time'] = Metric(result.update_s, 's', settings.steps)
    found['tokens_per_s'] = Metric(tokens / result.update_s, 'tokens/s', settings.steps)
  if result.program_bytes:
    found['program_peak_bytes'] = Metric(result.program_bytes, 'byte')
  if 'peak_bytes_in_use' in counted:
    found['device_peak_bytes'] = Metric(counted['peak_bytes_in_use'], 'byte')
  return found
