"""The texts of the main job."""

import numpy as np
import pytest

from experiments import inputs
from model.eval import perplexity
from model.tokenizer import Tokenizer


@pytest.mark.parametrize('bos_id', [None, 5])
def test_held_out_text_gives_its_windows_again(tmp_path, bos_id):
  # Documents of one long word: cut anywhere, it ends in other tokens than within.
  words = [('ab' * n + 'c' * n) for n in range(3, 40)]
  tokenizer = Tokenizer.train_bpe(words * 2, 300)
  texts = ''.join(words[5:])
  tokens_T, ends_T = tokenizer.encode_with_bytes(texts)
  for seq_len in range(2, 9):
    for limit in range(1, len(tokens_T) // seq_len):
      text = perplexity.windows(tokens_T, ends_T, seq_len, limit, bos_id)
      corpus = type('Corpus', (), {'held_out': [texts]})
      found = type('Inputs', (), {'texts': {'a': corpus, 'b': corpus}, 'tokenizer': tokenizer})
      inputs.write_held_out(tmp_path, found, {'a': text, 'b': text})
      again = tokenizer.encode_with_bytes((tmp_path / 'held_out.txt').read_text())
      assert (tmp_path / 'held_out_b.txt').read_text() == (tmp_path / 'held_out.txt').read_text()
      found = perplexity.windows(*again, seq_len, bos_id=bos_id)
      np.testing.assert_array_equal(found.tokens_BT, text.tokens_BT)
      assert found.predicted_bytes == text.predicted_bytes
