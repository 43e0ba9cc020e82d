r"""Changes the vocabulary of a model and writes it as a folder, for all other scripts.

  python -m experiments.vocabulary --model=DIR --method=trim --text=FILE --out=DIR
  python -m experiments.vocabulary --model=DIR --method=omp --vocab_size=8192 --text=FILE --out=DIR
  python -m experiments.vocabulary --model=DIR --method=omp --donor=DIR --text=FILE --out=DIR
  python -m experiments.vocabulary --model=DIR --method=mean --tokenizer=DIR --text=FILE --out=DIR
  python -m experiments.vocabulary --model=DIR --method=factorise --rank=128 --text=FILE --out=DIR

trim drops the tokens that the text does not need; the text is cut into the same tokens as before,
and their logits stay as they are. omp, mean, average and random give the model another vocabulary:
that of --tokenizer or --donor, or one of --vocab_size tokens that is trained on the text. What rows
new tokens get is in model/vocabulary/transplant.py; the model has to be trained afterwards, as by
`experiments.finetune` or `experiments.distill`. factorise stores the embedding as two narrow
matrices, with least error at tokens that are frequent in the text.

The vocabulary is made from the parts of the text for training and calibration, and bits per byte
and bytes per token are measured on the held-out part, before and after; --whole makes it from all
parts. A record is appended to --output. For the speed, give both folders to
`experiments.fertility`.

Device: any. Minutes: 3 for 135 M parameters on two CPU cores, most of them for measuring.
"""

import dataclasses
import pathlib

import numpy as np
from absl import flags

from experiments import base as embedded
from experiments import common
from model import corpus, fingerprint, hf
from model.eval import perplexity, records
from model.eval.records import Metric
from model.infer.prepare import prepare
from model.tokenizer import Tokenizer, window_bos
from model.transformer import Transformer, parameters
from model.vocabulary import cooccurrence, factorise, retrain, transplant, trim

TRIM, FACTORISE = 'trim', 'factorise'
SPACE_WIDTH = 256  # of vectors that are made from the text
DONOR_ATOMS, TEXT_ATOMS = 64, 8  # of the paper; vectors from a text are too rough for long sums
SMOKE_VOCAB_SIZE, SMOKE_WINDOWS = 384, 4

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file.')
METHOD = flags.DEFINE_enum(
  'method', TRIM, [TRIM, *transplant.METHODS, FACTORISE], 'What happens to the vocabulary.'
)
TEXT = flags.DEFINE_string(
  'text', None, 'Text file or folder, python-source or python-docs: the corpus.'
)
OUT = common.define_out('out/vocabulary', 'Folder to write. An earlier model is replaced.')
WHOLE = flags.DEFINE_bool('whole', False, 'Make the vocabulary from the held-out part as well.')
MIN_COUNT = flags.DEFINE_integer(
  'min_count', 1, 'trim: rarer tokens are dropped as well; above 1, they are cut into smaller ones.'
)
MULTIPLE = flags.DEFINE_integer('multiple', trim.MULTIPLE, 'trim: rows are a multiple of it.')
VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 8192, 'Tokens of a new vocabulary.')
TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder of the new vocabulary.')
DONOR = flags.DEFINE_string(
  'donor', None, 'omp: a model of the new vocabulary. Default: neighbours in the text.'
)
ATOMS = flags.DEFINE_integer(
  'atoms', None, 'omp: shared tokens in a sum, at most. Default: 64 with a donor, else 8.'
)
RANK = flags.DEFINE_integer('rank', 128, 'factorise: the width between the two matrices.')
POWER = flags.DEFINE_float(
  'power', factorise.POWER, 'factorise: of the counts that rows are weighted by; 0: all alike.'
)
SEQ_LEN = flags.DEFINE_integer('seq_len', 256, 'Tokens per window.', lower_bound=2)
MAX_WINDOWS = flags.DEFINE_integer(
  'max_windows', 40, 'Windows that are measured; 0: none.', lower_bound=0
)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of random.', lower_bound=0)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append the record to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'The tiny base model and its text.')
PLUGINS = common.define_plugins()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
  """A model after the change. lines: what to say of it.  metrics: for the record."""

  model: Transformer
  tokenizer: Tokenizer
  lines: list[str]
  metrics: dict[str, Metric]


def main() -> None:
  common.load_plugins(PLUGINS.value)
  out = common.out(OUT.value)
  model, tokenizer, texts = _inputs()
  corpus_texts = [*texts.train, *texts.calibration, *(texts.held_out if WHOLE.value else ())]
  changes = {TRIM: _trim, FACTORISE: _factorise}
  base = fingerprint.of_model(model)
  changed = changes.get(METHOD.value, _transplant)(model, tokenizer, corpus_texts)
  hf.save_pretrained(changed.model, changed.tokenizer, out)
  print('\n'.join(changed.lines))
  metrics = dict(changed.metrics)
  pairs = {'before': (model, tokenizer), 'after': (changed.model, changed.tokenizer)}
  for when, (one, own) in pairs.items():
    found = _measured(one, own, texts.held_out)
    print(
      f'{when:7}' + ', '.join(f'{m.value:,.4f} {n.replace("_", " ")}' for n, m in found.items())
    )
    metrics |= {f'{name}_{when}': metric for name, metric in found.items()}
  if OUTPUT.value:
    records.append(pathlib.Path(OUTPUT.value), _record(base, texts, metrics))
  print(f'{out}: {changed.model.config.vocab_size:,} tokens')


def _inputs():
  if SMOKE.value and MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    return trained.model, trained.tokenizer, trained.texts
  if MODEL.value is None or TEXT.value is None:
    raise ValueError('vocabulary needs --model and --text (or --smoke)')
  texts = corpus.load(TEXT.value)
  return *common.load_model(MODEL.value), texts


def _trim(model, tokenizer, texts) -> Changed:
  smaller, trimmed, report = trim.trim(
    model, tokenizer, texts, min_count=MIN_COUNT.value, multiple=MULTIPLE.value
  )
  before, after = report.tokens
  lines = [
    f'tokens {before:,} -> {after:,} ({report.used:,} of them in the text)',
    _sizes(report.parameters),
    f'{report.documents - report.changed:,} of {report.documents:,} documents are cut as before; '
    f'{report.covered / report.occurrences:.2%} of their tokens stay',
  ]
  metrics = {
    'documents': Metric(report.documents, '1'),
    'documents_changed': Metric(report.changed, '1'),
    'tokens_used': Metric(report.used, '1'),
  }
  return _changed(smaller, trimmed, lines, metrics, report.tokens, report.parameters)


def _transplant(model, tokenizer, texts) -> Changed:
  new, space_VD = _new_vocabulary(tokenizer, texts)
  usual = DONOR_ATOMS if DONOR.value else TEXT_ATOMS
  plan = transplant.Plan(
    method=METHOD.value,
    space_VD=space_VD,
    atoms=usual if ATOMS.value is None else ATOMS.value,
    centred=not DONOR.value,
    seed=SEED.value,
  )
  result, _, report = transplant.transplant(model, tokenizer, new, plan)
  lines = [
    f'tokens {report.tokens[0]:,} -> {report.tokens[1]:,}: {report.shared:,} keep their rows, '
    f'{report.made:,} are made by {report.method}, {report.averaged:,} are the average',
    _sizes(report.parameters),
  ]
  metrics = {
    'tokens_shared': Metric(report.shared, '1'),
    'tokens_averaged': Metric(report.averaged, '1'),
  }
  return _changed(result, new, lines, metrics, report.tokens, report.parameters)


def _new_vocabulary(tokenizer, texts) -> tuple[Tokenizer, np.ndarray | None]:
  """The new tokenizer, and vectors of its tokens where the method needs them."""
  donor = None
  if DONOR.value:
    if METHOD.value != 'omp' or TOKENIZER.value:
      raise ValueError('--donor is for --method=omp, and brings its own vocabulary')
    donor, new = common.load_model(DONOR.value)
  elif TOKENIZER.value:
    new = Tokenizer.load(TOKENIZER.value)
    if new is None:
      raise ValueError(f'{TOKENIZER.value} has no tokenizer')
  else:
    size = SMOKE_VOCAB_SIZE if SMOKE.value else VOCAB_SIZE.value
    new = retrain.retrain(tokenizer, texts, size)
  if METHOD.value != 'omp':
    return new, None
  if donor is not None:
    return new, np.asarray(donor.embedding(np.arange(donor.config.vocab_size)), np.float32)
  documents = [np.asarray(ids, np.int64) for ids in new.encode_many(texts)]
  return new, cooccurrence.vectors(documents, new.vocab_size, SPACE_WIDTH)


def _factorise(model, tokenizer, texts) -> Changed:
  rank = min(RANK.value, model.config.width // 2) if SMOKE.value else RANK.value
  counts = trim.count(tokenizer, texts)
  result, report = factorise.factorise(model, rank, counts, power=POWER.value)
  lines = [
    f'rank {report.rank}: {report.error:.2%} of the squared lengths of the rows is lost, '
    f'{report.weighted_error:.2%} weighted by the text',
    _sizes(report.numbers),
  ]
  metrics = {'squared_error': Metric(report.error, '1')}
  tokens = (model.config.vocab_size, model.config.vocab_size)
  return _changed(result, tokenizer, lines, metrics, tokens, report.numbers)


def _sizes(sizes: tuple[int, int]) -> str:
  before, after = sizes
  return f'parameters {before:,} -> {after:,} ({1 - after / before:.1%} saved)'


def _changed(model, tokenizer, lines, metrics, tokens, sizes) -> Changed:
  pairs = {'vocab_size': tokens, 'parameters': sizes}
  both = {
    f'{name}_{when}': Metric(value, '1')
    for name, values in pairs.items()
    for when, value in zip(('before', 'after'), values, strict=True)
  }
  return Changed(model=model, tokenizer=tokenizer, lines=lines, metrics={**metrics, **both})


def _measured(model, tokenizer, texts) -> dict[str, Metric]:
  text = '\n'.join(texts)
  ids, ends = tokenizer.encode_with_bytes(text)
  found = {'bytes_per_token': Metric(int(ends[-1]) / len(ids), 'bytes', len(ids))}
  limit = SMOKE_WINDOWS if SMOKE.value else MAX_WINDOWS.value
  if limit:
    bos_id = window_bos(tokenizer, model.config, 'auto')
    windows = perplexity.windows(ids, ends, SEQ_LEN.value, limit, bos_id)
    quality = perplexity.evaluate(prepare(model), windows, progress=common.labelled('measure'))
    found['bits_per_byte'] = Metric(quality.bits_per_byte, 'bits', quality.tokens)
  size = sum(param.get_value().nbytes for param in parameters(model).values())
  return {**found, 'stored_bytes': Metric(size, 'bytes')}


def _record(base: str, texts, metrics) -> records.Record:
  options = {
    TRIM: (WHOLE, MIN_COUNT, MULTIPLE),
    FACTORISE: (WHOLE, RANK, POWER),
  }.get(METHOD.value, (WHOLE, VOCAB_SIZE, TOKENIZER, DONOR, ATOMS))
  return records.Record(
    experiment='vocabulary',
    recipe=METHOD.value,
    command=common.command(),
    config={
      'model': MODEL.value,
      'model_fingerprint': base,
      'text': texts.source,
      'text_fingerprint': texts.fingerprint,
      'seq_len': SEQ_LEN.value,
      'max_windows': MAX_WINDOWS.value,
      **{holder.name: holder.value for holder in options},
    },
    environment=records.environment(),
    seed=SEED.value,
    metrics=metrics,
  )


if __name__ == '__main__':
  common.run(main)
