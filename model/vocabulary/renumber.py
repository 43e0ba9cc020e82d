"""Gives the tokens of a tokenizer new ids, in all of its files; tokens without one are dropped.

What is written is a tokenizer.json, whatever the vocabulary was read from, so that the files of the
old vocabulary (tokenizer.model, vocab.json, merges.txt) are left out. The ids in its merges, added
tokens and post-processor change with it, and so do those of the JSON files beside it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from model import token_files
from model.config import ModelConfig
from model.tokenizer import GENERATION, Tokenizer
from model.vocabulary import needed

ADDED = 'added_tokens.json'
DECODER = 'added_tokens_decoder'
OLD_FILES = (token_files.SENTENCEPIECE, token_files.VOCABULARY, token_files.MERGES)
# What `token_files` puts into the gaps between the ids of added tokens.
_STAND_IN = re.compile(r'<\|no token \d+\|>')
# Lists of ids, or of lists of them, in generation_config.json.
_ID_LISTS = ('suppress_tokens', 'begin_suppress_tokens', 'bad_words_ids')


def contents(tokenizer: Tokenizer) -> dict[str, Any]:
  """The tokenizer as the object in a tokenizer.json, whatever files it was read from."""
  return json.loads(token_files.build(tokenizer.files).to_str())


def special_ids(tokenizer: Tokenizer, config: ModelConfig | None = None) -> set[int]:
  """The ids that have to stay: those of added tokens, and all that the files or a config name."""
  data = contents(tokenizer)
  found = {t['id'] for t in data['added_tokens'] if not _STAND_IN.fullmatch(t['content'])}
  found |= set(tokenizer.eos_ids) | {tokenizer.bos_id}
  found |= {i for _, i in _named_ids(_generation(tokenizer.files))}
  if config is not None:
    found |= {config.bos_id, config.pad_id, *config.eos_ids}
  return {i for i in found if i is not None and tokenizer.codec.token_of(i) is not None}


def renumbered(tokenizer: Tokenizer, kept: Sequence[int]) -> Tokenizer:
  """The tokenizer with the tokens `kept` alone, the first of which gets the id 0, and so on.

  Raises ValueError if a special token is not kept, or the kind of vocabulary is not known.
  """
  lost = special_ids(tokenizer) - set(kept)
  if lost:
    raise ValueError(f'special and added tokens have to stay, but {sorted(lost)[:8]} do not')
  new, data = {old: i for i, old in enumerate(kept)}, contents(tokenizer)
  data['model'] = _model(data['model'], new)
  data['added_tokens'] = [
    {**token, 'id': new[token['id']]} for token in data['added_tokens'] if token['id'] in new
  ]
  data['post_processor'] = processor(data['post_processor'], new)
  if data['padding']:
    data['padding']['pad_id'] = new.get(data['padding']['pad_id'], 0)
  files = {name: value for name, value in tokenizer.files.items() if name not in OLD_FILES}
  files[token_files.JSON] = json.dumps(data, ensure_ascii=False, indent=1).encode()
  result = Tokenizer.from_files(beside(files, new))
  _check(tokenizer, result, kept)
  return result


def renumbered_config(config: ModelConfig, new: Mapping[int, int], rows: int) -> ModelConfig:
  """The config of a model of so many rows; special tokens without a new id are left out."""
  return config.replace(
    vocab_size=rows,
    bos_id=new.get(config.bos_id),
    pad_id=new.get(config.pad_id),
    eos_ids=tuple(new[i] for i in config.eos_ids if i in new),
  )


def _model(model: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
  """`model` of a tokenizer.json with the kept tokens, and the merges that are of them alone."""
  needed.check(model)
  if model['type'] == 'Unigram':
    # The place of a piece is its id, so the pieces stand in the order of new ids.
    pieces = {new[i]: piece for i, piece in enumerate(model['vocab']) if i in new}
    unknown = model.get('unk_id')
    return {**model, 'vocab': [pieces[i] for i in sorted(pieces)], 'unk_id': new.get(unknown)}
  ids = needed.token_ids(model)
  vocab = {token: new[i] for token, i in ids.items() if i in new}
  merges = [
    [left, right]
    for left, right in needed.merge_pairs(model)
    if left in vocab and right in vocab and left + right in vocab
  ]
  return {**model, 'vocab': vocab, 'merges': merges}


def processor(node: Any, new: Mapping[int, int]) -> Any:
  """A post-processor with new ids: those of a template, or of BERT's and RoBERTa's pairs."""
  if node is None:
    return None
  node = dict(node)
  if node.get('type') == 'Sequence':
    node['processors'] = [processor(one, new) for one in node['processors']]
  elif node.get('type') == 'TemplateProcessing':
    node['special_tokens'] = {
      name: {**token, 'ids': [new[i] for i in token['ids']]}
      for name, token in node['special_tokens'].items()
    }
  for name in ('sep', 'cls'):
    if name in node:
      token, i = node[name]
      node[name] = [token, new[i]]
  return node


def beside(files: Mapping[str, bytes], new: Mapping[int, int]) -> dict[str, bytes]:
  """The files with new ids in those that stand beside the vocabulary."""
  files = dict(files)
  settings = token_files.read_json(token_files.CONFIG, files.get(token_files.CONFIG))
  if settings.get(DECODER):
    moved = {str(new[int(i)]): token for i, token in settings[DECODER].items() if int(i) in new}
    files[token_files.CONFIG] = token_files.to_bytes({**settings, DECODER: moved})
  if ADDED in files:
    added = token_files.read_json(ADDED, files[ADDED])
    files[ADDED] = token_files.to_bytes({t: new[i] for t, i in added.items() if i in new})
  generation = _generation(files)
  if generation:
    moved = dict(generation)
    for name in dict.fromkeys(name for name, _ in _named_ids(generation)):
      moved[name] = _mapped(generation[name], new)
    files[GENERATION] = token_files.to_bytes(moved)
  return files


def _generation(files: Mapping[str, bytes]) -> dict[str, Any]:
  data = files.get(GENERATION, b'')
  return token_files.read_json(GENERATION, data) if data.strip() else {}


def _named_ids(generation: Mapping[str, Any]) -> list[tuple[str, int]]:
  """The ids in a generation_config.json, each with the key that it stands under."""
  keys = [key for key in generation if key.endswith('_token_id') or key in _ID_LISTS]
  return [(key, i) for key in keys for i in _flat(generation[key])]


def _flat(value: Any) -> Iterable[int]:
  if isinstance(value, list):
    return [i for one in value for i in _flat(one)]
  return [value] if type(value) is int and value >= 0 else []


def _mapped(value: Any, new: Mapping[int, int]) -> Any:
  """Ids in lists of any depth, mapped; those that have no token are left out of lists."""
  if isinstance(value, list):
    known = [one for one in value if not (type(one) is int and one >= 0 and one not in new)]
    return [_mapped(one, new) for one in known]
  return new.get(value) if type(value) is int and value >= 0 else value


def _check(old: Tokenizer, result: Tokenizer, kept: Sequence[int]) -> None:
  """Raises ValueError if a token did not get its id, as where the library orders them itself."""
  for i, before in enumerate(kept):
    token = old.codec.token_of(before)
    if token is not None and result.codec.id_of(token) != i:
      raise ValueError(
        f'the token {token!r} should have the id {i}, but gets {result.codec.id_of(token)}; '
        'this order of tokens cannot be written'
      )
