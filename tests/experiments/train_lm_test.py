"""train_lm: a smoke run gives a checkpoint that evaluates to its record."""

import json
import math

import numpy as np
import pytest

from model import corpus, hf
from model.eval import perplexity, records


def test_smoke(script, tmp_path, capsys):
  out = tmp_path / 'lm'
  script('--smoke', f'--out={out}', '--steps=12')
  model, tokenizer = hf.load_pretrained(out / 'model')
  (record,) = records.read(out / 'records.jsonl')
  assert model.config.vocab_size == tokenizer.vocab_size == 512
  log = out / 'run' / 'loss.jsonl'
  losses = [json.loads(line)['loss'] for line in log.read_text().splitlines()]
  assert len(losses) == 12
  assert record.value('train_loss') == losses[-1]
  assert losses[0] == pytest.approx(math.log(512), abs=0.2)  # at first every token is as likely
  assert record.value('ppl') < 500
  assert f'perplexity {record.value("ppl"):.2f}' in capsys.readouterr().out
  texts = corpus.load()
  sample = script.module.excerpts(texts.held_out, 128 * 64 * 6)
  windows = perplexity.windows(*tokenizer.encode_with_bytes('\n'.join(sample)), 64, 128)
  assert perplexity.evaluate(model, windows).ppl == pytest.approx(record.value('ppl'), rel=1e-6)


@pytest.mark.slow
def test_experts_are_trained_saved_and_counted(script, tmp_path):
  out = tmp_path / 'lm'
  flags = ('--experts=4', '--experts_per_token=2', '--shared_experts=1', '--layers=1')
  script('--smoke', f'--out={out}', '--steps=12', '--ffn_width=32', *flags)
  model, _ = hf.load_pretrained(out / 'model')
  ffn = model.config.layers[0].ffn
  assert (ffn.experts, ffn.router.choices, ffn.shared_width) == (4, 2, 32)
  (record,) = records.read(out / 'records.jsonl')
  assert record.value('parameters') - record.value('active_parameters') == 2 * 3 * 128 * 32
  lines = [json.loads(line) for line in (out / 'run' / 'loss.jsonl').read_text().splitlines()]
  assert lines[-1]['cross_entropy'] < lines[0]['cross_entropy'] - 0.3
  assert lines[0]['cross_entropy'] == pytest.approx(math.log(512), abs=0.2)
  extra = 0.01 * lines[0]['balance_loss'] + 0.001 * lines[0]['z_loss']  # of the one layer
  assert lines[0]['loss'] - lines[0]['cross_entropy'] == pytest.approx(extra, rel=1e-3)
  (used,) = lines[-1]['experts'].values()
  assert len(used['load']) == 4 and sum(used['load']) == pytest.approx(1, rel=1e-5)
  assert record.value('max_violation') == pytest.approx(4 * max(used['load']) - 1, rel=1e-4)
  for name in ('loss.png', 'experts.png'):
    assert (out / name).read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_model_of_recurrent_layers_and_attention_is_trained_and_saved(script, tmp_path):
  out = tmp_path / 'lm'
  flags = ('--mixer=retnet', '--attention_every=2', '--ffn_width=32')
  script('--smoke', f'--out={out}', '--steps=12', *flags)
  model, _ = hf.load_pretrained(out / 'model')
  retnet, attention = (layer.mixer for layer in model.config.layers)
  assert (retnet.decay, retnet.heads, attention.query_heads) == ('constant', 2, 2)
  decay_N = np.exp(model.layers[0].attention.decays.log_decay.get_value())
  np.testing.assert_allclose(decay_N, [1 - 1 / 32, 1 - 1 / 64], rtol=1e-6)  # is not trained
  lines = [json.loads(line) for line in (out / 'run' / 'loss.jsonl').read_text().splitlines()]
  assert lines[-1]['loss'] < lines[0]['loss'] - 0.3
  (record,) = records.read(out / 'records.jsonl')
  assert (record.config['mixer'], record.config['attention_every']) == ('retnet', 2)


@pytest.mark.slow
@pytest.mark.parametrize('mixer', ['linear', 'gla', 'gated_delta', 'moba8x2', 'linformer'])
def test_other_mixers_learn_too(script, tmp_path, mixer):
  script('--smoke', f'--out={tmp_path / "lm"}', '--steps=12', f'--mixer={mixer}')
  (record,) = records.read(tmp_path / 'lm' / 'records.jsonl')
  assert record.value('ppl') < 500
  assert record.config['documents_joined'] == (mixer == 'linformer')


@pytest.mark.slow
def test_experts_on_several_devices_with_a_capacity_and_biases(script, tmp_path):
  out = tmp_path / 'lm'
  flags = ('--experts=4', '--layers=1', '--balancing=bias', '--balancing_rate=0.01')
  parallel = ('--mesh_expert=2', '--expert_dispatch=all_to_all', '--capacity_factor=0.5')
  script('--smoke', f'--out={out}', '--steps=6', '--ffn_width=32', *flags, *parallel)
  model, _ = hf.load_pretrained(out / 'model')
  bias_E = model.layers[0].ffn.choice_bias.get_value()
  # Each of six updates moves each of four by 0.01, or not, before their mean is taken away.
  assert 0 < abs(bias_E).max() <= 0.12 and abs(bias_E.sum()) < 1e-6
  (record,) = records.read(out / 'records.jsonl')
  assert record.value('dropped') >= 0.5
  assert record.config['balancing'] == {'balance': 0.0, 'z': 0.001, 'bias_rate': 0.01}


@pytest.mark.slow
def test_rows_on_several_devices_are_learned_as_on_one(script, tmp_path):
  losses = []
  for ways in (1, 4):
    out = tmp_path / f'lm{ways}'
    script('--smoke', f'--out={out}', '--steps=6', '--layers=1', f'--mesh_context={ways}')
    log = (out / 'run' / 'loss.jsonl').read_text()
    losses.append([json.loads(line)['loss'] for line in log.splitlines()])
  assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--experts=2', '--experts_per_token=3'], 'cannot choose 3 experts of 2'),
    (['--experts=4', '--mesh_expert=3'], 'the 4 experts of layer 0 do not divide among 3'),
    (['--experts=4', '--capacity_factor=-1'], 'capacity_factor must be above 0, not -1'),
    (['--attention_every=2'], 'choose another mixer: linear, retnet, gla, gated_delta'),
    (['--mixer=gla', '--attention_every=1'], 'attention_every = 1 leaves no layer for gla'),
    (['--mixer=window0'], "there is no mixer 'window0': it is none of linear"),
    (['--mesh_context=3'], '64 tokens of a row do not divide among 3 devices'),
    (['--mesh_context=2', '--context_strategy=halo'], 'not all keys before a query'),
    (['--text=none'], 'no such file'),
    (['--query_heads=3', '--kv_heads=2'], '3 query heads do not divide'),
    (['--steps=0'], '--steps must be above 0'),
    (['--tokenizer=.'], 'has neither'),
  ],
)
def test_bad_input_is_refused(script, tmp_path, monkeypatch, arguments, message):
  monkeypatch.setattr(script.module.training.loop, 'fit', None)
  with pytest.raises(ValueError, match=message):
    script('--smoke', f'--out={tmp_path / "out"}', *arguments)
  assert not (tmp_path / 'out').exists()


def test_an_output_that_holds_something_else_is_refused_before_training(
  script, tmp_path, monkeypatch
):
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model' / 'thesis.tex').write_text('mine')
  monkeypatch.setattr(script.module.training.loop, 'fit', None)
  with pytest.raises(ValueError, match='holds something else'):
    script('--smoke', f'--out={tmp_path}')


def test_held_out_text_shorter_than_a_window_is_refused_before_training(
  script, tmp_path, monkeypatch
):
  (tmp_path / 'text.txt').write_text(''.join(f'Line {i} of a few words.\n' for i in range(30)))
  monkeypatch.setattr(script.module.training.loop, 'fit', None)
  with pytest.raises(ValueError, match='fewer than one window'):
    script('--smoke', f'--out={tmp_path / "out"}', f'--text={tmp_path / "text.txt"}')
