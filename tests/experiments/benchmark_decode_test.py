"""Tests benchmark_decode: its records, the peers and invalid flags."""

import json
import math
import sys

import pytest

from experiments import shapes
from model import presets
from model.eval import cost, records


@pytest.fixture
def peer(tmp_path):
  """Returns the command of a peer that prints the given lines."""

  def make(*lines, status=0):
    path = tmp_path / 'peer.py'
    text = '\n'.join(lines)
    path.write_text(f'import sys\nprint({text!r})\nsys.exit({status})\n')
    return f'{sys.executable} {path}'

  return make


def _line(**changes):
  line = {'peer': 'other', 'weights': 'f32', 'prefill_tokens_per_s': 1000, 'decode_tokens_per_s': 2}
  return json.dumps(line | changes)


def test_records_have_speeds_relative_to_the_base_and_the_peers(script, tmp_path, peer, capsys):
  out, figure = tmp_path / 'decode.jsonl', tmp_path / 'batches.png'
  command = peer('a greeting', _line())
  outputs = [f'--output={out}', f'--figure={figure}']
  script('--smoke', '--batches=1,2', f'--peer={command}', *outputs)
  rows = records.read(out)
  assert [(r.recipe, r.config['batch']) for r in rows] == [
    ('base', 1),
    ('base', 2),
    ('int4', 1),
    ('int4', 2),
    ('other f32', 1),
  ]
  base, _, int4, _, other = rows
  assert base.value('decode_speedup') == 1 and base.metrics['decode_speedup'].n == 5
  assert other.value('prefill_tokens_per_s') == 1000
  ratio = int4.value('decode / other f32')
  assert ratio == pytest.approx(int4.value('decode_tokens_per_s') / 2)
  moved = int4.value('decode_bytes_per_step') * int4.value('decode_tokens_per_s')
  assert int4.value('decode_bytes_per_s') == pytest.approx(moved)
  assert int4.value('stored_bytes') < base.value('stored_bytes') / 3
  assert int4.value('decode_bytes_per_step') < base.value('decode_bytes_per_step') / 3
  assert 0 < base.value('outside_program_s_per_token') < 0.1
  assert figure.read_bytes().startswith(b'\x89PNG')
  assert 'other f32, batch 1' in capsys.readouterr().out


BAD = {
  'a calibrated recipe': (['--recipes=wanda50'], 'needs calibration, and there is no text'),
  'a batch that is no number': (['--batches=1,two'], 'must be integers'),
  'no batch': (['--batches=0'], 'above 0'),
  'an unknown preset': (['--preset=smolm'], 'did you mean'),
  'too many layers': (['--preset=tiny-qwen3', '--layers=3'], 'but tiny-qwen3 has 2'),
  'an unknown recipe': (['--recipes=int5'], 'unknown recipe'),
  'an empty peer': (['--peer='], 'empty'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_flags_are_refused(script, case):
  arguments, message = BAD[case]
  with pytest.raises(ValueError, match=message):
    script(*arguments)


@pytest.mark.parametrize(
  'lines, status, message',
  [
    (['no JSON'], 0, 'prints no JSON line'),
    ([json.dumps({'peer': 'x'})], 0, 'without weights, prefill'),
    ([_line()], 3, 'failed'),
  ],
)
def test_a_failing_peer_is_named(script, peer, lines, status, message):
  with pytest.raises(ValueError, match=message):
    script('--smoke', f'--peer={peer(*lines, status=status)}')


def test_a_scaled_shape_has_the_same_depth_and_is_wider():
  small = presets.preset('smollm2-135m')
  wide = shapes.scaled(small, 2)
  count = lambda config: cost.parameters(config.replace(tied=True)).non_embedding
  assert len(wide.layers) == len(small.layers) and wide.layers[0].mixer.head_width == 64
  matrices = 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536)
  assert count(wide) - count(small) == 3 * matrices + (2 * 30 + 1) * 576


def test_transformers_is_timed_on_the_same_shape(make_script, capsys):
  peer = make_script('peers.transformers_speed')
  peer('--preset=tiny-qwen3', '--prompt=8', '--tokens=2')
  line = json.loads(capsys.readouterr().out)
  assert (line['peer'], line['weights']) == ('transformers', 'float32')
  assert line['prefill_tokens_per_s'] > 0 and line['decode_tokens_per_s'] > 0


@pytest.mark.slow
def test_transformers_is_timed_on_a_checkpoint(make_script, base, capsys):
  make_script('peers.transformers_speed')(f'--model={base}', '--prompt=8', '--tokens=2')
  assert json.loads(capsys.readouterr().out)['decode_tokens_per_s'] > 0


def test_llama_cpp_gets_the_same_shape(make_script):
  peer = make_script('peers.llama_cpp_speed')
  for tied in (True, False):
    config = presets.preset('smollm2-135m').replace(tied=tied)
    sizes = [math.prod(shape) for shape in peer.module.tensors(config).values()]
    assert sum(sizes) == cost.parameters(config).total
  with pytest.raises(ValueError, match="'q5_0', which is not one of f16, q8_0, q4_0"):
    peer('--formats=q5_0')
  routed = presets.preset('olmoe-1b-7b')
  sizes = [math.prod(shape) for shape in peer.module.tensors(routed).values()]
  assert sum(sizes) == cost.parameters(routed).total
  with pytest.raises(ValueError, match="'tiny-qwen3' is neither a plain Llama nor an OLMoE"):
    peer('--preset=tiny-qwen3')
  with pytest.raises(ValueError, match='the vocabulary needs at least 260 tokens, not 256'):
    peer('--preset=tiny-llama')
  with pytest.raises(ValueError, match='--prompt=64 is no multiple of --read=15'):
    peer('--prompt=64', '--read=15')
  with pytest.raises(ValueError, match=r'there is no file none\.gguf'):
    peer('--model=none.gguf')


@pytest.mark.parametrize('preset', ['smollm2-135m', 'tiny-olmoe'])
def test_llama_cpp_is_timed(make_script, capsys, preset):
  pytest.importorskip('llama_cpp')
  pytest.importorskip('gguf')
  make_script('peers.llama_cpp_speed')(f'--preset={preset}', '--prompt=8', '--tokens=2')
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line['weights'] for line in lines] == ['f16', 'q8_0', 'q4_0']
  assert all(line['decode_tokens_per_s'] > 0 for line in lines)


def test_copies_fill_the_cache_of_llama_cpp(make_script, capsys):
  pytest.importorskip('llama_cpp')
  pytest.importorskip('gguf')
  peer = make_script('peers.llama_cpp_speed')
  peer('--preset=smollm2-135m', '--layers=2', '--formats=q8_0', '--prompt=64', '--read=16')
  line = json.loads(capsys.readouterr().out)
  assert (line['prompt'], line['read']) == (64, 16) and line['decode_tokens_per_s'] > 0
