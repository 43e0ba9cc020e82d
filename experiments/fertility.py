r"""Compares vocabularies: tokens per byte of a text, and with it the bytes per second of models.

  python -m experiments.fertility --models=DIR,DIR --text=FILE
  python -m experiments.fertility --models=DIR,DIR --text=FILE --time

A model with a larger vocabulary reads and writes fewer tokens for the same text, and each of them
takes longer. What counts is the product: bytes per second = tokens per second x bytes per token.
--models are folders, hub ids or .gguf files; without --time only their tokenizers are used, and a
folder may hold a tokenizer alone. --time decodes with each model, in interleaved rounds. Speeds
are ratios to the first model. Columns: `tokens` of the vocabulary; `used`, those that occur in the
text; `tokens/byte` (fertility); `bytes/token`.

Device: any. Minutes: below 1 for tokenizers, and 2 with --time for two models of 135 M parameters
on two CPU cores.
"""

import dataclasses
import functools
import pathlib

import numpy as np
from absl import flags

from experiments import base as embedded
from experiments import common
from model import corpus, gguf
from model.eval import records, timing
from model.eval.records import Metric, Record
from model.infer import bench
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.vocabulary import trim

PHASE_BATCH, PROMPT, STEPS = 1, 64, 32
MODELS = flags.DEFINE_list('models', [], 'Folders, hub ids or .gguf files.')
TEXT = flags.DEFINE_string('text', None, 'Text file or folder, python-source or python-docs.')
TIME = flags.DEFINE_bool('time', False, 'Decode with each model, too.')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'The tiny base model on a little text.')
PLUGINS = common.define_plugins()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A vocabulary on a text, and the speed of its model if that was measured."""

  name: str
  vocab_size: int
  used: int
  tokens: int
  text_bytes: int
  decode: timing.Timing | None = None

  @property
  def bytes_per_token(self) -> float:
    return self.text_bytes / self.tokens

  def metrics(self) -> dict[str, Metric]:
    found = {
      'vocab_size': Metric(self.vocab_size, 'tokens'),
      'tokens_used': Metric(self.used, 'tokens'),
      'tokens_per_byte': Metric(self.tokens / self.text_bytes, '1', self.text_bytes),
      'bytes_per_token': Metric(self.bytes_per_token, 'bytes', self.tokens),
    }
    if self.decode is not None:
      found |= {
        'tokens_per_s': self.decode.rate(STEPS * PHASE_BATCH, 'tokens/s'),
        'text_bytes_per_s': self.decode.rate(STEPS * PHASE_BATCH * self.bytes_per_token, 'byte/s'),
        'token_speedup': self.decode.speedup,
      }
    return found


def main() -> None:
  common.load_plugins(PLUGINS.value)
  names, sources, texts = _inputs()
  rows = [_row(name, tokenizer, texts) for name, (_, tokenizer) in zip(names, sources)]
  if TIME.value:
    timings = _timings(names, [model for model, _ in sources])
    rows = [dataclasses.replace(row, decode=timings[row.name]) for row in rows]
  print('\n'.join(_table(rows)))
  if OUTPUT.value:
    for row in rows:
      records.append(pathlib.Path(OUTPUT.value), _record(row))


def _inputs() -> tuple[list[str], list[tuple[Transformer | None, Tokenizer]], list[str]]:
  if SMOKE.value and not MODELS.value:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    return ['base'], [(trained.model, trained.tokenizer)], list(trained.texts.held_out[:20])
  if not MODELS.value or TEXT.value is None:
    raise ValueError('fertility needs --models and --text (or --smoke)')
  if len(set(MODELS.value)) < len(MODELS.value):
    raise ValueError('--models names a model twice')
  load = common.load_model if TIME.value else _tokenizer
  return list(MODELS.value), [load(name) for name in MODELS.value], _documents(TEXT.value)


def _tokenizer(name: str) -> tuple[None, Tokenizer]:
  """The tokenizer alone, which a folder may hold without a model."""
  path = pathlib.Path(name)
  found = Tokenizer.load(path) if path.is_dir() and gguf.find_file(path) is None else None
  return None, found or common.load_model(name)[1]


def _documents(name: str) -> list[str]:
  texts = corpus.load(name)
  return [*texts.train, *texts.calibration, *texts.held_out]


def _row(name: str, tokenizer: Tokenizer, texts: list[str]) -> Row:
  counts = trim.count(tokenizer, texts)
  if not counts.any():
    raise ValueError(f'the text has no token of the vocabulary of {name}')
  return Row(
    name=name,
    vocab_size=tokenizer.vocab_size,
    used=int(np.count_nonzero(counts)),
    tokens=int(counts.sum()),
    text_bytes=sum(len(text.encode()) for text in texts),
  )


def _timings(names, models) -> dict[str, timing.Timing]:
  prepare = functools.partial(bench.prepare, batch=PHASE_BATCH, prompt_length=PROMPT, steps=STEPS)
  calls = {name: prepare(model).decode for name, model in zip(names, models, strict=True)}
  return timing.time_interleaved(calls, rounds=ROUNDS.value)


def _table(rows: list[Row]) -> list[str]:
  header = f'{"tokens":>9} {"used":>9} {"tokens/byte":>12} {"bytes/token":>12}'
  header += f' {"tokens/s":>10} {"speed":>7} {"bytes/s":>10} {"speed":>7}' if rows[0].decode else ''
  lines, first = [header + '  model'], rows[0]
  for row in rows:
    line = f'{row.vocab_size:9,} {row.used:9,} {1 / row.bytes_per_token:12.4f}'
    line += f' {row.bytes_per_token:12.4f}'
    if row.decode is not None:
      found, faster = row.metrics(), row.decode.speedup.value
      line += f' {found["tokens_per_s"].value:10,.1f} {faster:7.2f}'
      of_bytes = faster * row.bytes_per_token / first.bytes_per_token
      line += f' {found["text_bytes_per_s"].value:10,.1f} {of_bytes:7.2f}'
    lines.append(f'{line}  {row.name}')
  return lines


def _record(row: Row) -> Record:
  return Record(
    experiment='fertility',
    recipe=pathlib.Path(row.name).name,
    command=common.command(),
    config={'model': row.name, 'text': TEXT.value, 'prompt': PROMPT, 'steps': STEPS},
    environment=records.environment(),
    seed=None,
    metrics=row.metrics(),
  )


if __name__ == '__main__':
  common.run(main)
