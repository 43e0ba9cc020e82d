r"""Quantizes GGUF files and measures their perplexity with llama.cpp, in an environment of its own.

  pip install llama-cpp-python numpy
  python experiments/peers/measure_llama_cpp.py WORK

`experiments.compare_llama_cpp` prepares the folder WORK and calls this script. WORK holds
`windows.npy` (token ids [rows, length]) and `work.json`: files to make, as [source, target, type of
llama.cpp], and files to measure. The script writes `measured.json`: for each file the sum of the
negative log likelihoods of each window, every token but its first, and the seconds that took.

It imports nothing from this project, because JAX need not be installed in that environment.
"""

import ctypes
import json
import pathlib
import sys
import time

import llama_cpp
import numpy as np


def main() -> None:
  work = pathlib.Path(sys.argv[1])
  asked = json.loads((work / 'work.json').read_text())
  for source, target, name in asked['make']:
    quantize(work / source, work / target, name)
  windows_BT = np.load(work / 'windows.npy')
  measured = {name: measure(work / name, windows_BT) for name in asked['measure']}
  about = {'version': llama_cpp.__version__, 'system': _system(), 'files': measured}
  (work / 'measured.json').write_text(json.dumps(about))


def quantize(source: pathlib.Path, target: pathlib.Path, name: str) -> None:
  """Writes a file of another type, which is one of llama.cpp's names such as Q4_0 or Q4_K_S."""
  options = llama_cpp.llama_model_quantize_default_params()
  options.ftype = getattr(llama_cpp, f'LLAMA_FTYPE_MOSTLY_{name}')
  names = str(source).encode(), str(target).encode()
  if llama_cpp.llama_model_quantize(*names, ctypes.byref(options)):
    raise ValueError(f'llama.cpp could not quantize {source} to {name}')


def measure(file: pathlib.Path, windows_BT: np.ndarray) -> dict:
  """The negative log likelihood of each window, and the seconds of all."""
  length = windows_BT.shape[1]
  options = {'n_ctx': length, 'n_batch': length, 'logits_all': True, 'verbose': False}
  # Several threads wait for one another in a loop, which stalls them on a busy machine.
  model = llama_cpp.Llama(str(file), n_threads=1, n_threads_batch=1, **options)
  start, sums = time.perf_counter(), []
  for window_T in windows_BT:
    model.reset()
    model.eval(window_T.tolist())
    sums.append(_nll(np.asarray(model.scores[: length - 1], np.float64), window_T[1:]))
  return {'nll_B': sums, 'seconds': time.perf_counter() - start}


def _nll(logits_TV, targets_T) -> float:
  largest = logits_TV.max(-1, keepdims=True)
  sums_T = np.log(np.exp(logits_TV - largest).sum(-1)) + largest[:, 0]
  return float((sums_T - logits_TV[np.arange(len(targets_T)), targets_T]).sum())


def _system() -> str:
  return llama_cpp.llama_print_system_info().decode()


if __name__ == '__main__':
  main()
