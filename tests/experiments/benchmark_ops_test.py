"""benchmark_ops: a record a format, beside what the memory does."""

from model.eval import records


def test_each_format_is_a_record(script, tmp_path, capsys):
  out = tmp_path / 'ops.jsonl'
  script('--smoke', f'--output={out}')
  rows = records.read(out)
  assert [row.recipe for row in rows] == ['int8', 'int4_g128']
  for row in rows:
    assert row.value('copy_bandwidth') > 0 and row.value('read_bandwidth') > 0
    assert row.value('xla of copy') == row.value('xla bandwidth') / row.value('copy_bandwidth')
  # 256 x 512 codes with a bfloat16 scale a column, or two codes a byte and a scale for 128.
  assert [row.value('weight_bytes') for row in rows] == [131072 + 1024, 65536 + 2048]
  assert '256x512, 1 rows, int8' in capsys.readouterr().out
