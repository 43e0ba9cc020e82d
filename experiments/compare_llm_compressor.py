r"""Our calibrated compression beside llm-compressor's, on one checkpoint and one text.

  python -m experiments.compare_llm_compressor --model=DIR --text=DIR \
      --peer=PEER_VENV/bin/python --output=out/peer.jsonl

Both sides start from the same weights and the same calibration tokens, calibrate with activations
of the same type (`--dtype`), and compress the matrices of the blocks. Both are measured by the same
perplexity on the same held-out windows; the peer's is also computed by torch in its own process, as
a check of ours. Seconds are those of the compressing call in a fresh process, and of the processor
in all of its threads, which a busy machine disturbs less. They include compilation, but neither
loading nor saving. Each setting runs `--rounds` times on either side in
turn.

PEER_VENV: pip install torch==2.13.0 llmcompressor. It cannot share our environment's transformers.

Both follow llm-compressor's protocol: the matrices of a block are observed together, on the outputs
of the compressed blocks before it (`sequential: blocks`).

Device: CPU. Minutes: 1 a setting and round for a model of 2 M parameters, 3 for one of 152 M.
Expected: perplexities within 0.5 % of the peer's or below. The goal is half of its time. GPTQ and
SparseGPT of SmolLM2-135M in float32 take 0.46 and 0.47 of the peer's seconds on two cores. The
share is larger for small models, whose time from a cold start is mostly compilation: with 14 M
parameters on one core, Wanda took 1.17 of the peer's.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from model import corpus, hf, safetensors_io
from model.compress import pipeline
from model.compress import recipe as recipe_module
from model.eval import perplexity, records, timing
from model.eval.records import Metric, Record
from model.tokenizer import window_bos
from model.transformer import parameters

TECHNIQUES = {'rtn': 'round_to_nearest', 'gptq': 'gptq', 'awq': 'awq'}
ASYMMETRIC = ('awq',)  # as its paper has it
GROUPS = {'_g128': 128, '_g64': 64, '': -1}  # inputs that share a scale; -1: all of a column


def _quantized(method: str, bits: int, group: int):
  symmetric = method not in ASYMMETRIC
  peer = {'method': method, 'bits': bits, 'group_size': group, 'symmetric': symmetric}
  ours = {'format': f'int{bits}', 'group_size': group, 'symmetric': symmetric}
  return peer, {TECHNIQUES[method]: ours}


# What the peer is asked for, and our step of the same.
SETTINGS = {
  f'{method}_w{bits}{suffix}': _quantized(method, bits, group)
  for method in TECHNIQUES
  for suffix, group in GROUPS.items()
  for bits in (4, 3)
} | {
  'sparsegpt_50': (
    {'method': 'sparsegpt', 'structure': '0:0'},
    {'sparsegpt': {'sparsity': 0.5}},
  ),
  'sparsegpt_2of4': ({'method': 'sparsegpt', 'structure': '2:4'}, {'sparsegpt': {'n': 2, 'm': 4}}),
  'wanda_50': ({'method': 'wanda', 'structure': '0:0'}, {'wanda': {'sparsity': 0.5}}),
  'wanda_2of4': ({'method': 'wanda', 'structure': '2:4'}, {'wanda': {'n': 2, 'm': 4}}),
}
PEER_SCRIPT = pathlib.Path(__file__).parent / 'peers' / 'llm_compressor.py'

MODEL = flags.DEFINE_string('model', None, 'Hugging Face folder to compress.')
TEXT = flags.DEFINE_string('text', None, "Text. Default: the source of Python's standard library.")
PEER = flags.DEFINE_string('peer', None, 'Python of the environment that has llm-compressor.')
NAMES = flags.DEFINE_list(
  'settings', None, f'Of {", ".join(SETTINGS)}. Default: all whose groups divide the widths.'
)
DTYPE = flags.DEFINE_enum(
  'dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the weights and activations of both sides.'
)
ROWS = flags.DEFINE_integer('calibration_rows', 128, 'Rows of calibration text.', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Which draw of calibration text.', lower_bound=0)
SEQ_LEN = flags.DEFINE_integer('seq_len', 128, 'Tokens a row and a window.', lower_bound=2)
WINDOWS = flags.DEFINE_integer('max_windows', 512, 'Held-out windows.', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 1, 'Times that both sides run.', lower_bound=1)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
CHILD = flags.DEFINE_string('child', None, 'Internal: the folder of a setting to run here.')


def main() -> None:
  if CHILD.value:
    _ours(pathlib.Path(CHILD.value))
    return
  for name in NAMES.value or ():
    if name not in SETTINGS:
      raise ValueError(f'--settings has {name!r}, which is not one of {", ".join(SETTINGS)}')
  for flag, holder in {'model': MODEL, 'peer': PEER}.items():
    if not holder.value:
      raise ValueError(f'--{flag} is needed')
  model, tokenizer = common.load_model(MODEL.value, jnp.float32)
  names = settings_that_fit(model, NAMES.value)
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    windows = _prepare(work, model, tokenizer)
    base = perplexity.evaluate(model, windows)
    for name in names:
      record = _compare(name, work, model, windows, base.ppl)
      print(_words(record), flush=True)
      if OUTPUT.value:
        records.append(OUTPUT.value, record)


def settings_that_fit(model, names: list[str] | None) -> list[str]:
  """The settings whose groups divide the widths of a model; None: of all, else of these.

  Raises ValueError if one of `names` does not fit.
  """
  fitting = []
  for name in names or SETTINGS:
    try:
      pipeline.check(model, _recipe(name), np.zeros((1, 2), np.int32))
    except ValueError:
      if names:
        raise
      continue
    fitting.append(name)
  return fitting


def _recipe(name: str) -> recipe_module.Recipe:
  return recipe_module.parse({'name': name, 'steps': [SETTINGS[name][1]], 'sequential': 'blocks'})


def _prepare(work, model, tokenizer) -> perplexity.Windows:
  """Writes the checkpoint in the asked type and the tokens for both sides."""
  for param in parameters(model).values():
    param.set_value(param.get_value().astype(DTYPE.value))
  hf.save_pretrained(model, tokenizer, work / 'model')
  texts, length = corpus.load(TEXT.value), SEQ_LEN.value
  bos_id = window_bos(tokenizer, model.config, 'auto')
  calibration_BT = common.calibration_rows(tokenizer, texts, length, ROWS.value, SEED.value, bos_id)
  held_out = ''.join(texts.held_out)[: 12 * WINDOWS.value * length]
  tokens_T, ends_T = tokenizer.encode_with_bytes(held_out)
  windows = perplexity.windows(tokens_T, ends_T, length, WINDOWS.value, bos_id)
  np.save(work / 'calibration.npy', calibration_BT)
  np.save(work / 'held_out.npy', windows.tokens_BT)
  return windows


def _compare(name, work, model, windows, base_ppl) -> Record:
  setting = {**SETTINGS[name][0], 'batch': pipeline.CALIBRATION_BATCH, 'dtype': DTYPE.value}
  ours = _recipe(name).to_dict()
  (work / 'settings.json').write_text(json.dumps(setting))
  (work / 'recipe.json').write_text(json.dumps(ours))
  own, peers = [], []
  for _ in range(ROUNDS.value):
    _call([sys.executable, '-m', 'experiments.compare_llm_compressor', f'--child={work}'])
    own.append(json.loads((work / 'ours.json').read_text()))
    _call([PEER.value, str(PEER_SCRIPT), str(work)])
    peers.append(json.loads((work / 'peer.json').read_text()))
  own_quality = perplexity.evaluate(hf.load_pretrained(work / 'ours')[0], windows)
  peers_quality = perplexity.evaluate(_peers_model(work, model.config), windows)
  ratio = perplexity.ratio(own_quality, peers_quality)
  n = windows.tokens_BT[:, 1:].size
  return Record(
    experiment='compare_llm_compressor',
    recipe=name,
    command=common.command(),
    config={
      'setting': setting,
      'ours': ours,
      'model': {
        'width': model.config.width,
        'blocks': len(model.layers),
        'parameters': sum(p.get_value().size for p in parameters(model).values()),
      },
      'calibration_rows': len(np.load(work / 'calibration.npy')),
      'seq_len': SEQ_LEN.value,
      'bos': windows.bos,
    },
    environment=records.environment(),
    seed=SEED.value,
    metrics={
      'base_ppl': Metric(base_ppl, '1', n),
      'ppl': Metric(own_quality.ppl, '1', n),
      'peer_ppl': Metric(peers_quality.ppl, '1', n),
      'peer_ppl_by_torch': Metric(peers[-1]['torch_ppl'], '1', n),
      'ppl / peer': Metric(ratio.value, '1', n),
      'ppl / peer, standard error': Metric(ratio.standard_error, '1', len(windows.tokens_BT)),
      **_times('seconds', own, peers),
      **_times('processor_seconds', own, peers),
    },
  )


def _times(name, own, peers) -> dict[str, Metric]:
  """One of the times of all rounds: ours, the peer's, and their ratio."""
  ours, theirs = ([run[name] for run in runs] for runs in (own, peers))
  return {
    name: timing.summarize(ours, 's'),
    f'peer_{name}': timing.summarize(theirs, 's'),
    f'{name} / peer': timing.summarize(np.divide(ours, theirs), '1'),
  }


def _call(command):
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise ValueError(f'{command[0]} failed: {done.stderr.strip()[-1500:]}')


def _ours(work: pathlib.Path) -> None:
  """Runs one setting in this process, and writes what the peer writes."""
  dtype = json.loads((work / 'settings.json').read_text())['dtype']
  model, _ = hf.load_pretrained(work / 'model', dtype=jnp.dtype(dtype))
  calibration_BT = np.load(work / 'calibration.npy')
  one = recipe_module.parse(json.loads((work / 'recipe.json').read_text()))
  start, processor_start = time.perf_counter(), time.process_time()
  model, _ = pipeline.compress(model, one, calibration_BT)
  jax.block_until_ready([p.get_value() for p in parameters(model).values()])
  times = {
    'seconds': time.perf_counter() - start,
    'processor_seconds': time.process_time() - processor_start,
  }
  hf.save_pretrained(model, None, work / 'ours', recipe=one.to_dict())
  (work / 'ours.json').write_text(json.dumps(times))


def _peers_model(work: pathlib.Path, config):
  """The checkpoint with the matrices that the peer wrote."""
  tensors = safetensors_io.read_folder(work / 'model')
  return hf.load_tensors(
    config, tensors | safetensors_io.read_file(work / 'peer.safetensors'), jnp.float32
  )


def _words(record: Record) -> str:
  m = {name: metric.value for name, metric in record.metrics.items()}
  quality = f'perplexity {m["ppl"]:.4f}, llm-compressor {m["peer_ppl"]:.4f}'
  checks = f'torch: {m["peer_ppl_by_torch"]:.4f}, base: {m["base_ppl"]:.4f}'
  time_s = f'{m["seconds"]:.1f} s against {m["peer_seconds"]:.1f} s'
  return (
    f'{record.recipe}: {quality} ({checks}), ratio {m["ppl / peer"]:.4f}; {time_s}, '
    f'ratio {m["seconds / peer"]:.2f}; of the processor {m["processor_seconds"]:.1f} s against '
    f'{m["peer_processor_seconds"]:.1f} s, ratio {m["processor_seconds / peer"]:.2f}'
  )


if __name__ == '__main__':
  common.run(main)
