"""Tokenizers of pretrained models, read from Hugging Face folders, and a trainer for new ones.

A folder is read for `tokenizer.json` (the tokenizers library) or else `tokenizer.model`
(sentencepiece), and for the small JSON files around it that name the special tokens and the chat
template. `save` writes those files back as they were, so nothing that Lissom does not read is lost.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from model import chat_template, token_codecs

MODEL_FILES = ('tokenizer.json', 'tokenizer.model')
SETTINGS_FILES = (
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'generation_config.json',
  'chat_template.jinja',
)
END_OF_TEXT = '<|endoftext|>'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """Text to token ids and back; `files` are its files by name, as they were read.

  `bos_id` is None where the model has no token for the beginning of a text. `eos_ids` are all that
  end a text or a turn, the tokenizer's own first.
  """

  files: Mapping[str, bytes] = dataclasses.field(repr=False)
  codec: token_codecs.Codec = dataclasses.field(repr=False, compare=False)
  bos_id: int | None
  eos_ids: tuple[int, ...]

  @classmethod
  def load(cls, folder: str | pathlib.Path) -> 'Tokenizer | None':
    """Reads the tokenizer of a folder; None if it has neither of `MODEL_FILES`.

    Raises:
      ValueError: a file is corrupt, a named special token is not in the vocabulary, or
        sentencepiece is needed and not installed.
    """
    folder = pathlib.Path(folder)
    files = {
      name: (folder / name).read_bytes()
      for name in (*MODEL_FILES, *SETTINGS_FILES)
      if (folder / name).is_file()
    }
    if not any(name in files for name in MODEL_FILES):
      return None
    config = folder / 'config.json'
    if 'generation_config.json' not in files and config.is_file():
      # Kept in the file's stead, so that a tokenizer saved without its model still knows them.
      ids = _special_ids(_read_json('config.json', config.read_bytes()))
      files |= {'generation_config.json': _to_bytes(ids)} if ids else {}
    try:
      return cls.from_files(files)
    except ValueError as error:
      raise ValueError(f'{folder}: {error}') from error

  @classmethod
  def from_files(cls, files: Mapping[str, bytes]) -> 'Tokenizer':
    """Builds a tokenizer from the contents of its files."""
    settings = _settings(files)
    if 'tokenizer.json' in files:
      codec = token_codecs.TokenizersCodec(files['tokenizer.json'])
    else:
      codec = token_codecs.SentencePieceCodec(files['tokenizer.model'], _added_tokens(files))
    ids = _special_ids(_read_json('generation_config.json', files.get('generation_config.json')))
    bos = _token_ids(codec, settings, ids, 'bos')
    eos = _token_ids(codec, settings, {}, 'eos') + _as_ids(ids.get('eos_token_id'), 'eos_token_id')
    return cls(
      files=dict(files),
      codec=codec,
      bos_id=bos[0] if bos else None,
      eos_ids=tuple(dict.fromkeys(eos)),
    )

  @classmethod
  def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> 'Tokenizer':
    """Trains lossless byte-level BPE with `END_OF_TEXT` as token 0, both bos and eos.

    The same texts give the same tokenizer. Read `vocab_size` off the result: short texts give less.
    """
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'bos_token': END_OF_TEXT,
      'eos_token': END_OF_TEXT,
      'clean_up_tokenization_spaces': False,
    }
    model = token_codecs.train_byte_bpe(texts, vocab_size, [END_OF_TEXT])
    files = {'tokenizer.json': model, 'tokenizer_config.json': _to_bytes(config)}
    return cls.from_files(files)

  @property
  def vocab_size(self) -> int:
    """One more than the highest id; a model may have more rows than that."""
    return self.codec.vocab_size

  def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
    """Encodes `text`. Special tokens that are spelled out in it become their ids."""
    ids = self.codec.encode(text)
    return [*self._required(add_bos, 'bos'), *ids, *self._required(add_eos, 'eos')]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes many texts at once, on all cores where the library can."""
    return self.codec.encode_many(texts)

  def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids (int32) and, for each token, the UTF-8 bytes of `text` up to its end (int64).

    The ends never decrease. Where a character is split over several tokens, all of its bytes are
    counted at one of them.
    """
    ids, char_ends = self.codec.encode_with_ends(text)
    return np.asarray(ids, np.int32), token_codecs.byte_ends(text, char_ends)

  def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Decodes ids; bytes that are not UTF-8 become replacement characters."""
    return self.codec.decode([int(i) for i in ids], skip_special)

  def apply_chat_template(
    self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables
  ) -> str:
    """Renders a conversation as the text of a prompt; encode it without adding a BOS.

    Raises:
      ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if self.chat_template is None:
      raise ValueError('this tokenizer has no chat template; encode plain text instead')
    settings = _settings(self.files)
    tokens = {k: _content(v) for k, v in settings.items() if k.endswith('_token') and v}
    known = {'tools': None, 'documents': None, 'add_generation_prompt': add_generation_prompt}
    tokens = {k: v for k, v in tokens.items() if isinstance(v, str)}
    return chat_template.render(self.chat_template, messages, {**tokens, **known, **variables})

  @functools.cached_property
  def chat_template(self) -> str | None:
    """The Jinja template of a conversation, or None."""
    if 'chat_template.jinja' in self.files:
      return self.files['chat_template.jinja'].decode()
    template = _settings(self.files).get('chat_template')
    if isinstance(template, list):
      template = {entry['name']: entry['template'] for entry in template}.get('default')
    return template

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the tokenizer's files into `folder`; `load` and transformers read them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in self.files.items():
      (folder / name).write_bytes(data)

  def _required(self, wanted: bool, kind: str) -> list[int]:
    if not wanted:
      return []
    ids = self.eos_ids[:1] if kind == 'eos' else [self.bos_id]
    if not ids or ids[0] is None:
      raise ValueError(f'add_{kind}: this tokenizer has no {kind} token')
    return [ids[0]]


def check(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ValueError if the tokenizer has ids that a model of `vocab_size` rows does not."""
  highest = max(tokenizer.vocab_size - 1, *tokenizer.eos_ids, tokenizer.bos_id or 0, 0)
  if highest >= vocab_size:
    raise ValueError(
      f'the tokenizer has ids up to {highest}, but the model has a vocabulary of {vocab_size}; '
      f'they do not belong together'
    )


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
  # tokenizer_config.json is the newer file and wins.
  names = ('special_tokens_map.json', 'tokenizer_config.json')
  parts = [_read_json(name, files.get(name)) for name in names]
  return {**parts[0], **parts[1]}


def _read_json(name: str, data: bytes | None) -> dict[str, Any]:
  if data is None:
    return {}
  try:
    value = json.loads(data)
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'{name} is corrupt: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{name} should hold an object, not {type(value).__name__}')
  return value


def _to_bytes(value: dict[str, Any]) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()


def _content(token: Any) -> Any:
  return token.get('content') if isinstance(token, dict) else token


def _added_tokens(files: Mapping[str, bytes]) -> dict[str, int]:
  added = dict(_read_json('added_tokens.json', files.get('added_tokens.json')))
  decoder = _settings(files).get('added_tokens_decoder') or {}
  return added | {_content(token): int(i) for i, token in decoder.items()}


def _special_ids(config: dict[str, Any]) -> dict[str, Any]:
  names = ('bos_token_id', 'eos_token_id')
  return {name: config[name] for name in names if config.get(name) is not None}


def _as_ids(value: Any, name: str) -> list[int]:
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise ValueError(f'{name} should be an id or a list of ids, not {value!r}')
  return ids


def _token_ids(codec, settings, ids, kind: str) -> list[int]:
  name = f'{kind}_token'
  if name in settings:  # null says that there is none
    token = _content(settings[name])
    if token is None:
      return []
    i = codec.id_of(token) if isinstance(token, str) else None
    if i is None:
      raise ValueError(f'{name} {token!r} is not in the vocabulary')
    return [i]
  if f'{name}_id' in ids:
    return _as_ids(ids[f'{name}_id'], f'{name}_id')
  default = codec.default_bos_id if kind == 'bos' else codec.default_eos_id
  return [] if default is None else [default]
