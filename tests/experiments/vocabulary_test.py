"""vocabulary: folders that other scripts read, what it says of them, and bad input."""

import json

import numpy as np
import pytest

from model import hf

TEXT = ''.join(f'def add_{i}(a, b):\n  return a + b + {i}\n\n\n' for i in range(300))


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text(TEXT)
  return path


def test_a_trimmed_model_is_a_folder_like_others(script, base, text, tmp_path, capsys):
  out, record = tmp_path / 'out', tmp_path / 'r.jsonl'
  script(
    f'--model={base}',
    f'--text={text}',
    '--whole',
    '--seq_len=32',
    '--max_windows=4',
    f'--out={out}',
    f'--output={record}',
  )
  said = capsys.readouterr().out
  assert 'cut as before' in said and '100.00% of their tokens stay' in said
  (model, tokenizer), (smaller, trimmed) = map(hf.load_pretrained, (base, out))
  assert smaller.config.vocab_size == trimmed.vocab_size < model.config.vocab_size
  assert trimmed.decode(trimmed.encode(TEXT)) == TEXT
  assert len(trimmed.encode(TEXT)) == len(tokenizer.encode(TEXT))
  metrics = json.loads(record.read_text())['metrics']
  before, after = (metrics[f'bits_per_byte_{when}']['value'] for when in ('before', 'after'))
  assert after < before  # the same text, and fewer tokens that the softmax wastes anything on
  assert metrics['documents_changed']['value'] == 0


def test_another_vocabulary_and_a_narrow_table(script, base, text, tmp_path, capsys):
  plain = [f'--model={base}', f'--text={text}', '--max_windows=0']
  script(*plain, '--method=omp', '--vocab_size=280', '--atoms=4', f'--out={tmp_path / "omp"}')
  assert 'keep their rows' in capsys.readouterr().out
  model, tokenizer = hf.load_pretrained(tmp_path / 'omp')
  assert model.config.vocab_size == tokenizer.vocab_size <= 280
  again = f'--out={tmp_path / "mean"}'
  script(*plain, '--method=mean', f'--tokenizer={tmp_path / "omp"}', again)
  assert hf.load_pretrained(tmp_path / 'mean')[1].encode(TEXT) == tokenizer.encode(TEXT)
  script(*plain, '--method=factorise', '--rank=8', f'--out={tmp_path / "narrow"}')
  table = hf.load_pretrained(tmp_path / 'narrow')[0].embedding.table.get_value()
  assert table.weight.rank == 8
  assert np.linalg.matrix_rank(np.asarray(table.dense())) == 8


def test_bad_input_is_refused(script, base, text, tmp_path):
  with pytest.raises(ValueError, match='needs --model and --text'):
    script(f'--model={base}')
  with pytest.raises(ValueError, match='--donor is for --method=omp'):
    script(f'--model={base}', f'--text={text}', f'--donor={base}', '--method=mean')
  with pytest.raises(ValueError, match='has no tokenizer'):
    script(f'--model={base}', f'--text={text}', f'--tokenizer={tmp_path}', '--method=mean')
  empty = tmp_path / 'empty.txt'
  empty.write_text('  \n')
  with pytest.raises(ValueError, match='empty'):
    script(f'--model={base}', f'--text={empty}')
