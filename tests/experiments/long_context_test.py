"""The script that measures long texts, run once on a tiny model, and its wrong flags."""

import json
import sys

import numpy as np
import pytest

from experiments import long_quality
from model import corpus, hf, units
from model.eval import positions, records
from model.transformer import parameters
from ops import patterns


@pytest.mark.slow
def test_a_smoke_run_measures_every_case(script, tmp_path):
  output, figure = tmp_path / 'long.jsonl', tmp_path / 'long.png'
  line = {'peer': 'other', 'weights': 'f16', 'kv_cache': 'f16'}
  line |= {'prefill_tokens_per_s': 1000, 'decode_tokens_per_s': 2}
  peer = tmp_path / 'peer.py'
  peer.write_text(f'import sys\nprint({json.dumps(line)!r} * (sys.argv[1] == "--prompt=64"))\n')
  peer.write_text(peer.read_text() + f'print({json.dumps(line | {"weights": "q8_0"})!r})\n')
  peers = (f'--peer={sys.executable} {peer}',)
  script('--smoke', f'--output={output}', f'--figure={figure}', *peers)
  every = records.read(output)
  others = [row for row in every if row.experiment == 'long_context peer']
  names = [(row.config['context'], row.recipe) for row in others]
  assert names == [(32, 'other q8_0'), (64, 'other f16'), (64, 'other q8_0')]
  assert others[0].metrics['prefill_tokens_per_s'].n == 5
  rows = {(row.config['context'], row.recipe): row for row in every if row not in others}
  assert len(rows) == 8 and figure.stat().st_size > 1000
  held = lambda context, recipe: rows[context, recipe].value('cache_bytes')
  assert held(64, 'dense, float') > 1.5 * held(32, 'dense, float')
  assert held(64, 'window8, float') == held(32, 'window8, float') < held(32, 'dense, float')
  assert held(64, 'dense, int8') < held(64, 'dense, float') / 3
  assert all(row.value('decode_tokens_per_s') > 0 for row in rows.values())


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--mixers=window0', "--mixers: 'window0' is no sparse pattern; there are window512"),
    ('--contexts=1k', '--contexts must be integers, not 1k'),
    ('--kv_caches=int3', "'int3' is not a cache format"),
    ('--text=python-docs', '--text needs a --model; random weights predict nothing'),
    ('--nocosts', '--nocosts without --text measures nothing'),
  ],
)
def test_wrong_flags_are_one_line(script, flag, message):
  with pytest.raises(ValueError, match=message):
    script(flag)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text('\n\n'.join(f'def add_{i}(a, b):\n  return a + b + {i}\n' for i in range(900)))
  return path


@pytest.mark.slow
def test_the_quality_of_a_model_is_that_of_its_mixers(script, base, text, tmp_path):
  output, figure = tmp_path / 'long.jsonl', tmp_path / 'long.png'
  script(
    *(f'--model={base}', '--mixers=own,window8+first2', '--full_every=2', f'--text={text}'),
    *('--contexts=16,600', '--nocosts', '--haystacks=0', f'--output={output}'),
    f'--figure={figure}',
  )
  rows = {(row.config['context'], row.config['mixer']): row for row in records.read(output)}
  assert len(rows) == 4 and figure.stat().st_size > 1000
  assert rows[16, 'window8+first2'].recipe == 'window8+first2 in 1 of 2, float'
  model, tokenizer = hf.load_pretrained(base)
  tokens_T = tokenizer.encode('\n'.join(corpus.load(text).held_out))[:600]
  for mixer, sparse in (('own', None), ('window8+first2', patterns.parse('window8+first2'))):
    first, *others = model.config.layers
    layers = (first.with_mixer(sparse=sparse), *others)
    config = model.config.replace(layers=layers, max_positions=600)
    values = {path: param.get_value() for path, param in parameters(model).items()}
    nll_BT = positions.nll(units.build(config, values), np.array([tokens_T]))
    for begin, end in ((0, 15), (15, 599)):
      row = rows[end + 1, mixer]
      assert row.value('ppl') == pytest.approx(np.exp(nll_BT[:, begin:end].mean()), rel=1e-4)
      assert row.metrics['ppl'].n == end - begin and 'prefill_s' not in row.metrics


@pytest.mark.slow
def test_needles_are_in_the_record_and_the_figure(script, base, text, tmp_path, monkeypatch):
  """With words that the tiny tokenizer tells apart."""
  words = tuple('abcdefgh')
  monkeypatch.setattr(long_quality.needle, 'WORDS', words)
  output, figure = tmp_path / 'long.jsonl', tmp_path / 'long.png'
  arguments = f'--model={base}', f'--text={text}', '--contexts=400', '--kv_caches=float'
  script(*arguments, '--phase=decode', '--tokens=2', f'--output={output}', f'--figure={figure}')
  (row,) = records.read(output)
  assert figure.stat().st_size > 1000 and row.value('decode_speedup') == 1
  assert 'prefill_s' not in row.metrics
  each = [row.value(f'needle_probability:{depth}') for depth in long_quality.DEPTHS]
  assert row.value('needle_probability') == pytest.approx(np.mean(each))
  assert all(0 < one < 1 for one in each) and row.config['haystacks'] == 2
