r"""Our files in llama.cpp beside those that it quantizes itself, on one model and one text.

  python -m experiments.compare_llama_cpp --model=DIR --text=FILE \
      --peer=PEER_VENV/bin/python --output=out/llama_cpp.jsonl

The model is written as F16, which llama.cpp quantizes to its own types. It is compressed by our
recipes and written with its codes as they are (`experiments.export --type=auto`), and rounded to
llama.cpp's types by importance (`--type=TYPE --text`). llama.cpp measures the perplexity of all
files, on the same windows of token ids as we do: each window by itself, every token but its first.
Ours is that of the compressed model itself, and of files, that of what we read from them.

PEER_VENV: pip install llama-cpp-python numpy.

Device: CPU. Minutes: 10 for a model of 135 M parameters, two cores and 20 windows.
Expected: both perplexities of a file within 0.5 %; llama.cpp rounds the inputs of each product with
quantized weights to 8 bits. On SmolLM2-135M, GPTQ with 8,192 tokens of calibration text is above
llama.cpp's own Q4_0 with positive scales (gptq_int4_g32: the largest weight of a group is half a
step off the grid) and below it with signed ones, as Q4_0 has them (gptq_int4_g32_signed).
"""

import json
import math
import pathlib
import subprocess
import tempfile

import numpy as np
from absl import flags

from experiments import common
from model import corpus, gguf, hf
from model.compress import pipeline
from model.compress import recipe as recipes
from model.compress.input_squares import input_squares
from model.eval import perplexity, records
from model.eval.records import Metric, Record
from model.gguf import writer
from model.tokenizer import window_bos

PEER_SCRIPT = pathlib.Path(__file__).parent / 'peers' / 'measure_llama_cpp.py'
BASE = 'f16'

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file to compress.')
TEXT = flags.DEFINE_string('text', None, 'Text for calibration and measurement.')
PEER = flags.DEFINE_string('peer', None, 'Python of the environment that has llama-cpp-python.')
RECIPES = flags.DEFINE_list(
  'recipes', ['gptq_int4_g32_signed'], 'Recipes whose codes are those of a type of llama.cpp.'
)
TYPES = flags.DEFINE_list('types', ['q4_0'], "Types of llama.cpp's own that it quantizes to.")
CALIBRATED = flags.DEFINE_list('calibrated', ['q4_0'], 'Types that we round to by importance.')
REST = flags.DEFINE_enum('rest', 'q8_0', list(writer.TYPES), 'Embedding and head of our files.')
SEQ_LEN = flags.DEFINE_integer('seq_len', 256, 'Tokens a row and a window.', lower_bound=2)
ROWS = flags.DEFINE_integer('calibration_rows', 128, 'Rows of calibration text.', lower_bound=1)
WINDOWS = flags.DEFINE_integer('max_windows', 40, 'Held-out windows.', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Which draw of calibration text.', lower_bound=0)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')


def main() -> None:
  for flag, holder in {'model': MODEL, 'text': TEXT, 'peer': PEER}.items():
    if not holder.value:
      raise ValueError(f'--{flag} is needed')
  chosen = [recipes.resolve(name, common.RECIPES) for name in RECIPES.value]
  types = {name: writer.Types(matrices=name, rest=REST.value) for name in CALIBRATED.value}
  model, tokenizer = common.load_model(MODEL.value)
  calibration_BT, windows = _tokens(model, tokenizer)
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    qualities, said = {}, {}
    gguf.write(work / f'{BASE}.gguf', model, tokenizer, writer.Types(matrices='f16'))
    squares = input_squares(model, calibration_BT) if types else None
    for name, one in types.items():
      said[name] = gguf.write(work / f'{name}.gguf', model, tokenizer, one, importance=squares)
    for one in chosen:
      compressed, _ = pipeline.compress(
        model, one, calibration_BT, progress=common.labelled(one.name)
      )
      path, auto = work / f'{one.name}.gguf', writer.Types(rest=REST.value)
      said[one.name] = gguf.write(path, compressed, tokenizer, auto)
      qualities[one.name] = perplexity.evaluate(compressed, windows)
    _finish(work, windows, qualities, said)


def _tokens(model, tokenizer) -> tuple[np.ndarray, perplexity.Windows]:
  """Calibration rows and held-out windows, as the main job draws them."""
  texts, length = corpus.load(TEXT.value), SEQ_LEN.value
  bos_id = window_bos(tokenizer, model.config, 'auto')
  calibration_BT = common.calibration_rows(tokenizer, texts, length, ROWS.value, SEED.value, bos_id)
  held_out = ''.join(texts.held_out)[: 12 * WINDOWS.value * length]
  tokens_T, ends_T = tokenizer.encode_with_bytes(held_out)
  return calibration_BT, perplexity.windows(tokens_T, ends_T, length, WINDOWS.value, bos_id)


def _finish(work, windows, qualities, said) -> None:
  """Has llama.cpp make and measure its files, measures the others here, and writes records."""
  np.save(work / 'windows.npy', windows.tokens_BT)
  own_types = {f'llama.cpp {name}': name.upper() for name in TYPES.value}
  files = {BASE: f'{BASE}.gguf'} | {name: f'{name}.gguf' for name in own_types | said}
  make = [[files[BASE], files[name], kind] for name, kind in own_types.items()]
  (work / 'work.json').write_text(json.dumps({'make': make, 'measure': list(files.values())}))
  done = subprocess.run([PEER.value, str(PEER_SCRIPT), str(work)], capture_output=True, text=True)
  if done.returncode:
    raise ValueError(f'{PEER.value} failed: {done.stderr.strip()[-1500:]}')
  peer = json.loads((work / 'measured.json').read_text())
  for name, file in files.items():
    if name not in qualities:
      qualities[name] = perplexity.evaluate(hf.load_pretrained(work / file)[0], windows)
    size = (work / file).stat().st_size
    record = _record(name, windows, qualities[name], peer, file, size)
    record.config['tensors'] = gguf.summary(said.get(name, ()))
    print(_words(record), flush=True)
    if OUTPUT.value:
      records.append(OUTPUT.value, record)


def _record(name, windows, quality, peer, file, size) -> Record:
  measured = peer['files'][file]
  theirs, n = np.array(measured['nll_B']), windows.predicted
  return Record(
    experiment='compare_llama_cpp',
    recipe=name,
    command=common.command(),
    config={
      'seq_len': SEQ_LEN.value,
      'calibration_rows': ROWS.value,
      'bos': windows.bos,
      'rest': REST.value,
      'llama_cpp_python': peer['version'],
      'system': peer['system'],
    },
    environment=records.environment(),
    seed=SEED.value,
    metrics={
      'ppl': Metric(quality.ppl, '1', n),
      'peer_ppl': Metric(math.exp(theirs.sum() / n), '1', n),
      'peer_ppl / ppl': Metric(math.exp((theirs.sum() - quality.nll_sum) / n), '1', n),
      'file_bytes': Metric(size, 'B', 1),
      'peer_seconds': Metric(measured['seconds'], 's', 1),
    },
  )


def _words(record: Record) -> str:
  m = {name: metric.value for name, metric in record.metrics.items()}
  return (
    f'{record.recipe}: perplexity {m["ppl"]:.4f} here, {m["peer_ppl"]:.4f} in llama.cpp, ratio '
    f'{m["peer_ppl / ppl"]:.4f}; {m["file_bytes"] / 1e6:.1f} MB'
  )


if __name__ == '__main__':
  common.run(main)
