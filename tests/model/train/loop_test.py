"""Whole runs: they learn, and a killed one ends bit for bit like one that was not."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.train import loop
from model.train import optimizer as optimizer_lib
from model.train import step as step_lib
from model.train.data import PackedDataset
from model.train.loop import FitConfig
from model.train.optimizer import OptimizerConfig
from model.train.run_folder import RunFolder
from model.train.step import StepConfig, Task
from model.transformer import Transformer, parameters

VOCABULARY = 12
STEPS, CHECKPOINT_EVERY, KILLED_AT = 8, 3, 5


def _model(seed=0):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=2, head_width=8), ffn=FeedForwardConfig(width=32)
  )
  config = ModelConfig(
    family='llama', vocab_size=VOCABULARY, width=16, layers=(layer,), max_positions=64
  )
  return Transformer(config, rngs=nnx.Rngs(seed))


def _dataset(batch_size=4, seed=0):
  documents = [[(start + i) % 10 for i in range(30)] for start in range(10)]
  return PackedDataset.from_ids(documents, eos_id=11, seq_len=16, batch_size=batch_size, seed=seed)


def _config(steps=STEPS, rate=0.01, **step):
  optimizer = OptimizerConfig(steps=steps, learning_rate=rate, warmup_steps=2)
  return FitConfig(optimizer=optimizer, step=StepConfig(**step), checkpoint_every=CHECKPOINT_EVERY)


def _fit(folder=None, *, dataset=None, config=None, model=None):
  return loop.fit(
    model or _model(), dataset or _dataset(), config or _config(), folder=folder, progress=False
  )


class _Killed(Exception):
  pass


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _DyingDataset(PackedDataset):
  """Raises when it is asked for batch `at`."""

  at: int

  def batch(self, step):
    if step == self.at:
      raise _Killed
    return super().batch(step)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _CallingDataset(PackedDataset):
  """Calls a function with the step before each batch."""

  call: Callable[[int], object]

  def batch(self, step):
    self.call(step)
    return super().batch(step)


def _kill(folder, at=KILLED_AT):
  whole = _dataset()
  fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
  with pytest.raises(_Killed):
    _fit(folder, dataset=_DyingDataset(**fields, at=at))


@pytest.fixture(scope='module')
def whole_folder(tmp_path_factory):
  return tmp_path_factory.mktemp('whole')


@pytest.fixture(scope='module')
def whole(whole_folder):
  """A run that nothing interrupts."""
  return _fit(whole_folder)


def _weights(result):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.split(result.model)[1])]


def _same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_loss_falls_on_a_learnable_text_and_the_model_stays_as_it_was():
  model = _model()
  before = [np.asarray(x) for x in jax.tree.leaves(nnx.split(model)[1])]
  result = _fit(config=_config(steps=60, rate=0.03), model=model)
  losses = [record['loss'] for record in result.records]
  assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.1)
  assert losses[-1] < 0.3
  assert loop.mean_nll(result.model, _dataset()) < 0.3
  assert _same(before, [np.asarray(x) for x in jax.tree.leaves(nnx.split(model)[1])])


def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path, whole, whole_folder):
  _kill(tmp_path)
  half = (tmp_path / 'loss.jsonl').read_text().splitlines()
  assert CHECKPOINT_EVERY < len(half) < STEPS
  resumed = _fit(tmp_path)
  assert resumed.records == whole.records and len(whole.records) == STEPS
  assert _same(_weights(resumed), _weights(whole))
  files = [(folder / 'loss.jsonl').read_bytes() for folder in (tmp_path, whole_folder)]
  assert files[0] == files[1]


def test_saving_changes_nothing(whole):
  assert _same(_weights(_fit()), _weights(whole))


@pytest.mark.slow
def test_resuming_with_weights_alone_is_not_the_same(tmp_path, whole):
  _kill(tmp_path)
  config, dataset = _config(), _dataset()
  optimizer = optimizer_lib.make(config.optimizer)
  setup, fresh, frozen = step_lib.init(_model(), optimizer)
  with RunFolder(tmp_path, loop.identity(_model(), dataset, config, Task())) as run:
    saved, records = run.restore(fresh)
  assert int(saved.step) == len(records) == CHECKPOINT_EVERY
  step = step_lib.make_step(setup, saved)
  copies = {name: array.copy() for name, array in saved.trained.items()}
  weights_only = dataclasses.replace(fresh, trained=copies)
  assert not _same(_run_on(step, weights_only, frozen), _arrays(whole.model))
  assert _same(_run_on(step, saved, frozen), _arrays(whole.model))


def _run_on(step, state, frozen):
  for n in range(CHECKPOINT_EVERY, STEPS):
    state, _ = step(state, frozen, _dataset().batch(n))
  return [np.asarray(state.trained[name]) for name in sorted(state.trained)]


def _arrays(model):
  found = parameters(model)
  return [np.asarray(found[path].get_value()) for path in sorted(found)]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, whole):
  _kill(tmp_path, at=2)
  (tmp_path / 'loss.jsonl').write_text('{"step": 1, "lo')  # half a line
  assert _fit(tmp_path).records == whole.records


def test_a_finished_run_is_only_read(whole, whole_folder):
  again = _fit(whole_folder)
  assert again.records == whole.records and _same(_weights(again), _weights(whole))
  steps = sorted(int(p.name) for p in (whole_folder / 'checkpoints').iterdir() if p.name.isdigit())
  assert steps == [6, 8]


def test_records_say_what_happened(whole, whole_folder):
  lines = [json.loads(line) for line in (whole_folder / 'loss.jsonl').read_text().splitlines()]
  assert lines == list(whole.records)
  assert [record['step'] for record in lines] == list(range(1, STEPS + 1))
  for n, record in enumerate(lines):
    assert record['tokens'] == int((_dataset().batch(n).labels_BT >= 0).sum())
    rate = optimizer_lib.schedule(_config().optimizer)(n)
    assert record['learning_rate'] == pytest.approx(float(rate))


def test_held_out_text_is_measured_along_the_way_and_changes_nothing(whole, tmp_path):
  held_out = loop.HeldOut(dataset=_dataset(seed=5), every=CHECKPOINT_EVERY)
  fit = lambda folder: loop.fit(
    _model(), _dataset(), _config(), folder=folder, held_out=held_out, progress=False
  )
  result = fit(tmp_path / 'measured')
  assert _same(_weights(result), _weights(whole))
  found = {r['step']: r['held_out_loss'] for r in result.records if 'held_out_loss' in r}
  assert set(found) == {3, 6}
  _kill(tmp_path / 'killed')  # its last checkpoint is that after three updates
  setup, fresh, frozen = step_lib.init(_model(), optimizer_lib.make(_config().optimizer))
  identity = loop.identity(_model(), _dataset(), _config(), Task())
  with RunFolder(tmp_path / 'killed', identity) as run:
    saved, _ = run.restore(fresh)
  assert found[3] == loop.mean_nll(setup.model(saved.trained, frozen), held_out.dataset)
  assert fit(tmp_path / 'measured').records == result.records  # they are kept with the run
  with pytest.raises(ValueError, match='at least 1 update, not 0'):
    loop.HeldOut(dataset=held_out.dataset, every=0)


def test_mean_nll_is_the_mean_over_labels():
  model, dataset = _model(), _dataset(batch_size=5)
  run = jax.jit(lambda tokens_BT, **context: model(tokens_BT, **context))
  total, count = 0.0, 0
  for batch in dataset.sequential():
    logits = run(batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    for row, column in np.argwhere(batch.labels_BT >= 0):
      total -= log_p[row, column, batch.labels_BT[row, column]]
      count += 1
  assert count == 10 * 30  # every token but the first of each document, its end included
  assert loop.mean_nll(model, dataset) == pytest.approx(total / count, rel=1e-5)


def test_another_run_s_folder_is_refused_and_the_difference_named(whole, whole_folder):
  with pytest.raises(ValueError, match=r'optimizer\.learning_rate \(0\.01 there, 0\.02 here\)'):
    _fit(whole_folder, config=_config(rate=0.02))
  with pytest.raises(ValueError, match=r'differs in data'):
    _fit(whole_folder, dataset=_dataset(seed=1))
  with pytest.raises(ValueError, match=r'differs in starting weights \(\'\w{64}\' there'):
    _fit(whole_folder, model=_model(seed=1))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'VERSION', loop.VERSION + 1)
    with pytest.raises(ValueError, match=r'differs in version \(3 there, 4 here\)'):
      _fit(whole_folder)


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
  code = (
    'import sys\nfrom model.train.run_folder import RunFolder\n'
    'with RunFolder(sys.argv[1], {}):\n  print("held", flush=True)\n  sys.stdin.read()\n'
  )
  command = [sys.executable, '-c', code, tmp_path]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b'held\n'
    with pytest.raises(ValueError, match=f'{tmp_path} is in use by process {process.pid}'):
      _fit(tmp_path)
    process.kill()
  with RunFolder(tmp_path, {}):
    pass


def test_a_disk_without_room_for_three_checkpoints_is_found_before_training(tmp_path, monkeypatch):
  weights = sum(x.nbytes for x in _weights(_fit(config=_config(steps=3))))
  state = 3 * weights + 8  # with AdamW's two averages, and steps of the optimizer and the run
  usage = shutil.disk_usage(tmp_path)
  full = usage._replace(free=3 * state - 1)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: full)
  called = []
  fields = {f.name: getattr(_dataset(), f.name) for f in dataclasses.fields(PackedDataset)}
  dataset = _CallingDataset(**fields, call=called.append)
  with pytest.raises(ValueError, match=r'needs .* MB for checkpoints, but its disk has'):
    _fit(tmp_path, dataset=dataset)
  assert called == []


# What the storage library says when a disk fills up while it writes.
FULL = (
  'RESOURCE_EXHAUSTED: Error writing local file "/a/_sharding": Failed to write 5247 bytes to file '
  "22: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize('when', ['before', 'while'])
def test_a_disk_that_fills_up_is_an_error_that_names_the_run(tmp_path, monkeypatch, when):
  def fail(*_, **__):
    raise ValueError(FULL if when == 'while' else 'work was done')

  def fill(step):
    if step == 2:
      usage = shutil.disk_usage(tmp_path)
      monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=999))

  monkeypatch.setattr(ocp.CheckpointManager, 'save', fail)
  fields = {f.name: getattr(_dataset(), f.name) for f in dataclasses.fields(PackedDataset)}
  dataset = _CallingDataset(**fields, call=fill if when == 'before' else id)
  with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
    _fit(tmp_path, dataset=dataset)
  assert len((tmp_path / 'loss.jsonl').read_text().splitlines()) == CHECKPOINT_EVERY


def test_other_errors_of_a_checkpoint_stay_what_they_are(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise ValueError('wrong tree')

  monkeypatch.setattr(ocp.CheckpointManager, 'save', fail)
  with pytest.raises(ValueError, match='wrong tree'):
    _fit(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('precious')
  with pytest.raises(ValueError, match='not a training run'):
    _fit(tmp_path)


def test_a_diverging_run_stops_and_keeps_its_last_good_state(tmp_path):
  config = _config(rate=1e30)
  with pytest.raises(FloatingPointError, match='lower learning rate'):
    _fit(tmp_path, config=config)
  assert not [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]


@pytest.mark.parametrize(
  'make, match',
  [
    (lambda: _fit(config=_config(accumulation=3)), 'batch of 4 rows does not divide into 3'),
    (
      lambda: _fit(dataset=PackedDataset.from_ids([[40]], eos_id=11, seq_len=4, batch_size=1)),
      'ids up to 40, but the model has a vocabulary of 12',
    ),
    (
      lambda: FitConfig(optimizer=OptimizerConfig(steps=1, learning_rate=1.0), checkpoint_every=0),
      'checkpoint_every must be at least 1',
    ),
  ],
)
def test_bad_settings_are_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
