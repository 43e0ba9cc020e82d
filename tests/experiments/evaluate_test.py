"""evaluate: its numbers are those of the library, and bad input is refused."""

import gzip
import json

import numpy as np
import pytest
from absl import flags

from model import hf, transformer
from model.eval import perplexity
from model.infer.prepare import prepare
from ops import quantized
from ops.kernels import cpu


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text(''.join(f'def add_{i}(a, b):\n  return a + b + {i}\n\n\n' for i in range(40)))
  return path


def test_json_has_the_numbers_of_the_protocol(script, base, text, capsys):
  script(f'--model={base}', f'--text={text}', '--seq_len=32', '--json', '--max_windows=5')
  found = json.loads(capsys.readouterr().out)
  model, tokenizer = hf.load_pretrained(base)
  windows = perplexity.windows(*tokenizer.encode_with_bytes(text.read_text()), 32, 5)
  quality = perplexity.evaluate(prepare(model), windows)
  assert found['ppl'] == quality.ppl
  assert found['bits_per_byte'] == quality.bits_per_byte
  assert found['nll_sum'] == quality.nll_sum
  assert found['tokens'] == 5 * 31
  assert found['activations'] == 'float32'
  assert 'kl_to_base' not in found


def test_the_cache_is_measured_and_named(script, base, text, capsys):
  arguments = f'--model={base}', f'--text={text}', '--seq_len=64', '--json', '--max_windows=3'
  script(*arguments)
  plain = json.loads(capsys.readouterr().out)
  script(*arguments, '--kv_cache=int8', f'--base={base}')
  found = json.loads(capsys.readouterr().out)
  model, tokenizer = hf.load_pretrained(base)
  windows = perplexity.windows(*tokenizer.encode_with_bytes(text.read_text()), 64, 3)
  assert found['ppl'] == perplexity.evaluate(model, windows, cache_format='int8').ppl
  assert found['ppl'] == pytest.approx(plain['ppl'], rel=1e-3)
  assert found['kl_to_base'] > 0
  assert found['kv_cache'] == 'int8'
  assert found['kv_cache_bytes'] == 2 * 2 * 64 * (64 + 2)  # two layers, one head of 64
  script(*arguments, '--kv_cache=int8+h2o16')
  kept = json.loads(capsys.readouterr().out)
  assert kept['kv_cache'] == 'int8+h2o16' and kept['ppl'] != found['ppl']
  assert kept['kv_cache_bytes'] == 2 * 16 * (2 * (64 + 2) + 8)
  assert 'kv_cache' not in plain


@pytest.mark.slow
def test_the_fast_products_are_measured_unless_widened_ones_are_asked_for(
  script, base, text, capsys, tmp_path
):
  model, tokenizer = hf.load_pretrained(base)
  for linear in transformer.linears(model).values():
    linear.weight.set_value(quantized.quantize(linear.weight.get_value(), 'int4', group_size=32))
  hf.save_pretrained(model, tokenizer, tmp_path / 'int4')
  windows = perplexity.windows(*tokenizer.encode_with_bytes(text.read_text()), 32, 5)
  base_model, _ = hf.load_pretrained(base)
  found = {}
  for flag, form in (('--nowidened', prepare), ('--widened', lambda model: model)):
    arguments = f'--model={tmp_path / "int4"}', f'--text={text}', '--seq_len=32', '--json'
    script(*arguments, '--max_windows=5', f'--base={base}', flag)
    found[flag] = json.loads(capsys.readouterr().out)
    quality = perplexity.evaluate(form(model), windows, base=form(base_model))
    assert found[flag]['ppl'] == quality.ppl
    assert found[flag]['kl_to_base'] == quality.kl_to_base
    assert found[flag]['widened'] == (flag == '--widened')
  same = found['--widened']['ppl'] == found['--nowidened']['ppl']
  assert same != cpu.available()  # native products round activations


def test_windows_begin_with_a_bos_where_it_is_asked_for(script, base, text, tmp_path, capsys):
  arguments = f'--text={text}', '--seq_len=32', '--max_windows=5', '--json'
  found = {}
  for bos in ('auto', 'none', 'window'):
    script(f'--model={base}', *arguments, f'--bos={bos}')
    found[bos] = json.loads(capsys.readouterr().out)
  assert found['auto'] == found['none'] and found['auto']['bos'] == 'none'
  model, tokenizer = hf.load_pretrained(base)
  ids_T, ends_T = tokenizer.encode_with_bytes(text.read_text())
  rows_BT = np.pad(ids_T[: 5 * 31].reshape(5, 31), ((0, 0), (1, 0)), constant_values=0)
  assert tokenizer.bos_id == 0
  windows = perplexity.Windows(tokens_BT=rows_BT, predicted_bytes=int(ends_T[5 * 31 - 1]))
  expected = perplexity.evaluate(model, windows)
  assert found['window']['nll_sum'] == expected.nll_sum != found['none']['nll_sum']
  assert found['window']['bits_per_byte'] == expected.bits_per_byte
  assert (found['window']['bos'], found['window']['tokens']) == ('window', 5 * 31)


@pytest.mark.slow
def test_the_text_may_be_packed_records(script, base, text, tmp_path, capsys):
  path = tmp_path / 'text.JSONL.gz'
  lines = text.read_text().split('\n\n\n')
  records = '\n'.join(json.dumps({'text': line}) for line in lines).encode('utf-8-sig')
  path.write_bytes(gzip.compress(records))
  plain = tmp_path / 'plain.TXT'
  plain.write_text('\n'.join(lines))
  found = []
  for file in (path, plain):
    script(f'--model={base}', f'--text={file}', '--seq_len=32', '--json', '--max_windows=2')
    found.append(json.loads(capsys.readouterr().out) | {'text': ''})
  assert found[0] == found[1]


def test_words_with_a_base(script, base, text, capsys):
  script(f'--model={base}', f'--text={text}', f'--base={base}', '--seq_len=32', '--max_windows=2')
  shown = capsys.readouterr().out
  assert 'perplexity' in shown
  assert 'KL to base    0.000000 nats per token' in shown
  assert 'flip rate     0.00%' in shown


@pytest.mark.slow
def test_half_precision_is_said(script, base, text, capsys):
  arguments = f'--model={base}', f'--text={text}', '--seq_len=32', '--max_windows=2', '--json'
  script(*arguments)
  full = json.loads(capsys.readouterr().out)
  script(*arguments, '--dtype=bfloat16')
  half = json.loads(capsys.readouterr().out)
  assert half['activations'] == 'bfloat16'
  assert half['stored_bytes'] * 2 == full['stored_bytes']
  assert half['ppl'] == pytest.approx(full['ppl'], rel=0.02)


def test_smoke(script, capsys):
  script('--smoke', '--max_windows=2', '--seq_len=64')
  assert 'over 126 predicted tokens, windows of 64' in capsys.readouterr().out


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'needs --model and --text'),
    (['--model=x'], 'needs --model and --text'),
    (['--model=no/such/folder/x', '--text=TEXT'], 'is no folder'),
    (['--model=BASE', '--text=none.txt'], 'none.txt: no such file or folder'),
    (['--model=BASE', '--text=TEXT', '--seq_len=9000'], 'fewer than one window of 9000'),
    (['--model=BASE', '--text=TEXT', '--plugins=x.py'], 'there is no plug-in x.py'),
  ],
)
def test_bad_input_is_refused(script, base, text, arguments, message):
  named = [a.replace('BASE', str(base)).replace('TEXT', str(text)) for a in arguments]
  with pytest.raises(ValueError, match=message):
    script(*named)


def test_text_that_is_not_utf8_is_refused(script, base, tmp_path):
  path = tmp_path / 'x.txt'
  path.write_bytes(b'caf\xe9')
  with pytest.raises(ValueError, match='not UTF-8'):
    script(f'--model={base}', f'--text={path}')


@pytest.mark.parametrize('kind', ['truncated', 'no tokenizer', 'nan', 'missing tensor'])
def test_a_damaged_checkpoint_is_refused(script, damaged, text, kind):
  with pytest.raises(ValueError, match=r'model\.safetensors|no tokenizer|NaN|missing'):
    script(f'--model={damaged(kind)}', f'--text={text}')


def test_a_base_of_another_vocabulary_is_refused(script, base, damaged, text):
  other = damaged('another tokenizer')
  (other / 'tokenizer.json').unlink()
  with pytest.raises(ValueError, match='--base has a vocabulary of 300, --model one of 512'):
    script(f'--model={base}', f'--text={text}', f'--base={other}', '--seq_len=32')


@pytest.mark.parametrize(
  'argument', ['--max_windows=-1', '--seq_len=1', '--dtype=int8', '--kv_cache=x', '--bos=all']
)
def test_bad_flags_are_refused(script, argument):
  with pytest.raises(flags.Error):
    script('--smoke', argument)
