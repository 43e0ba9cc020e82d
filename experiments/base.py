"""The embedded default: a small base model, trained on the source of Python's standard library.

Training needs no network, takes two to three minutes on two cores, and happens once: the model is
kept in the cache folder. It shows which recipe is better than which; the exact numbers hold for
this model alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator

import jax
from flax import nnx

from model import corpus, files, hf, lock
from model.config import ModelConfig
from model.corpus import Corpus
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.tokenizer import Tokenizer
from model.train import loop
from model.train.data import PackedDataset, excerpts
from model.train.loop import FitConfig
from model.train.optimizer import OptimizerConfig
from model.train.run_folder import AnotherRun
from model.train.step import StepConfig
from model.transformer import Transformer

ABOUT = 'about.json'
VERSION = 2  # of everything here that is not in `Plan`
# Half a batch at a time, the temporary arrays of an update take 29 MB, not 55. The C library takes
# arrays above 32 MB anew from the system at each update, which costs a fifth of the time.
STEP = StepConfig(accumulation=2, loss_chunk=256)
MEASURED_CHARACTERS = 200_000  # of the held-out and of the calibration part, a passage per file
CHECKPOINT_EVERY = 100  # updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The shape of the base model and the settings of its training."""

  vocab_size: int = 2048
  tokenizer_characters: int = 4_000_000
  width: int = 128
  layers: int = 3
  query_heads: int = 2
  kv_heads: int = 1
  head_width: int = 64
  ffn_width: int = 256
  seq_len: int = 128
  batch_size: int = 8
  steps: int = 2400
  warmup_steps: int = 50
  learning_rate: float = 2e-3
  train_characters: int = 10_000_000


# For notebooks: a model of the same shape that is trained in half a minute on two cores.
BRIEF = Plan(steps=600, tokenizer_characters=1_000_000, train_characters=3_000_000)
SMOKE = Plan(
  vocab_size=512,
  layers=2,
  ffn_width=384,
  tokenizer_characters=100_000,
  seq_len=64,
  batch_size=4,
  steps=30,
  warmup_steps=5,
  learning_rate=4e-3,
  train_characters=200_000,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
  """A trained base model with its tokenizer, its texts, and the settings for a record."""

  model: Transformer
  tokenizer: Tokenizer
  texts: Corpus
  about: dict


def load_or_train(
  cache: pathlib.Path, *, seed: int = 0, smoke: bool = False, plan: Plan | None = None
) -> Embedded:
  """Loads the base model from the cache folder, or trains it and keeps it there.

  A training that was killed is resumed. If another process is training the same model, this one
  waits for it. Raises ValueError if the cache folder cannot be written.
  """
  plan = plan or (SMOKE if smoke else Plan())
  texts = corpus.standard_library()
  folder = cache / f'base-{_key(plan, texts, seed)}'
  if not _is_trained(folder):
    with _training(folder):
      if not _is_trained(folder):  # by the process that was waited for
        _train(plan, texts, seed, folder)
  model, tokenizer = hf.load_pretrained(folder)
  about = json.loads(folder.with_suffix('.json').read_text())
  texts = dataclasses.replace(
    texts,
    held_out=tuple(excerpts(texts.held_out, MEASURED_CHARACTERS)),
    calibration=tuple(excerpts(texts.calibration, MEASURED_CHARACTERS)),
  )
  return Embedded(model=model, tokenizer=tokenizer, texts=texts, about=about)


def config(plan: Plan, tokenizer: Tokenizer | None = None) -> ModelConfig:
  """The base model's config: a Llama, so that other tools read it.

  Without a tokenizer it is the shape alone, and names no special tokens.
  """
  special = {} if tokenizer is None else {'bos_id': tokenizer.bos_id, 'eos_ids': tokenizer.eos_ids}
  heads = AttentionConfig(
    query_heads=plan.query_heads, kv_heads=plan.kv_heads, head_width=plan.head_width
  )
  layer = LayerConfig(mixer=heads, ffn=FeedForwardConfig(width=plan.ffn_width))
  return ModelConfig(
    family='llama',
    vocab_size=plan.vocab_size,
    width=plan.width,
    layers=(layer,) * plan.layers,
    max_positions=1024,
    **special,
  )


def _key(plan, texts, seed) -> str:
  code = [VERSION, loop.VERSION]
  what = [code, dataclasses.asdict(plan), texts.fingerprint, seed, jax.default_backend()]
  return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _is_trained(folder: pathlib.Path) -> bool:
  return (folder / 'config.json').is_file()


@contextlib.contextmanager
def _training(folder: pathlib.Path) -> Iterator[None]:
  """Holds the training of one base model; a process that has to wait says so."""
  wait = lambda sentence: _say(f'{sentence}, which is training it; waiting for its result')
  files.make_folder(folder.parent, 'LISSOM_CACHE names another cache folder')
  with lock.hold(folder.with_suffix('.lock'), f'the base model {folder}', on_wait=wait):
    yield


def _train(plan, texts, seed, folder):
  _say(f'training the base model once, kept in {folder}')
  tokenizer = Tokenizer.train_bpe(
    excerpts(texts.train, plan.tokenizer_characters, seed=seed), plan.vocab_size
  )
  data = PackedDataset.from_texts(
    excerpts(texts.train, plan.train_characters, seed=seed),
    tokenizer,
    seq_len=plan.seq_len,
    batch_size=plan.batch_size,
    seed=seed,
  )
  optimizer = OptimizerConfig(
    steps=plan.steps, learning_rate=plan.learning_rate, warmup_steps=plan.warmup_steps
  )
  settings = FitConfig(optimizer=optimizer, step=STEP, checkpoint_every=CHECKPOINT_EVERY)
  model = Transformer(config(plan, tokenizer), rngs=nnx.Rngs(seed))
  run = folder.with_suffix('.run')
  try:
    result = loop.fit(model, data, settings, folder=run)
  except AnotherRun:  # it was killed under another version, whose runs had other settings
    _say('an earlier training of it cannot be resumed by this version; it begins anew')
    shutil.rmtree(run)
    result = loop.fit(model, data, settings, folder=run)
  about = {'plan': dataclasses.asdict(plan), 'train_loss': result.records[-1]['loss']}
  with files.atomic_file(folder.with_suffix('.json')) as path:
    path.write_text(json.dumps(about))
  hf.save_pretrained(result.model, tokenizer, folder)
  shutil.rmtree(run)


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
