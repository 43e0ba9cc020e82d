"""Builds a `tokenizers.Tokenizer` from the files of a model's folder, as transformers 5 reads them.

The vocabulary comes from the first of these that is there:

  tokenizer.json           everything, as it stands (for a LlamaTokenizer, transformers 5 puts what
                           `legacy` says in the place of the file's own pre-tokenizer)
  tokenizer.model          sentencepiece (`model.sentencepiece_model`)
  vocab.json, merges.txt   byte-level BPE, split like GPT-2, GPT-NeoX or Qwen2

`tokenizer_config.json` and `config.json` name the class, which decides between the variants of the
last two. Special and added tokens that only the JSON files beside the vocabulary name are added to
it. What is put around a prompt (BOS, EOS) is what the post-processor of `tokenizer.json` says;
`add_bos_token` and `add_eos_token` count where there is no `tokenizer.json`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from model import sentencepiece_model

JSON, SENTENCEPIECE, VOCABULARY, MERGES = (
  'tokenizer.json',
  'tokenizer.model',
  'vocab.json',
  'merges.txt',
)
CONFIG = 'tokenizer_config.json'
LISTS = ('additional_special_tokens', 'extra_special_tokens')
GENERIC = 'PreTrainedTokenizerFast'
# The class that transformers takes for a family where the folder names none; for some families it
# takes this one whatever the folder says.
CLASS_OF_FAMILY = {
  'gemma': 'GemmaTokenizer',
  'gemma2': 'GemmaTokenizer',
  'gpt2': 'GPT2Tokenizer',
  'gpt_neox': 'GPTNeoXTokenizer',
  'qwen2': 'Qwen2Tokenizer',
  'qwen3': 'Qwen2Tokenizer',
}
FIXED_CLASS = {'qwen2': 'Qwen2Tokenizer', 'phi3': GENERIC, 'mistral': GENERIC}
STYLES = {'LlamaTokenizer': 'llama', 'GemmaTokenizer': 'gemma'}
_END = '<|endoftext|>'
_LLAMA = {'unk_token': '<unk>', 'bos_token': '<s>', 'eos_token': '</s>'}
_GEMMA = {'unk_token': '<unk>', 'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>'}
_GPT2 = {'unk_token': _END, 'bos_token': _END, 'eos_token': _END}
# The special tokens of a class where the folder names none.
DEFAULTS = {
  'LlamaTokenizer': _LLAMA,
  'GemmaTokenizer': _GEMMA,
  'GPT2Tokenizer': _GPT2,
  'GPTNeoXTokenizer': _GPT2,
  'Qwen2Tokenizer': {'unk_token': _END, 'eos_token': _END, 'pad_token': _END},
}
# Of the tokenizer.json files that Qwen publishes.
QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def has_tokenizer(files: Iterable[str]) -> bool:
  """Whether files of these names hold a vocabulary."""
  names = set(files)
  return JSON in names or SENTENCEPIECE in names or {VOCABULARY, MERGES} <= names


def build(files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
  """Builds the tokenizer, with all added tokens and a post-processor for the prompt's ends.

  Raises ValueError naming the file that is damaged, or the token that has no place.
  """
  settings = read_settings(files)
  if JSON in files:
    tokenizer = _from_json(files[JSON])
  elif SENTENCEPIECE in files:
    tokenizer = _from_sentencepiece(files, settings)
  else:
    tokenizer = _from_merges(files, settings)
  _add_tokens(tokenizer, files, settings)
  if JSON not in files:
    tokenizer.post_processor = _ends(tokenizer, settings)
  return tokenizer


def read_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
  """What the JSON files beside the vocabulary say; tokenizer_config.json is newer and wins.

  Where there is no tokenizer.json, the defaults of the tokenizer's class come first, as far as the
  vocabulary has their tokens.
  """
  names = ('special_tokens_map.json', CONFIG)
  old, new = (read_json(name, files.get(name)) for name in names)
  return {**_defaults(files, {**old, **new}), **old, **new}


def read_json(name: str, data: bytes | None) -> dict[str, Any]:
  """The object in a JSON file; an absent file is an empty object.

  Raises ValueError naming the file if it holds anything else.
  """
  if data is None:
    return {}
  try:
    value = json.loads(data)
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'{name} is corrupt: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{name} should hold an object, not {type(value).__name__}')
  return value


def content(token: Any) -> Any:
  """The text of a token, which JSON files write as a string or as an object."""
  return token.get('content') if isinstance(token, dict) else token


def with_class(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
  """The files with the tokenizer's class in `CONFIG` where only config.json tells it.

  So a tokenizer that is saved without its model is read the same way again.
  """
  if JSON in files:
    return dict(files)
  settings = read_json(CONFIG, files.get(CONFIG))
  family = config.get('model_type')
  named = settings.get('tokenizer_class') or config.get('tokenizer_class')
  chosen = FIXED_CLASS.get(family) or named or CLASS_OF_FAMILY.get(family)
  if chosen is None or chosen == settings.get('tokenizer_class'):
    return dict(files)
  return {**files, CONFIG: to_bytes({**settings, 'tokenizer_class': chosen})}


def to_bytes(value: dict[str, Any]) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()


def _class(settings) -> str:
  return str(settings.get('tokenizer_class') or GENERIC).removesuffix('Fast')


def _defaults(files, settings) -> dict[str, str]:
  if JSON in files:
    return {}
  if SENTENCEPIECE in files:
    model = sentencepiece_model.read(files[SENTENCEPIECE])
    defaults = DEFAULTS.get(_class(settings))
    if defaults is None:
      defaults = {f'{kind}_token': name for kind, name in model.names.items()}
    known = {piece.text for piece in model.pieces}
  else:
    defaults = DEFAULTS.get(_class(settings), _GPT2)
    known = read_json(VOCABULARY, files[VOCABULARY])
  return {key: token for key, token in defaults.items() if token in known}


def _from_json(data: bytes) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(data.decode())
  except Exception as error:  # the library raises nothing more specific
    raise ValueError(f'{JSON} is corrupt: {error}') from error


def _from_sentencepiece(files, settings) -> tokenizers.Tokenizer:
  prefix_space = settings.get('add_prefix_space')
  return sentencepiece_model.build(
    sentencepiece_model.read(files[SENTENCEPIECE]),
    STYLES.get(_class(settings), 'generic'),
    legacy=settings.get('legacy'),
    prefix_space=True if prefix_space is None else bool(prefix_space),
    renamed={i: content(token) for i, token in _declared(files, settings).items()},
  )


def _from_merges(files, settings) -> tokenizers.Tokenizer:
  vocabulary = read_json(VOCABULARY, files[VOCABULARY])
  try:
    lines = files[MERGES].decode().split('\n')
    merges = [tuple(line.split()) for line in lines if line.strip() and line[:8] != '#version']
    bpe = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False)
  except Exception as error:  # the library raises nothing more specific
    raise ValueError(f'{VOCABULARY} or {MERGES} is corrupt: {error}') from error
  tokenizer = tokenizers.Tokenizer(bpe)
  spaced = bool(settings.get('add_prefix_space'))
  kind = _class(settings)
  if kind == 'Qwen2Tokenizer':
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), 'isolated')
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
  if kind in ('Qwen2Tokenizer', 'GPTNeoXTokenizer'):
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _add_tokens(tokenizer, files, settings) -> None:
  """Adds the tokens that JSON files name and the vocabulary does not treat as added tokens."""
  special, declared = _special(settings), _declared(files, settings)
  # Under a prefix space, sentencepiece looks for added tokens in the text as it was written.
  raw = SENTENCEPIECE in files and JSON not in files and _class(settings) not in STYLES
  known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  for i, token in sorted(declared.items()):
    if content(token) not in known:
      _add(tokenizer, _added(token, special, raw), i)
  for kind in ('bos_token', 'eos_token'):
    text = content(settings.get(kind))
    if isinstance(text, str) and tokenizer.token_to_id(text) is None:
      raise ValueError(f'{kind} {text!r} is not in the vocabulary')
  known |= {content(token) for token in declared.values()}
  tokenizer.add_tokens(
    [_added(t, special, raw) for text, t in special.items() if text not in known]
  )


def _add(tokenizer, token: tokenizers.AddedToken, i: int) -> None:
  """Adds a token with the id `i`; a gap before it is filled with stand-ins."""
  text = token.content
  if tokenizer.token_to_id(text) is None:
    first = tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.add_tokens([f'<|no token {n}|>' for n in range(first, i)])
  tokenizer.add_tokens([token])
  if tokenizer.token_to_id(text) != i:
    raise ValueError(
      f'the added token {text!r} should have the id {i}, but the vocabulary gives it '
      f'{tokenizer.token_to_id(text)}; the files belong to different tokenizers'
    )


def _added(token, special, raw: bool) -> tokenizers.AddedToken:
  flags = {key: token[key] for key in _FLAGS if key in token} if isinstance(token, dict) else {}
  flags['special'] = bool(flags.get('special') or content(token) in special)
  flags |= {'normalized': False} if raw else {}
  return tokenizers.AddedToken(content(token), **flags)


_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


def _declared(files, settings) -> dict[int, Any]:
  """Added tokens by id, from tokenizer_config.json and from the older added_tokens.json."""
  name = 'added_tokens.json'
  try:
    found = {int(i): token for token, i in read_json(name, files.get(name)).items()}
    decoder = settings.get('added_tokens_decoder') or {}
    found |= {int(i): token for i, token in decoder.items()}
  except (TypeError, ValueError, AttributeError) as error:
    raise ValueError(f'added tokens should have ids: {error}') from error
  bad = [token for token in found.values() if not isinstance(content(token), str)]
  if bad:
    raise ValueError(f'an added token should be a text, not {bad[0]!r}')
  return found


def _special(settings) -> dict[str, Any]:
  """Special tokens by their text, named ones first."""
  named = [value for key, value in settings.items() if key.endswith('_token')]
  for key in LISTS:
    more = settings.get(key) or []
    if not isinstance(more, list | dict):
      raise ValueError(f'{key} should be a list of tokens, not {more!r}')
    named += list(more.values()) if isinstance(more, dict) else more
  return {content(token): token for token in named if isinstance(content(token), str)}


def _ends(tokenizer, settings):
  """The post-processor that puts BOS and EOS around a text where the settings ask for them."""
  template, ids = ['$A'], []
  for kind, at in (('bos', 0), ('eos', 2)):
    token = content(settings.get(f'{kind}_token'))
    if settings.get(f'add_{kind}_token') and token and tokenizer.token_to_id(token) is not None:
      template.insert(at, token)
      ids.append((token, tokenizer.token_to_id(token)))
  return processors.TemplateProcessing(single=template, pair=None, special_tokens=ids)
