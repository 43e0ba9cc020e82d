"""Tests measure_memory on a real process; the slow test checks the limit on the peak."""

import pytest

from model.eval import records

BLOCKS = 3  # the limit on the memory of compression beyond the model


@pytest.mark.slow
def test_the_record_has_the_memory_of_a_process(script, tmp_path, capsys):
  out = tmp_path / 'memory.jsonl'
  script('--smoke', f'--output={out}')
  (row,) = records.read(out)
  # Four projections, three feed-forward matrices and two norms, in float32.
  assert row.value('block_bytes') == 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128)
  assert row.value('model_bytes') == 3 * row.value('block_bytes') + 4 * (2 * 256 * 128 + 128)
  assert 0 <= row.value('extra_bytes') < 2**30
  assert row.value('extra_blocks') == row.value('extra_bytes') / row.value('block_bytes')
  assert 'int4, 128x3:' in capsys.readouterr().out


@pytest.mark.parametrize('shape', ['1024', '100x2', '0x3', 'axb', '128x0'])
def test_invalid_shapes_are_refused(script, shape):
  with pytest.raises(ValueError, match=f'--shapes has {shape!r}'):
    script(f'--shapes={shape}')


@pytest.mark.slow
def test_compression_needs_at_most_three_blocks_beyond_the_model(script, tmp_path):
  out = tmp_path / 'memory.jsonl'
  script('--shapes=1024x4,1536x3', '--recipes=gptq_int4,wanda_2of4', f'--output={out}')
  for row in records.read(out):
    assert row.value('extra_blocks') <= BLOCKS, row.config['shape']
