r"""Writes a model for another program, with its codes as they are where they fit.

  python -m experiments.export --model=DIR --type=q4_k --out=model.gguf
  python -m experiments.export --model=DIR --type=q4_k --text=FILE --out=model.gguf
  python -m experiments.export --model=out/smollm2/models/gptq_int4 --out=model.gguf
  python -m experiments.export --model=DIR --format=compressed-tensors --out=FOLDER
  python -m experiments.export --model=DIR --format=stablehlo --platforms=cpu,cuda --out=FOLDER
  python FOLDER/run.py 504,3575,282 16

The model is a Hugging Face folder or hub id, a .gguf file, or a folder that `experiments.compress`
saved. What had to be widened, rounded or left out is printed.

gguf, a file for llama.cpp: with --type=auto, the default, each matrix whose codes are those of a
type of the file is copied bit for bit (symmetric int4 in groups of 32 is Q4_0, asymmetric Q4_1,
int8 Q8_0), and --rest is the type of all others. With --text, the scales of what is rounded
minimize the error weighted by the mean squares of the inputs on calibration text, as an importance
matrix of llama.cpp does.

compressed-tensors, a folder for transformers and vLLM: layers of integers (int8 to int2), fp8,
mxfp4, mxfp8 and nvfp4 stay as they are, and so does the rounding of inputs;
`model.compressed_tensors` says what is widened. --bitmask stores sparse matrices as a mask and the
values that are left.

stablehlo, a folder of programs that run with jax alone (`model.stablehlo`).

Device: any. Minutes: below 1 for 135 M parameters on two CPU cores, 2 with --text.
"""

import pathlib

from absl import flags

from experiments import base as embedded
from experiments import common
from model import compressed_tensors, corpus, gguf, stablehlo
from model.compress.input_squares import input_squares
from model.compressed_tensors import scheme
from model.gguf import writer
from model.tokenizer import window_bos

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file to write.')
GGUF, COMPRESSED, STABLEHLO = 'gguf', scheme.METHOD, 'stablehlo'
FORMAT = flags.DEFINE_enum(
  'format',
  GGUF,
  [GGUF, COMPRESSED, STABLEHLO],
  'A file for llama.cpp, a folder for transformers and vLLM, or programs that need jax alone.',
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
OUT = common.define_out('', 'The file or folder to write.')
TEXT = flags.DEFINE_string('text', None, 'Calibration text for the scales of what is rounded.')
ROWS = flags.DEFINE_integer('calibration_rows', 64, 'Rows of calibration text.', lower_bound=1)
SEQ_LEN = flags.DEFINE_integer('seq_len', 512, 'Tokens a row.', lower_bound=2)
BITMASK = flags.DEFINE_bool('bitmask', False, 'Store sparse matrices as a mask and their values.')
SEED = flags.DEFINE_integer('seed', 0, 'Which draw of calibration text.', lower_bound=0)
PLATFORMS = flags.DEFINE_list('platforms', ['cpu'], 'Where programs run: some of cpu, cuda, tpu.')
BATCH = flags.DEFINE_integer('batch', 1, 'Rows of a program.')
CAPACITY = flags.DEFINE_integer('capacity', 1024, 'Tokens a row of the cache of programs.')
STEPS = flags.DEFINE_multi_integer('steps', [16, 128], 'Tokens that a step takes, besides one.')
KV_CACHE = common.define_kv_cache('float', 'The key/value cache of programs.')
SMOKE = flags.DEFINE_bool('smoke', False, 'Write the tiny base model.')
PLUGINS = common.define_plugins()


# The flags that the other formats have no use for.
ONLY = {
  GGUF: (TYPE, REST, TEXT),
  COMPRESSED: (BITMASK,),
  STABLEHLO: (PLATFORMS, BATCH, CAPACITY, STEPS, KV_CACHE),
}


def main() -> None:
  common.load_plugins(PLUGINS.value)
  if not (MODEL.value or SMOKE.value) or not OUT.value:
    raise ValueError('export needs --model and --out (--smoke needs --out alone)')
  path = common.out(OUT.value)
  for format, own in ONLY.items():
    for flag in own if format != FORMAT.value else ():
      if flag.value != flag.default:
        raise ValueError(f'--{flag.name} is for --format={format}, not {FORMAT.value}')
  print('\n'.join(WRITERS[FORMAT.value](path)))
  files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
  print(f'{path}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB')


def _write_gguf(path: pathlib.Path) -> list[str]:
  types = gguf.Types(matrices=TYPE.value, rest=REST.value)
  model, tokenizer, texts = _inputs()
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
  return gguf.summary(written)


def _write_compressed(path: pathlib.Path) -> list[str]:
  model, tokenizer, _ = _inputs()
  rows = compressed_tensors.write(path, model, tokenizer, bitmask=BITMASK.value)
  return compressed_tensors.summary(rows)


def _write_programs(path: pathlib.Path) -> list[str]:
  options = stablehlo.Options(
    platforms=PLATFORMS.value,
    batch=BATCH.value,
    capacity=CAPACITY.value,
    lengths=STEPS.value,
    kv_cache=KV_CACHE.value,
  )
  model, tokenizer, _ = _inputs()
  sizes = stablehlo.write(path, model, tokenizer, options)
  return [f'{name}: {size / 1e6:.2f} MB' for name, size in sizes.items()]


WRITERS = {GGUF: _write_gguf, COMPRESSED: _write_compressed, STABLEHLO: _write_programs}


def _inputs():
  if SMOKE.value and MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    return trained.model, trained.tokenizer, trained.texts
  model, tokenizer = common.load_model(MODEL.value)
  return model, tokenizer, None if TEXT.value is None else corpus.load(TEXT.value)


if __name__ == '__main__':
  common.run(main)
