"""compare_llama_cpp, with a program in the place of llama.cpp that finds one nat a token."""

import math
import sys

import pytest

from model.eval import records

STAND_IN = """#!{python}
import json, pathlib, shutil, sys
import numpy as np
work = pathlib.Path(sys.argv[2])
asked = json.loads((work / 'work.json').read_text())
for source, target, kind in asked['make']:
  shutil.copy(work / source, work / target)
rows, length = np.load(work / 'windows.npy').shape
one = {{'nll_B': [float(length - 1)] * rows, 'seconds': 1.0}}
found = {{'version': '0', 'system': 'none', 'files': dict.fromkeys(asked['measure'], one)}}
(work / 'measured.json').write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_all_files_are_measured_on_the_same_windows(script, base, tmp_path, capsys):
  peer, text, output = (tmp_path / name for name in ('peer', 'text.txt', 'out.jsonl'))
  peer.write_text(STAND_IN.format(python=sys.executable))
  peer.chmod(0o755)
  text.write_text(''.join(f'def add_{i}(a, b):\n  return a + b + {i}\n\n\n' for i in range(400)))
  flags = f'--model={base}', f'--text={text}', f'--peer={peer}', f'--output={output}'
  script(*flags, '--recipes=int4_g32', '--seq_len=32', '--max_windows=3', '--calibration_rows=4')
  rows = {record.recipe: record for record in records.read(output)}
  assert list(rows) == ['f16', 'llama.cpp q4_0', 'q4_0', 'int4_g32']
  for record in rows.values():
    assert record.metrics['peer_ppl'].value == pytest.approx(math.e)
    assert record.metrics['peer_ppl'].n == 3 * 31
    ratio = record.value('peer_ppl') / record.value('ppl')
    assert record.value('peer_ppl / ppl') == pytest.approx(ratio)
  # The stand-in copied the file instead of making a smaller one.
  assert rows['llama.cpp q4_0'].value('ppl') == rows['f16'].value('ppl')
  assert rows['int4_g32'].value('file_bytes') == rows['q4_0'].value('file_bytes')
  assert 'codes copied' in ' '.join(rows['int4_g32'].config['tensors'])
  assert capsys.readouterr().out.count('in llama.cpp') == 4


def test_flags_that_are_needed_are_named(script, base):
  with pytest.raises(ValueError, match='--peer is needed'):
    script(f'--model={base}', '--text=python-docs')
