"""fertility: what is counted, against the tokenizer itself."""

import json

import pytest

from model import hf

TEXT = ''.join(f'def add_{i}(a, b):\n  return a + b + {i}\n\n\n' for i in range(300))


def test_tokens_and_bytes_are_counted(script, base, tmp_path, capsys):
  text = tmp_path / 'text.txt'
  text.write_text(TEXT)
  script(f'--models={base}', f'--text={text}', f'--output={tmp_path / "r.jsonl"}')
  tokenizer = hf.load_pretrained(base)[1]
  metrics = json.loads((tmp_path / 'r.jsonl').read_text())['metrics']
  found = metrics['bytes_per_token']
  assert found['value'] == pytest.approx(len(TEXT) / found['n'], rel=0.01)  # blocks are cut apart
  assert found['n'] == pytest.approx(len(tokenizer.encode(TEXT)), rel=0.01)
  assert f'{found["value"]:.4f}' in capsys.readouterr().out
  with pytest.raises(ValueError, match='twice'):
    script(f'--models={base},{base}', f'--text={text}')
