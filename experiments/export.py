r"""Writes a model for another program, with its codes as they are where they fit.

  python -m experiments.export --model=DIR --type=q4_k --out=model.gguf
  python -m experiments.export --model=DIR --type=q4_k --text=FILE --out=model.gguf
  python -m experiments.export --model=out/smollm2/models/gptq_int4 --out=model.gguf
  python -m experiments.export --model=DIR --format=compressed-tensors --out=FOLDER

The model is a Hugging Face folder or hub id, a .gguf file, or a folder that `experiments.compress`
saved. With --format=compressed-tensors, the output is a folder that transformers and vLLM read:
layers of integers (int8 to int2), fp8, mxfp4, mxfp8 and nvfp4 stay as they are, and so does the
rounding of inputs; `model.compressed_tensors` says what is widened. --bitmask stores sparse
matrices as a mask and the values that are left.

A .gguf file is what llama.cpp reads. With --type=auto, the default, each matrix whose codes are
those of a type of the file is copied bit for bit (symmetric int4 in groups of 32 is Q4_0,
asymmetric Q4_1, int8 Q8_0), and --rest is the type of all others. With --text, the scales of what
is rounded minimize the error weighted by the mean squares of the inputs on calibration text, as an
importance matrix of llama.cpp does. What had to be widened, rounded or left out is printed.

Device: any. Minutes: below 1 for 135 M parameters on two CPU cores, 2 with --text.
"""

import pathlib

from absl import flags

from experiments import base as embedded
from experiments import common
from model import compressed_tensors, corpus, gguf
from model.compress.input_squares import input_squares
from model.compressed_tensors import scheme
from model.gguf import writer
from model.tokenizer import window_bos

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file to write.')
FORMATS = GGUF, COMPRESSED = 'gguf', scheme.METHOD
FORMAT = flags.DEFINE_enum(
  'format', GGUF, FORMATS, 'Whose: gguf is a file of llama.cpp, the other a folder of transformers.'
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
SMOKE = flags.DEFINE_bool('smoke', False, 'Write the tiny base model.')
PLUGINS = common.define_plugins()


# The flags of each format that the other has no use for.
ONLY = {GGUF: (TYPE, REST, TEXT), COMPRESSED: (BITMASK,)}


def main() -> None:
  common.load_plugins(PLUGINS.value)
  path = common.out(OUT.value)
  for format, own in ONLY.items():
    for flag in own if format != FORMAT.value else ():
      if flag.value != flag.default:
        raise ValueError(f'--{flag.name} is for --format={format}, not {FORMAT.value}')
  write = _write_gguf if FORMAT.value == GGUF else _write_compressed
  print('\n'.join(write(path)))
  files = [path] if path.is_file() else path.glob('*.safetensors')
  print(f'{path}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB')


def _write_compressed(path: pathlib.Path) -> list[str]:
  model, tokenizer, _ = _inputs()
  rows = compressed_tensors.write(path, model, tokenizer, bitmask=BITMASK.value)
  return compressed_tensors.summary(rows)


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
