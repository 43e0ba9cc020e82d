"""Fine-tuning as a user runs it: what each method leaves, and what it refuses."""

import json
import shutil

import numpy as np
import pytest

from experiments import base as embedded
from experiments import common, methods
from model import adapters, hf, peft
from model.compress import pipeline, recipe
from model.eval import records
from model.train import loop
from model.transformer import matrices
from ops import quantized
from ops.linear import dense

ADAPTERS = ['lora', 'dora', 'pissa', 'qlora']
SLOW = ('dora', 'pissa', 'qlora')  # a run each; tests/model/adapters_test.py is about them
MORE = {
  'qat': ['--group_size=16'],
  'dora': ['--optimizer=adam8bit'],
  'lora': ['--b_rate=4', '--evaluate_every=3'],
}
MERGED = 1e-4  # nats; the product is added up in another order


def _run(script, out, method, *more):
  rate = [] if method in ADAPTERS else ['--learning_rate=3e-3']
  script('--smoke', f'--out={out}', f'--method={method}', '--rank=4', *rate, *more)
  (record,) = records.read(out / 'records.jsonl')
  return record


@pytest.mark.parametrize(
  'method',
  [
    *(pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in ADAPTERS),
    pytest.param('full', marks=pytest.mark.slow),
    pytest.param('qat', marks=pytest.mark.slow),
  ],
)
def test_each_method_learns_and_leaves_its_folders(script, tmp_path, capsys, method):
  record = _run(script, tmp_path, method, *MORE.get(method, []))
  assert record.recipe == method
  assert record.value('held_out_loss_unmerged') < record.value('held_out_loss_before')
  log = (tmp_path / 'run' / 'loss.jsonl').read_text().splitlines()
  assert record.value('train_loss') == json.loads(log[-1])['loss'] and len(log) == 6
  assert (tmp_path / 'loss.png').stat().st_size > 5000
  model, tokenizer = hf.load_pretrained(tmp_path / 'model')
  assert tokenizer.vocab_size == model.config.vocab_size
  assert (
    f'perplexity {np.exp(record.value("held_out_loss_unmerged")):.3f}' in capsys.readouterr().out
  )
  if method == 'qat':
    assert record.value('held_out_loss_stored') == record.value('held_out_loss_unmerged')
    found = [w for layer, w in matrices(model).items() if layer.startswith('layers.')]
    assert all(isinstance(w, quantized.QuantizedTensor) and w.format == 'int4' for w in found)
  if method in ADAPTERS:
    merged, unmerged = (record.value(f'held_out_loss_{k}') for k in ('merged', 'unmerged'))
    assert merged == pytest.approx(unmerged, abs=MERGED)
    _check_adapter(tmp_path, model, method)
  if method == 'lora':
    curve = [record.value(f'held_out_loss_{name}') for name in ('before', 'after_3', 'after_6')]
    assert curve == sorted(curve, reverse=True) and curve[2] == record.value(
      'held_out_loss_unmerged'
    )
  if method == 'qlora':
    assert record.value('held_out_loss_requantized') != record.value('held_out_loss_merged')
    assert record.value('stored_bytes') < 0.8 * _base_bytes()


def _base():
  return embedded.load_or_train(common.cache_folder(), smoke=True).model


def _base_bytes():
  return sum(w.nbytes for w in matrices(_base()).values())


def _check_adapter(out, model, method):
  """The adapter folder over its base is the merged model; of QLoRA the base is the rounded one."""
  base = _base()
  if method == 'qlora':
    base, _ = pipeline.compress(base, recipe.parse(methods.NF4))
  tuned, config = peft.load(out / 'adapter', base)
  assert config.dora == (method == 'dora')
  for layer, w in matrices(adapters.merge(tuned)).items():
    np.testing.assert_allclose(dense(w), dense(matrices(model)[layer]), atol=2e-5)


def _chat(i):
  words = ' '.join(f'word{(i * k) % 17}' for k in range(1, 6))
  turns = [{'role': 'user', 'content': words}, {'role': 'assistant', 'content': words[::-1]}]
  return json.dumps({'messages': turns})


@pytest.fixture
def chat_model(base, tmp_path):
  """The tiny base model with a chat template."""
  folder = tmp_path / 'chat'
  shutil.copytree(base, folder)
  path = folder / 'tokenizer_config.json'
  settings = json.loads(path.read_text()) if path.exists() else {}
  template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
  prompt = '{% if add_generation_prompt %}[assistant]{% endif %}'
  path.write_text(json.dumps({**settings, 'chat_template': template + prompt}))
  return folder


@pytest.mark.slow
def test_chats_are_learned_by_the_tokens_of_the_assistant(script, chat_model, tmp_path, capsys):
  data = tmp_path / 'chats.jsonl'
  data.write_text('\n'.join(_chat(i) for i in range(40)))
  chat = [f'--model={chat_model}', f'--data={data}', '--seq_len=128']
  record = _run(script, tmp_path / 'out', 'full', *chat)
  assert record.value('held_out_loss_unmerged') < record.value('held_out_loss_before')
  said = capsys.readouterr().out
  assert 'chats of' in said and "of them the assistant's" in said
  half = record.value('train_tokens') / (6 * 4 * 128)
  assert 0.05 < half < 0.7  # of the tokens of a row
  data.write_text(_chat(0) + '\n' + json.dumps({'messages': [{'role': 'user', 'content': 'a'}]}))
  with pytest.raises(ValueError, match=r'line 2.*assistant'):
    _run(script, tmp_path / 'more', 'full', *chat)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--data=none'], 'no such file'),
    (['--steps=0'], '--steps must be above 0'),
    (['--targets=layers.9.*'], r"no layer matches 'layers\.9\.\*'"),
    (['--method=full', '--b_rate=16'], '--b_rate is for adapters'),
    (['--rank=4096'], 'a rank lies between 1 and'),
    (['--method=qat', '--group_size=48'], 'a group size of 48 does not divide'),
    (['--method=qat', '--format=int5'], "'int5' is not one of"),
  ],
)
def test_bad_input_is_refused_before_any_work(script, tmp_path, monkeypatch, arguments, message):
  _base()
  monkeypatch.setattr(loop, 'fit', None)
  with pytest.raises(ValueError, match=message):
    script('--smoke', f'--out={tmp_path / "out"}', *arguments)
  assert not (tmp_path / 'out').exists()


def test_an_output_that_holds_something_else_is_refused(script, tmp_path, monkeypatch):
  (tmp_path / 'adapter').mkdir()
  (tmp_path / 'adapter' / 'thesis.tex').write_text('mine')
  monkeypatch.setattr(loop, 'fit', None)
  with pytest.raises(ValueError, match='holds something else'):
    script('--smoke', f'--out={tmp_path}')
