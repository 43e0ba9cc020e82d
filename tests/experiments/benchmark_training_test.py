"""Tests benchmark_training: its records, the same losses on both sides, and wrong flags."""

import dataclasses
import importlib
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import children, training_updates
from experiments.methods import METHODS, Options, prepare, prepare_random
from experiments.training_updates import Job
from model import presets
from model.eval import records
from model.hf_names import config_to_hf
from model.train import bench
from model.transformer import Transformer, linears, parameters
from ops.linear import innermost
from ops.quantized import QuantizedTensor

SAME_LOSS = 2e-5  # relative; float32 sums in another order
SAME_COURSE = 1e-3  # relative, after some updates of Adam, which magnifies small gradients
JOB = Job(
  method='lora',
  preset='tiny-llama',
  model=None,
  dtype='float32',
  param_dtype='float32',
  batch_size=2,
  seq_len=24,
  documents=1,
  updates=2,
  optimizer='adamw',
  learning_rate=1e-3,
  weight_decay=0.1,
  remat='none',
  stacked=False,
  loss_chunk=1024,
  rank=4,
  alpha=32.0,
)


@pytest.mark.slow
def test_the_records_of_a_run_with_a_peer(script, tmp_path, capsys):
  out = tmp_path / 'training.jsonl'
  flags = ['--methods=lora,qlora', '--stacked', '--peak_tflops=1', f'--output={out}']
  script('--smoke', *flags, f'--peer={sys.executable}')
  rows = records.read(out)
  assert [row.recipe for row in rows][:2] == ['lora', 'torch eager, lora']
  lora, torch, qlora = rows[:3]
  assert qlora.recipe == 'qlora' and qlora.value('frozen_bytes') < lora.value('frozen_bytes')
  for row in rows:
    assert row.value('last_loss') < row.value('first_loss')
    speed = row.metrics['tokens_per_s']
    assert speed.n == 5 and speed.value == pytest.approx(64 / row.value('update_time'))
    used = row.value('flops_per_token') * speed.value / 1e12
    assert row.value('model_flops_utilization') == pytest.approx(used)
  # Two blocks of four projections and three feed-forward matrices, with A and B of rank 4.
  adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 152))
  assert lora.value('trained_parameters') == torch.value('trained_parameters') == adapters
  assert lora.value('state_bytes') == 3 * 4 * adapters + 3 * 4  # and counters of the updates
  assert lora.metrics['tokens_per_s / best of torch'] == lora.metrics['tokens_per_s / torch eager']
  assert 'of the peak' in capsys.readouterr().out


@pytest.fixture
def torch_training():
  return importlib.import_module('experiments.peers.torch_training')


@pytest.fixture
def answers(monkeypatch, capsys):
  """A function (side, job, rounds) -> what a side answers, run in this process."""

  def ask(side, job: dict, rounds: int):
    lines = ''.join([json.dumps(job) + '\n', *['eager\n'] * rounds])
    monkeypatch.setattr(sys, 'stdin', io.StringIO(lines))
    side.main()
    return [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith('{')]

  return ask


# peft reads an attribute of transformers that is about to be renamed.
@pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')
@pytest.mark.slow
@pytest.mark.parametrize('method', ['full', 'lora'])
def test_both_sides_compute_the_same_losses(base, torch_training, answers, method):
  """From equal weights. Adapters start at zero in B, so that the first loss is that of the base."""
  job = dataclasses.asdict(dataclasses.replace(JOB, method=method, model=str(base)))
  ours, *our_rounds = answers(training_updates, job, 2)
  theirs, *their_rounds = answers(torch_training, job | {'modes': ['eager']}, 2)
  first = theirs['modes']['eager']['loss']
  assert ours['loss'] == pytest.approx(first, rel=SAME_LOSS)
  assert ours['trained_parameters'] == theirs['trained_parameters']
  for a, b in zip(our_rounds, their_rounds, strict=True):
    assert a['loss'] < ours['loss'] and b['loss'] < first
    if method == 'full':  # the adapters of the two sides start with other random numbers
      assert a['loss'] == pytest.approx(b['loss'], rel=SAME_COURSE)


def test_a_peer_without_a_method_says_why(torch_training, answers):
  job = dataclasses.asdict(dataclasses.replace(JOB, method='qat'))
  more = {'hf_config': config_to_hf(presets.preset('tiny-llama')), 'modes': ['eager']}
  (found,) = answers(torch_training, job | more, 0)
  assert 'qat has no counterpart' in found['unavailable']


@pytest.mark.parametrize('method', ['full', 'lora', 'dora', 'qlora', 'qat'])
@pytest.mark.quick(method=('full', 'qlora'))
def test_a_random_model_is_that_of_its_preset(method):
  """Made block by block, it has the arrays of one that was made whole."""
  config, options = presets.preset('tiny-llama'), Options(rank=4)
  ready = prepare_random(config, METHODS[method], options, dtype=jnp.bfloat16, seed=0)
  base = Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  whole = prepare(base, METHODS[method], options, 0)
  describe = lambda model: {
    path: jax.tree.map(lambda a: (a.shape, a.dtype), param.get_value())
    for path, param in parameters(model).items()
  }
  assert describe(ready.model) == describe(whole.model)
  assert ready.model.config == config
  assert ready.task.selection == whole.task.selection
  first, second = (linears(ready.model)[f'layers.{l}.ffn.up'].weight.get_value() for l in (0, 1))
  assert not np.array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(second)[0])
  if method == 'qlora':
    assert isinstance(innermost(first), QuantizedTensor)


@pytest.mark.slow
def test_a_stacked_job_computes_the_same_updates():
  """Its model is stacked before the step; losses and what is trained do not change."""
  found = []
  for job in (JOB, dataclasses.replace(JOB, stacked=True, remat='block')):
    updates, flops = training_updates.start(job)
    losses = [float(updates.run(1)['loss']) for _ in range(3)]
    found.append((losses, flops, updates.trained_parameters, updates.plan.trained))
  (a, *rest), (b, *other) = found
  np.testing.assert_allclose(a, b, rtol=1e-5)
  assert rest == other and a[-1] < a[0]


def test_all_tokens_but_the_first_of_a_document_are_labels():
  batch = bench.random_batch(100, 3, 8, seed=1)
  np.testing.assert_array_equal(batch.labels_BT[:, :-1], batch.tokens_BT[:, 1:])
  assert (batch.labels_BT[:, -1] < 0).all() and batch.segments_BT is None
  packed = bench.random_batch(100, 3, 8, seed=1, documents=2)
  np.testing.assert_array_equal(packed.segments_BT[0], [1, 1, 1, 1, 2, 2, 2, 2])
  np.testing.assert_array_equal(packed.positions_BT[2], [0, 1, 2, 3, 0, 1, 2, 3])
  expected = np.where(np.arange(8) == 3, -1, batch.labels_BT)
  np.testing.assert_array_equal(packed.labels_BT, expected)
  with pytest.raises(ValueError, match='3 documents do not divide rows of 8 tokens'):
    bench.random_batch(100, 3, 8, documents=3)


@pytest.mark.slow
def test_documents_in_a_row_learn_as_rows_of_their_own():
  """Two documents a row, or twice the rows of one: the same tokens, and the same losses."""
  found = []
  for documents, rows, length in ((2, 2, 24), (1, 4, 12)):
    job = dataclasses.replace(JOB, documents=documents, batch_size=rows, seq_len=length)
    updates, _ = training_updates.start(job)
    found.append([float(updates.run(1)['loss']) for _ in range(3)])
  np.testing.assert_allclose(*found, rtol=1e-5)


BAD = {
  'an unknown method': (['--methods=lora,adalora'], "'adalora', which is not one of full"),
  'a start': (['--methods=pissa'], 'pissa, whose updates take as long'),
  'a mode': (['--peer_modes=fast'], "'fast', which is not one of eager"),
  'narrow weights in wide products': (['--param_dtype=bfloat16'], 'goes with --dtype=bfloat16'),
  'an optimizer': (['--optimizer=lion', '--peer=python'], 'the peer has no lion'),
  'documents': (['--documents=2', '--peer=python'], 'one document per row'),
  'a preset': (['--preset=smolm'], 'did you mean'),
  'layers': (['--preset=tiny-llama', '--layers=9'], '--layers=9, but tiny-llama has 2'),
}


@pytest.mark.parametrize('case', BAD)
def test_wrong_flags_are_refused(script, case):
  arguments, message = BAD[case]
  with pytest.raises(ValueError, match=message):
    script(*arguments)


def test_a_child_answers_line_by_line_and_its_failure_is_told():
  code = (
    'from experiments import children; job = children.read_job(); print("a greeting");'
    'children.serve({"n": job["n"]}, lambda line: {"half": job["n"] / int(line)})'
  )
  with children.start('one', [sys.executable, '-c', code], {'n': 8}) as (child, ready):
    assert ready == {'n': 8}
    assert [child.ask(line) for line in ('2', '4')] == [{'half': 4}, {'half': 2}]
    with pytest.raises(ValueError, match=r'(?s)one failed with status 1: .*ZeroDivisionError'):
      child.ask('0')
  missing = children.start('none', ['/no/such/program'], {})
  with pytest.raises(ValueError, match='none cannot be started'), missing:
    pass
