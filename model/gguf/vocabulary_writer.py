"""The metadata of a vocabulary from a tokenizer: the inverse of `model.gguf.tokenizer`.

Byte-level BPE has its merges in the file, and the name of the way in which it splits text, which is
found by splitting a text of traps in all known ways. BPE of sentencepiece has a score for each
token: that of its piece where `tokenizer.model` is there, else its place in the order of merges.
What is written is read again, and the ids of the text of traps are compared.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model import sentencepiece_model, token_files
from model.config import ModelConfig
from model.gguf import pre_tokenizers
from model.gguf.container import Container
from model.gguf.tokenizer import to_tokenizer
from model.gguf.vocabulary import BYTE_LEVEL, PREFIX, SENTENCEPIECE, TokenType
from model.tokenizer import Tokenizer

# Every pair of pre-tokenizers with different patterns splits this differently.
TRAPS = (
  "We've 1,234 things; I'LL say don't.  They're 3.14159!\n\n\t\tnaïve café – 日本語 12345 😀\n",
  'HTTPServer camelCase x_1 == y[2] -> "quoted" (parenthesized)...\r\n    indented  \n \n  x\n',
  "e\u0301tude 'S'T's x's camelCase's //comment/* \u3000\u00a0 ½ 한국어 हिन्दी ß$a+b <|x|> a\n/b 7",
)
_SPACE = sentencepiece_model.SPACE
_BYTE = re.compile(r'<0x[0-9A-F]{2}>')
# Ids of tokens that end a text, in the order of `vocabulary.special_ids`.
_ENDS = ('eos', 'eot', 'eom')


def describe(tokenizer: Tokenizer, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
  """The metadata of a tokenizer, and what the file does not keep of it, a line each.

  Raises ValueError for a vocabulary that is no BPE, or splits text in a way that has no name.
  """
  built = token_files.build(tokenizer.files)
  data = json.loads(built.to_str())
  if data['model']['type'] != 'BPE':
    raise ValueError(
      f'a vocabulary of the kind {data["model"]["type"]} is not written to GGUF files; BPE is'
    )
  byte_level = 'ByteLevel' in set(_types(data['pre_tokenizer']))
  tokens, types, notes = _tokens(built, data, config.vocab_size)
  metadata = {'tokens': tokens, 'token_type': types}
  if byte_level:
    pre, lost = pre_tokenizers.name_of(built, data['model'].get('ignore_merges', False), TRAPS)
    metadata |= {'model': BYTE_LEVEL, 'pre': pre}
    metadata['merges'] = [' '.join(_pair(merge)) for merge in data['model']['merges']]
    notes += lost
  else:
    _mark_pieces(tokens, types, tokenizer, data)
    first = built.encode('a', add_special_tokens=False).tokens
    metadata |= {
      'model': SENTENCEPIECE,
      'pre': 'default',
      'scores': _scores(tokenizer, tokens, data),
      'add_space_prefix': bool(first) and first[0].startswith(_SPACE),
    }
  special, lost = _special(tokenizer, config, built)
  found = {f'{PREFIX}{key}': value for key, value in {**metadata, **special}.items()}
  if tokenizer.chat_template:
    found['tokenizer.chat_template'] = tokenizer.chat_template
  return found, notes + lost + _differences(tokenizer, found)


def _types(node) -> Iterator[str]:
  """The types in the JSON form of a pre-tokenizer, nested ones included."""
  if isinstance(node, dict):
    if isinstance(node.get('type'), str):
      yield node['type']
    for value in node.values():
      yield from _types(value)
  elif isinstance(node, list):
    for value in node:
      yield from _types(value)


def _pair(merge) -> list[str]:
  return merge.split(' ') if isinstance(merge, str) else merge


def _tokens(built, data, rows: int) -> tuple[list[str], list[int], list[str]]:
  """Tokens and types of as many ids as the model has rows, padding included."""
  tokens, types = [f'[PAD{i}]' for i in range(rows)], [int(TokenType.UNUSED)] * rows
  beyond = []
  for token, i in built.get_vocab(with_added_tokens=True).items():
    if i < rows:
      tokens[i], types[i] = token, int(TokenType.NORMAL)
    else:
      beyond.append(token)
  for added in data['added_tokens']:
    if added['id'] < rows:
      kind = TokenType.CONTROL if added['special'] else TokenType.USER_DEFINED
      types[added['id']] = int(kind)
  names = ', '.join(sorted(beyond)[:5])
  notes = [f'{len(beyond)} tokens beyond the {rows} rows of the model are left out: {names}']
  return tokens, types, notes if beyond else []


def _mark_pieces(tokens, types, tokenizer, data) -> None:
  """Marks the unknown token and those of single bytes, as sentencepiece does."""
  unknown = data['model'].get('unk_token') or _text(
    token_files.read_settings(tokenizer.files), 'unk'
  )
  for i, token in enumerate(tokens):
    if token == unknown:
      types[i] = int(TokenType.UNKNOWN)
    elif data['model'].get('byte_fallback') and _BYTE.fullmatch(token):
      types[i] = int(TokenType.BYTE)


def _scores(tokenizer, tokens, data) -> list[float]:
  """The higher the score, the earlier two neighbours merge to the token."""
  pieces = ()
  if token_files.SENTENCEPIECE in tokenizer.files:
    pieces = sentencepiece_model.read(tokenizer.files[token_files.SENTENCEPIECE]).pieces
  places = {}
  for merge in data['model']['merges']:
    places.setdefault(''.join(_pair(merge)), len(places))
  last = float(-len(places) - 1)
  scores = [float(-places[token]) if token in places else last for token in tokens]
  for i, piece in enumerate(pieces[: len(tokens)]):
    scores[i] = float(piece.score)
  return scores


def _text(settings, kind: str) -> str | None:
  """The text of the special token of a kind, if the settings name one."""
  text = token_files.content(settings.get(f'{kind}_token'))
  return text if isinstance(text, str) else None


def _special(tokenizer, config, built) -> tuple[dict[str, Any], list[str]]:
  """Ids of special tokens, and which of them stand around a text."""
  settings = token_files.read_settings(tokenizer.files)
  texts = {kind: _text(settings, kind) for kind in ('unk', 'pad')}
  named = {kind: text and built.token_to_id(text) for kind, text in texts.items()}
  ends = list(dict.fromkeys([*tokenizer.eos_ids, *config.eos_ids]))
  bos = config.bos_id if tokenizer.bos_id is None else tokenizer.bos_id
  pad = config.pad_id if named['pad'] is None else named['pad']
  ids = {'bos': bos, 'unknown': named['unk'], 'padding': pad}
  ids |= dict(zip(_ENDS, ends))
  found = {f'{kind}_token_id': i for kind, i in ids.items() if i is not None}
  found = {key: i for key, i in found.items() if i < config.vocab_size}
  prefix, suffix = tokenizer.codec.prefix, tokenizer.codec.suffix
  found |= {'add_bos_token': prefix == (bos,), 'add_eos_token': suffix == tuple(ends[:1]) != ()}
  notes = []
  if prefix not in ((), (bos,)) or suffix not in ((), tuple(ends[:1])):
    notes.append(f'what stands around a text is not in the file: {prefix} and {suffix}')
  if len(ends) > len(_ENDS):
    notes.append(f'only {len(_ENDS)} of the {len(ends)} tokens that end a text are in the file')
  return found, notes


def _differences(tokenizer, metadata) -> list[str]:
  """A line if the vocabulary that was written gives other ids than the tokenizer."""
  again = to_tokenizer(Container(Path('the new file'), metadata, {}))
  lines = [line for text in TRAPS for line in text.splitlines(keepends=True)]
  wrong = [
    line
    for line, ours, theirs in zip(lines, tokenizer.encode_many(lines), again.encode_many(lines))
    if ours != theirs
  ]
  if not wrong:
    return []
  return [
    f'the tokenizer in the file gives other ids for {len(wrong)} of {len(lines)} lines of '
    f'traps, such as {wrong[0]!r}'
  ]
