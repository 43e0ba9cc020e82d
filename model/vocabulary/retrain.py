"""Trains a vocabulary on a text for a model that has another one already."""

import json
from collections.abc import Sequence

from model import token_codecs, token_files
from model.tokenizer import Tokenizer
from model.vocabulary import renumber


def retrain(tokenizer: Tokenizer, texts: Sequence[str], vocab_size: int) -> Tokenizer:
  """Trains byte-level BPE on texts, with the special tokens and settings of `tokenizer`.

  Its added tokens come first; they, the chat template and what stands around a prompt stay as they
  are. Texts are cut as `Tokenizer.train_bpe` does, which loses nothing of them.

  Raises ValueError if there is no text, or `vocab_size` is below the bytes and added tokens.
  """
  if not any(texts):
    raise ValueError('there is no text to train a vocabulary on')
  kept = sorted(renumber.special_ids(tokenizer))
  if not kept:
    return Tokenizer.train_bpe(texts, vocab_size)
  names = [tokenizer.codec.token_of(i) for i in kept]
  data = json.loads(token_codecs.train_byte_bpe(texts, vocab_size, names))
  new = {old: i for i, old in enumerate(kept)}
  old = renumber.contents(tokenizer)
  flags = {token['content']: token for token in old['added_tokens']}
  data['added_tokens'] = [
    {**flags.get(t['content'], t), 'id': t['id']} for t in data['added_tokens']
  ]
  data['post_processor'] = renumber.processor(old['post_processor'], new)
  left_out = (*renumber.OLD_FILES, renumber.ADDED)
  files = {name: value for name, value in tokenizer.files.items() if name not in left_out}
  settings = token_files.read_json(token_files.CONFIG, files.get(token_files.CONFIG))
  settings |= {'tokenizer_class': token_files.GENERIC, 'clean_up_tokenization_spaces': False}
  files[token_files.CONFIG] = token_files.to_bytes(settings)
  files[token_files.JSON] = json.dumps(data, ensure_ascii=False, indent=1).encode()
  return Tokenizer.from_files(renumber.beside(files, new))
