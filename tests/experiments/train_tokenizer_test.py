"""train_tokenizer: a smoke run gives a lossless tokenizer and a record."""

import pytest
import transformers

from model.eval import records
from model.tokenizer import Tokenizer

SAMPLE = 'def f(x):\n\treturn x ** 2  # größer: 東京 🎉\n'


def test_smoke(script, tmp_path, capsys):
  out = tmp_path / 'tokenizer'
  script('--smoke', f'--out={out}')
  tokenizer = Tokenizer.load(out)
  assert tokenizer.vocab_size == 512
  assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  assert theirs(SAMPLE)['input_ids'] == tokenizer.encode(SAMPLE)
  (record,) = records.read(out / 'records.json')
  assert 1.5 < record.value('bytes_per_token') < 4
  assert record.value('vocab_size') == 512
  assert '512 tokens' in capsys.readouterr().out
  again = tmp_path / 'again'
  script('--smoke', f'--out={again}')
  assert (again / 'tokenizer.json').read_bytes() == (out / 'tokenizer.json').read_bytes()


@pytest.mark.parametrize('text, message', [('none', 'no such file'), ('empty', 'empty')])
def test_unusable_text_is_refused(script, tmp_path, text, message):
  (tmp_path / 'empty').touch()
  with pytest.raises(ValueError, match=message):
    script('--smoke', f'--text={tmp_path / text}', f'--out={tmp_path / "out"}')
  assert not (tmp_path / 'out').exists()


def test_an_output_that_holds_something_else_is_refused(script, tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(ValueError, match='holds something else'):
    script('--smoke', f'--out={tmp_path}')
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']
