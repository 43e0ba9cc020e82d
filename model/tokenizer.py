"""Tokenizers of pretrained models, read from Hugging Face folders, and a trainer for new ones.

`model.token_files` says which files hold a vocabulary and how they are read. `save` writes a
tokenizer's files back as they were, so nothing that Lissom does not read is lost.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from model import chat_template, hf_names, token_codecs, token_files
from model.config import ModelConfig

MODEL_FILES = (
  token_files.JSON,
  token_files.SENTENCEPIECE,
  token_files.VOCABULARY,
  token_files.MERGES,
)
GENERATION = 'generation_config.json'
SETTINGS_FILES = (
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  GENERATION,
  'chat_template.jinja',
)
WindowBos = Literal['auto', 'none', 'window']
WINDOW_BOS = get_args(WindowBos)
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
    """Reads the tokenizer of a folder; None if the folder has no vocabulary.

    Raises:
      ValueError: a file is corrupt, or the end or beginning token is not in the vocabulary.
    """
    folder = pathlib.Path(folder)
    files = {
      name: (folder / name).read_bytes()
      for name in (*MODEL_FILES, *SETTINGS_FILES)
      if (folder / name).is_file()
    }
    if not token_files.has_tokenizer(files):
      return None
    try:
      if (folder / 'config.json').is_file():
        config = token_files.read_json('config.json', (folder / 'config.json').read_bytes())
        files = _with_config(files, config)
      return cls.from_files(files)
    except ValueError as error:
      raise ValueError(f'{folder}: {error}') from error

  @classmethod
  def from_files(cls, files: Mapping[str, bytes]) -> 'Tokenizer':
    """Builds a tokenizer from the contents of its files."""
    codec = token_codecs.Codec(token_files.build(files))
    settings, generation = token_files.read_settings(files), _generation(files)
    bos = _token_ids(codec, settings, generation, 'bos')
    eos = _token_ids(codec, settings, {}, 'eos')
    eos += _as_ids(generation.get('eos_token_id'), 'eos_token_id')
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
    files = {'tokenizer.json': model, 'tokenizer_config.json': token_files.to_bytes(config)}
    return cls.from_files(files)

  @property
  def vocab_size(self) -> int:
    """One more than the highest id; a model may have more rows than that."""
    return self.codec.vocab_size

  def encode(self, text: str) -> list[int]:
    """Encodes `text` and adds nothing. Special tokens spelled out in it become their ids.

    This is for text that is cut or joined, and for what a chat template gives, which has its own
    special tokens.
    """
    return self.codec.encode(text)

  def prompt(self, text: str) -> list[int]:
    """Encodes a text that a model is to continue, with the special tokens that its files ask for.

    Those are a BOS in front, or none, for most models.
    """
    return [*self.codec.prefix, *self.codec.encode(text), *self.codec.suffix]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes many texts at once, on all cores where the library can."""
    return self.codec.encode_many(texts)

  def encode_with_characters(self, text: str) -> tuple[list[int], np.ndarray]:
    """Returns ids and, for each token, the characters of `text` that it covers: int64 [tokens, 2].

    The first column is where they begin, the second is past their end. Tokens that share a
    character all cover it.
    """
    ids, ends = self.codec.encode_with_ends(text)
    ends = np.maximum.accumulate(np.asarray(ends, np.int64))
    starts = np.minimum(np.append(np.int64(0), ends)[:-1], np.maximum(ends - 1, 0))
    return ids, np.stack([starts, ends], axis=1)

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

  def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that the tokens `new` add to that of `prompt`, without special tokens.

    Decoded alone, the first of them may lose the space that it begins with.
    """
    before = self.decode(prompt, skip_special=True)
    return self.decode([*prompt, *new], skip_special=True)[len(before) :]

  def apply_chat_template(
    self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables
  ) -> str:
    """Renders a conversation as the text of a prompt, for `encode`: it brings its own BOS.

    Raises:
      ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    values = {**self._template_values(add_generation_prompt), **variables}
    return chat_template.render(self.chat_template, messages, values)

  def generation_spans(
    self, messages: Sequence[Mapping[str, Any]]
  ) -> tuple[str, list[chat_template.Span]]:
    """Renders a conversation, and says where its template has the assistant's words.

    Raises:
      ValueError: as `apply_chat_template`; or the template does not say it.
    """
    values = self._template_values(add_generation_prompt=False)
    if not chat_template.has_generation_blocks(self.chat_template):
      raise ValueError('the chat template has no {% generation %} blocks')
    return chat_template.render_with_spans(self.chat_template, messages, values)

  def _template_values(self, add_generation_prompt: bool) -> dict[str, Any]:
    if self.chat_template is None:
      raise ValueError('this tokenizer has no chat template; encode plain text instead')
    known = {'tools': None, 'documents': None, 'add_generation_prompt': add_generation_prompt}
    return {**self._named_tokens, **known}

  @functools.cached_property
  def _named_tokens(self) -> dict[str, str]:
    """The texts of bos_token, eos_token and so on."""
    settings = token_files.read_settings(self.files)
    tokens = {k: token_files.content(v) for k, v in settings.items() if k.endswith('_token')}
    return {k: v for k, v in tokens.items() if isinstance(v, str)}

  @functools.cached_property
  def chat_template(self) -> str | None:
    """The Jinja template of a conversation, or None."""
    name = 'chat_template.jinja'
    try:
      if name in self.files:
        return self.files[name].decode()
      template = token_files.read_settings(self.files).get('chat_template')
      if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}.get('default')
    except (UnicodeDecodeError, TypeError, LookupError) as error:
      raise ValueError(f'the chat template is corrupt: {error!r}') from error
    if not isinstance(template, str | None):
      raise ValueError(f'a chat template is a text, not {type(template).__name__}')
    return template

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the tokenizer's files into `folder`; `load` and transformers read them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in self.files.items():
      (folder / name).write_bytes(data)


def check(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ValueError if text has tokens that a model of `vocab_size` rows does not.

  Added tokens may lie beyond the model's rows, as a pad token often does: no text has them unless
  it spells them out. The beginning and end of a text may not.
  """
  beyond = set(range(vocab_size, tokenizer.vocab_size)) - tokenizer.codec.added_ids()
  named = [i for i in (tokenizer.bos_id, *tokenizer.eos_ids) if i is not None and i >= vocab_size]
  highest = max([*beyond, *named], default=-1)
  if highest >= vocab_size:
    raise ValueError(
      f'the tokenizer has ids up to {highest}, but the model has a vocabulary of {vocab_size}; '
      f'they do not belong together'
    )


def window_bos(tokenizer: Tokenizer, config: ModelConfig, choice: WindowBos) -> int | None:
  """The id to put in front of each window of evaluation or calibration text; None for no token.

  'auto' is what the model's family needs, as far as the tokenizer has it. Raises ValueError if
  'window' is asked for and the tokenizer has no BOS.
  """
  if choice not in WINDOW_BOS:
    raise ValueError(f'bos should be one of {", ".join(WINDOW_BOS)}, not {choice!r}')
  if choice == 'window' and tokenizer.bos_id is None:
    raise ValueError('bos=window needs a BOS, but the tokenizer has none; use bos=none')
  needed = choice == 'auto' and hf_names.find(config.family).bos_in_windows
  return tokenizer.bos_id if needed or choice == 'window' else None


def _with_config(files: dict[str, bytes], config: dict[str, Any]) -> dict[str, bytes]:
  """Keeps what config.json says of the tokenizer, which may be saved without the model."""
  files = token_files.with_class(files, config)
  ids = _special_ids(config)
  if GENERATION not in files and ids:
    files[GENERATION] = token_files.to_bytes(ids)
  return files


def _generation(files: Mapping[str, bytes]) -> dict[str, Any]:
  data = files.get(GENERATION, b'')
  return token_files.read_json(GENERATION, data) if data.strip() else {}


def _special_ids(config: dict[str, Any]) -> dict[str, Any]:
  names = ('bos_token_id', 'eos_token_id', 'pad_token_id')
  return {name: config[name] for name in names if config.get(name) is not None}


def _as_ids(value: Any, name: str) -> list[int]:
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise ValueError(f'{name} should be an id or a list of ids, not {value!r}')
  return ids


def _token_ids(codec, settings, ids, kind: str) -> list[int]:
  name = f'{kind}_token'
  if name in settings:  # null says that there is none
    token = token_files.content(settings[name])
    return [codec.id_of(token)] if isinstance(token, str) else []
  return _as_ids(ids.get(f'{name}_id'), f'{name}_id')
