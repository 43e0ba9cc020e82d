"""Tests compile_decode: one record per format, and the decode step of an 8B model on a v5e."""

import json

import pytest

from model.eval import records, targets

HBM_BYTES = 16e9  # of a v5e


def test_each_format_is_a_record(script, tmp_path, capsys):
  out = tmp_path / 'compiled.jsonl'
  script('--smoke', f'--output={out}')
  rows = records.read(out)
  assert [row.recipe for row in rows] == ['int8', 'int4']
  for row in rows:
    assert row.value('needed_bytes') >= row.value('argument_bytes') > 0
    assert row.value('widened') > 0  # the jnp forms for CPUs widen weights
    assert sum(int(note.split()[1]) for note in row.notes) == row.value('widened')
  assert 'tiny-llama, int4, cpu' in capsys.readouterr().out


def test_invalid_flags_are_refused_before_anything_is_compiled(script):
  with pytest.raises(ValueError, match="--formats has 'int5'"):
    script('--formats=int5')
  with pytest.raises(ValueError, match='no preset'):
    script('--preset=llama-9')


@pytest.mark.slow
@pytest.mark.parametrize('format', ['int8', 'int4'])
def test_an_8b_model_decodes_on_a_v5e_without_widened_weights(script, tmp_path, format):
  try:
    targets.tpu('v5e:2x2')
  except ValueError as error:
    pytest.skip(str(error))
  out = tmp_path / 'compiled.jsonl'
  script(f'--formats={format}', '--target=v5e:2x2', f'--output={out}')
  (row,) = (json.loads(line) for line in out.read_text().splitlines())
  metrics = {name: metric['value'] for name, metric in row['metrics'].items()}
  assert metrics['widened'] == 0
  assert metrics['temporary_bytes'] < metrics['argument_bytes'] / 10
  assert {'int8': 8e9, 'int4': 5e9}[format] < metrics['needed_bytes'] < HBM_BYTES
