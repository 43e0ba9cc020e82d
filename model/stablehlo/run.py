"""Continues token ids greedily with the programs beside this file.

  python run.py 504,3575,282 16

It needs jax alone: pip install jax flatbuffers
"""

import json
import pathlib
import sys

import jax
import numpy as np


def load(folder):
  """Reads what `programs.json` lists: (about, programs by file name, weights)."""
  folder = pathlib.Path(folder)
  if not (folder / 'programs.json').is_file():
    raise ValueError(f'{folder} has no programs.json; name a folder of exported programs')
  about = json.loads((folder / 'programs.json').read_text())
  for path, size in ((folder / name, size) for name, size in about['bytes'].items()):
    if not path.is_file() or path.stat().st_size != size:
      raise ValueError(f'{path} is not the file of {size} bytes that was exported; copy it again')
  read = lambda name: jax.export.deserialize(bytearray((folder / name).read_bytes()))
  programs = {name: read(name) for name in about['bytes'] if name.endswith('.bin')}
  data = np.memmap(folder / 'weights.safetensors', np.uint8, 'r')
  first = 8 + int.from_bytes(data[:8].tobytes(), 'little')
  header = json.loads(data[8:first].tobytes())
  weights = []
  for name, dtype in about['weights']:
    begin, end = header[name]['data_offsets']
    values = np.asarray(data[first + begin : first + end]).view(jax.numpy.dtype(dtype))
    weights.append(jax.numpy.asarray(values.reshape(header[name]['shape'])))
  return about, programs, tuple(weights)


def generate(loaded, prompts, count):
  """Continues `batch` prompts of one length by up to `count` tokens; the new ones of each."""
  about, programs, weights = loaded
  tokens, length, at = np.array(prompts, np.int32, ndmin=2), len(prompts[0]), 0
  if len(tokens) != about['batch'] or not 0 < length <= about['capacity'] - count:
    most = f'{about["batch"]} prompts of one length, and up to {about["capacity"]} tokens a row'
    raise ValueError(f'the programs take {most}')
  if not 0 <= tokens.min() <= tokens.max() < about['vocabulary']:
    raise ValueError(f'tokens are 0 to {about["vocabulary"] - 1}, not as in {prompts}')
  steps = {n: jax.jit(programs[f'step_{n}.bin'].call, donate_argnums=3) for n in about['lengths']}
  cache = programs['start.bin'].call()
  ended = lambda: np.isin(tokens[:, length:], about['ends'])
  while at < length + count - 1 and not ended().any(1).all():
    n = max(n for n in steps if at + n <= tokens.shape[1])
    positions = np.arange(at, at + n, dtype=np.int32)[None].repeat(len(tokens), 0)
    logits, cache = steps[n](weights, tokens[:, at : at + n], positions, cache)
    at += n
    if at == tokens.shape[1]:
      tokens = np.concatenate([tokens, np.asarray(logits).argmax(-1)[:, None].astype(np.int32)], 1)
  ends = [[*row, True].index(True) for row in ended()]
  return [row[length : length + end].tolist() for row, end in zip(tokens, ends)]


if __name__ == '__main__':
  loaded = load(pathlib.Path(__file__).parent)
  prompt = [int(word) for word in sys.argv[1].split(',')]
  print(generate(loaded, [prompt] * loaded[0]['batch'], int(sys.argv[2]))[0])
