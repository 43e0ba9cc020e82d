r"""Trains a byte-level BPE tokenizer and measures the bytes of unseen text per token.

With no flags it reads the source of Python's standard library:

  python -m experiments.train_tokenizer --vocab_size=4096 --out=out/tokenizer

On a text of yours (a file, or a folder of .txt, .md, .py and .jsonl files):

  python -m experiments.train_tokenizer --text=DIR --vocab_size=32000 --out=out/tokenizer

The tokenizer is lossless: it does not normalise, its alphabet has every byte, and each digit is a
token. The folder is a Hugging Face tokenizer: `experiments.train_lm --tokenizer=out/tokenizer` and
transformers load it. The same text and flags give the same files.

Device: CPU. Minutes: below 1. Expect 3.1 bytes per token with the defaults on Python source, and
more with a larger vocabulary.
"""

from collections.abc import Sequence

from absl import flags

from experiments import common
from model import corpus
from model.eval import records
from model.files import atomic_folder
from model.tokenizer import Tokenizer
from model.train.data import excerpts

RECORD = 'records.json'
SMOKE_VOCAB_SIZE, SMOKE_CHARACTERS = 512, 100_000

TEXT = flags.DEFINE_string(
  'text', None, "Text file or folder. Default: the source of Python's standard library."
)
OUT = common.define_out('out/tokenizer', 'Folder to write. An earlier tokenizer is replaced.')
VOCAB_SIZE = flags.DEFINE_integer(
  'vocab_size', 4096, 'Tokens, with the 256 bytes and one special token.', lower_bound=257
)
CHARACTERS = flags.DEFINE_integer(
  'characters',
  4_000_000,
  'Characters to train on, about; each document gives a passage of equal length. 0 takes all.',
  lower_bound=0,
)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the places of the passages.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny vocabulary from a little text, in seconds.')


def main() -> None:
  vocab_size = SMOKE_VOCAB_SIZE if SMOKE.value else VOCAB_SIZE.value
  texts = corpus.load(TEXT.value)
  out = common.out(OUT.value)
  with atomic_folder(out, kind='tokenizer') as folder:
    tokenizer, sample = _train(texts, vocab_size)
    tokenizer.save(folder)
    record = _record(tokenizer, texts, sample, vocab_size)
    (folder / RECORD).write_text(records.to_line(record) + '\n')
  print(
    f'{out}: {tokenizer.vocab_size} tokens, '
    f'{record.value("bytes_per_token"):.3f} bytes a token on held-out text'
  )


def _train(texts, vocab_size) -> tuple[Tokenizer, Sequence[str]]:
  """The tokenizer, and the text to measure it on."""
  characters = SMOKE_CHARACTERS if SMOKE.value else CHARACTERS.value
  passages = texts.train
  if characters:
    passages = excerpts(texts.train, characters, seed=SEED.value)
  tokenizer = Tokenizer.train_bpe(passages, vocab_size)
  return tokenizer, excerpts(texts.held_out, characters) if SMOKE.value else texts.held_out


def _record(tokenizer, texts, sample, vocab_size) -> records.Record:
  tokens = sum(map(len, tokenizer.encode_many(sample)))
  size = sum(len(text.encode()) for text in sample)
  notes = []
  if tokenizer.vocab_size < vocab_size:
    notes.append(f'the text gave {tokenizer.vocab_size} tokens, not the {vocab_size} asked for')
  return records.Record(
    experiment='train_tokenizer',
    recipe='byte_bpe',
    command=common.command(),
    config={
      'vocab_size': vocab_size,
      'text': texts.source,
      'text_fingerprint': texts.fingerprint,
    },
    environment=records.environment(),
    seed=SEED.value,
    metrics={
      'bytes_per_token': records.Metric(size / tokens, 'bytes', tokens),
      'vocab_size': records.Metric(tokenizer.vocab_size, 'tokens'),
    },
    notes=notes,
  )


if __name__ == '__main__':
  common.run(main)
