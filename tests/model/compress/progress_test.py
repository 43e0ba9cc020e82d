"""Tests that an interrupted compression resumes and has the same result."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from model import native
from model.compress import pipeline, recipe

STEPS = [{'cast': {}}, {'wanda': {'sparsity': 0.5}}, {'round_to_nearest': {'format': 'int4'}}]
RECIPE = recipe.parse({'name': 'x', 'steps': STEPS, 'head': True})


class Killed(Exception):
  """Simulates a kill."""


def _stopping_after(count):
  def progress(parts):
    for i, part in enumerate(parts):
      if i == count:
        raise Killed
      yield part

  return progress


def _bytes(model):
  arrays, layout = native.flatten(model)
  return layout, {name: np.asarray(a).tobytes() for name, a in arrays.items()}


def _rows(ledger):
  return ledger.to_rows(), ledger.layers


@pytest.fixture(scope='module')
def tokens_BT():
  return np.random.default_rng(0).integers(0, 60, (6, 10), np.int32)


@pytest.fixture(scope='module')
def whole(tiny, tokens_BT):
  model, ledger = pipeline.compress(tiny(layers=3), RECIPE, tokens_BT)
  return _bytes(model), _rows(ledger)


@pytest.mark.parametrize('count', range(6))
@pytest.mark.quick(count=(0, 2, 4))
def test_a_stopped_compression_resumes_with_the_same_result(
  tiny, tokens_BT, tmp_path, whole, count
):
  folder, done = tmp_path / 'progress', []
  with pytest.raises(Killed):
    pipeline.compress(
      tiny(layers=3), RECIPE, tokens_BT, resume=folder, progress=_stopping_after(count)
    )
  kept = len(list(folder.glob('block_*.safetensors')))
  assert kept == min(max(count - 1, 0), 3)  # the embedding comes before the blocks
  model, ledger = pipeline.compress(
    tiny(layers=3),
    RECIPE,
    tokens_BT,
    resume=folder,
    progress=lambda parts: done.extend(parts) or parts,
  )
  assert (_bytes(model), _rows(ledger)) == whole
  assert not folder.exists()


def test_a_compression_stopped_repeatedly_has_the_same_result(tiny, tokens_BT, tmp_path, whole):
  folder = tmp_path / 'progress'
  for count in (2, 2, 3, 4, 1):
    with pytest.raises(Killed):
      pipeline.compress(
        tiny(layers=3), RECIPE, tokens_BT, resume=folder, progress=_stopping_after(count)
      )
  model, ledger = pipeline.compress(tiny(layers=3), RECIPE, tokens_BT, resume=folder)
  assert (_bytes(model), _rows(ledger)) == whole


def test_finished_blocks_are_not_compressed_again(tiny, tokens_BT, tmp_path, monkeypatch):
  folder, observed = tmp_path / 'progress', []
  with pytest.raises(Killed):
    pipeline.compress(tiny(layers=3), RECIPE, tokens_BT, resume=folder, progress=_stopping_after(3))
  real = pipeline.calibrate.Stream.observe

  def observe(self, block, names, where='', layers=None):
    observed.append(where)
    return real(self, block, names, where, layers)

  monkeypatch.setattr(pipeline.calibrate.Stream, 'observe', observe)
  pipeline.compress(tiny(layers=3), RECIPE, tokens_BT, resume=folder)
  assert set(observed) == {'layers.2', 'head'}  # what lies outside the blocks is done again


CHANGES = {
  'recipe': lambda recipe_, model, tokens: (
    recipe.parse({'name': 'x', 'steps': STEPS[:2]}),
    model,
    tokens,
  ),
  'text': lambda recipe_, model, tokens: (recipe_, model, tokens[::-1].copy()),
}


@pytest.mark.parametrize('change', [*CHANGES, 'model'])
def test_the_progress_of_another_compression_is_refused(tiny, tokens_BT, tmp_path, change):
  folder, model = tmp_path / 'progress', tiny(layers=3)
  with pytest.raises(Killed):
    pipeline.compress(model, RECIPE, tokens_BT, resume=folder, progress=_stopping_after(3))
  if change == 'model':
    scale = model.final_norm.scale
    scale.set_value(2 * scale.get_value())
    arguments = RECIPE, model, tokens_BT
  else:
    arguments = CHANGES[change](RECIPE, model, tokens_BT)
  with pytest.raises(ValueError, match='does not hold the progress of this recipe'):
    pipeline.compress(arguments[1], arguments[0], arguments[2], resume=folder)


def test_a_folder_of_other_files_is_refused(tiny, tokens_BT, tmp_path):
  (tmp_path / 'thesis.tex').write_text('chapter 1')
  with pytest.raises(ValueError, match='does not hold the progress'):
    pipeline.compress(tiny(), RECIPE, tokens_BT, resume=tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


SCRIPT = """
  import pathlib, sys
  import numpy as np
  from flax import nnx
  from model import hf, presets
  from model.compress import pipeline, recipe
  from model.transformer import Transformer

  folder = pathlib.Path(sys.argv[1])
  config = presets.preset('tiny-llama')
  model = Transformer(config, rngs=nnx.Rngs(0))
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (4, 16)).astype(np.int32)
  one = recipe.parse({'name': 'x', 'steps': [{'wanda': {}}, {'round_to_nearest': {}}]})

  def progress(parts):
    for i, part in enumerate(parts):
      print(i, flush=True)
      yield part

  model, _ = pipeline.compress(model, one, tokens_BT, resume=folder / 'progress', progress=progress)
  hf.save_pretrained(model, None, folder / 'model', recipe=one.to_dict())
"""


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_file(tmp_path):
  def run(folder, kill_at=None):
    command = [sys.executable, '-c', textwrap.dedent(SCRIPT), str(folder)]
    root = pathlib.Path(__file__).parents[3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
      for line in process.stdout:
        if int(line) == kill_at:
          os.kill(process.pid, signal.SIGKILL)
    return process.returncode

  for name in ('whole', 'killed'):
    (tmp_path / name).mkdir()
  assert run(tmp_path / 'whole') == 0
  # The embedding is part 0, so the first block is finished and the second has started.
  assert run(tmp_path / 'killed', kill_at=2) == -signal.SIGKILL
  assert not (tmp_path / 'killed' / 'model').exists()
  assert run(tmp_path / 'killed') == 0
  files = [(tmp_path / name / 'model' / 'model.safetensors') for name in ('whole', 'killed')]
  assert files[0].read_bytes() == files[1].read_bytes()


def test_in_place_gives_the_same_result_and_changes_the_model(tiny, tokens_BT, whole):
  model = tiny(layers=3)
  same, ledger = pipeline.compress(model, RECIPE, tokens_BT, in_place=True)
  assert same is model
  assert (_bytes(model), _rows(ledger)) == whole
  assert jax.tree.leaves(model)
