r"""Writes a model into the file of another program, with its codes as they are where they fit.

  python -m experiments.export --model=DIR --type=q4_k --out=model.gguf
  python -m experiments.export --model=DIR --type=q4_k --text=FILE --out=model.gguf
  python -m experiments.export --model=out/smollm2/models/gptq_int4 --out=model.gguf

The model is a Hugging Face folder or hub id, a .gguf file, or a folder that `experiments.compress`
saved. With --type=auto, the default, each matrix whose codes are those of a type of the file is
copied bit for bit (symmetric int4 in groups of 32 is Q4_0, asymmetric Q4_1, int8 Q8_0), and --rest
is the type of all others. With --text, the scales of what is rounded minimize the error weighted by
the mean squares of the inputs on calibration text, as an importance matrix of llama.cpp does. What
had to be widened, rounded or left out is printed.

  python -m experiments.export --model=DIR --format=stablehlo --platforms=cpu,cuda --out=FOLDER
  python FOLDER/run.py 504,3575,282 16

writes the model as StableHLO programs that run with jax alone (`model.stablehlo`).

Device: any. Minutes: below 1 for 135 M parameters on two CPU cores, 2 with --text.
"""

import pathlib

from absl import flags

from experiments import base as embedded
from experiments import common
from model import corpus, gguf, stablehlo
from model.compress.input_squares import input_squares
from model.gguf import writer
from model.tokenizer import window_bos

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file to write.')
FORMAT = flags.DEFINE_enum(
  'format', 'gguf', ['gguf', 'stablehlo'], 'A file for llama.cpp, or programs that need jax alone.'
)
TYPE = flags.DEFINE_enum(
  'type', writer.AUTO, [writer.AUTO, *writer.TYPES], 'Type of the matrices of the blocks.'
)
REST = flags.DEFINE_enum(
  'rest',
  None,
  list(writer.TYPES),
  'Type of the embedding and the head, and with --type=auto of matrices without codes of a type of '
  'the file. Default: f16 with auto, else what llama.cpp takes beside the type.',
)
OUT = common.define_out('', 'The file to write, or the folder of programs.')
TEXT = flags.DEFINE_string('text', None, 'Calibration text for the scales of what is rounded.')
ROWS = flags.DEFINE_integer('calibration_rows', 64, 'Rows of calibration text.', lower_bound=1)
SEQ_LEN = flags.DEFINE_integer('seq_len', 512, 'Tokens a row.', lower_bound=2)
SEED = flags.DEFINE_integer('seed', 0, 'Which draw of calibration text.', lower_bound=0)
PLATFORMS = flags.DEFINE_list('platforms', ['cpu'], 'Where programs run: some of cpu, cuda, tpu.')
BATCH = flags.DEFINE_integer('batch', 1, 'Rows of a program.')
CAPACITY = flags.DEFINE_integer('capacity', 1024, 'Tokens a row of the cache of programs.')
STEPS = flags.DEFINE_multi_integer('steps', [16, 128], 'Tokens that a step takes, besides one.')
KV_CACHE = common.define_kv_cache('float', 'The key/value cache of programs.')
SMOKE = flags.DEFINE_bool('smoke', False, 'Write the tiny base model.')
PLUGINS = common.define_plugins()


def main() -> None:
  common.load_plugins(PLUGINS.value)
  path, types = common.out(OUT.value), gguf.Types(matrices=TYPE.value, rest=REST.value)
  model, tokenizer, texts = _inputs()
  if FORMAT.value == 'stablehlo':
    _write_programs(path, model, tokenizer)
    return
  importance = None
  if texts is not None:
    bos_id = window_bos(tokenizer, model.config, 'auto')
    rows_BT = common.calibration_rows(
      tokenizer, texts, SEQ_LEN.value, ROWS.value, SEED.value, bos_id
    )
    importance = input_squares(model, rows_BT)
  path.parent.mkdir(parents=True, exist_ok=True)
  written = gguf.write(
    path,
    model,
    tokenizer,
    types,
    name=pathlib.Path(MODEL.value or 'base').stem,
    importance=importance,
    progress=common.labelled('write'),
  )
  print('\n'.join(gguf.summary(written)))
  print(f'{path}: {path.stat().st_size / 1e6:.1f} MB')


def _write_programs(path, model, tokenizer) -> None:
  options = stablehlo.Options(
    platforms=PLATFORMS.value,
    batch=BATCH.value,
    capacity=CAPACITY.value,
    lengths=STEPS.value,
    kv_cache=KV_CACHE.value,
  )
  sizes = stablehlo.write(path, model, tokenizer, options)
  print('\n'.join(f'{path / name}: {size / 1e6:.2f} MB' for name, size in sizes.items()))


def _inputs():
  if SMOKE.value and MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    return trained.model, trained.tokenizer, trained.texts
  if MODEL.value is None:
    raise ValueError('export needs --model (or --smoke)')
  model, tokenizer = common.load_model(MODEL.value)
  return model, tokenizer, None if TEXT.value is None else corpus.load(TEXT.value)


if __name__ == '__main__':
  common.run(main)
