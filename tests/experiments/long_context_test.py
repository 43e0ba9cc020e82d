"""The script that measures long texts, run once on a tiny model, and its wrong flags."""

import pytest

from model.eval import records


def test_a_smoke_run_measures_every_case(script, tmp_path):
  output, figure = tmp_path / 'long.jsonl', tmp_path / 'long.png'
  script('--smoke', f'--output={output}', f'--figure={figure}')
  rows = {(row.config['context'], row.recipe): row for row in records.read(output)}
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
  ],
)
def test_wrong_flags_are_one_line(script, flag, message):
  with pytest.raises(ValueError, match=message):
    script(flag)
