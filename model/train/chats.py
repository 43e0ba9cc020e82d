"""Conversations as training data: JSON lines, rendered by the model's own chat template.

  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

The model learns the assistant's tokens alone. Where the template marks them by `{% generation %}`
blocks, these decide, as in transformers. Otherwise a turn of the assistant is what the template
adds when the turn is appended: the text of the messages up to it, less the text of those before it
with the prompt for a reply. The token that ends the turn is part of it; white space after that
token is not, because generation stops before it. Templates that render earlier turns differently
when later ones follow have no such difference, and are refused.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model import chat_template, corpus
from model.chat_template import Span
from model.tokenizer import Tokenizer
from model.train import data

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
ASSISTANT = 'assistant'
Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Chat:
  """A conversation, and where it was read, for people."""

  messages: tuple[Mapping[str, Any], ...]
  where: str

  @property
  def content(self) -> str:
    """The messages as canonical JSON: equal for equal conversations."""
    return json.dumps(self.messages, sort_keys=True, ensure_ascii=False)


def load(path: str | pathlib.Path) -> list[Chat]:
  """Reads a conversation from each line of a file; other keys than "messages" are ignored.

  The file may be compressed by gzip, with .gz after its name, and begin with a byte-order mark.

  Raises:
    ValueError: the file is missing, damaged or empty, or a line is not a conversation with at least
      one message of the assistant. The message says which line, and why.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'{path}: no such file')
  lines = corpus.json_lines(corpus.read_text(path), path)
  chats = [Chat(_messages(record, where), where) for where, record in lines]
  if not chats:
    raise ValueError(f'{path}: the file holds no conversations')
  return chats


def holds_chats(path: str | pathlib.Path) -> bool:
  """Whether the first line of a JSON-lines file is an object with the key "messages"."""
  path = pathlib.Path(path)
  if not (path.is_file() and path.name.lower().removesuffix('.gz').endswith('.jsonl')):
    return False
  _, first = next(corpus.json_lines(corpus.read_text(path), path), (None, None))
  return isinstance(first, dict) and 'messages' in first


def dataset(chats: Sequence[Chat], tokenizer: Tokenizer, **settings) -> data.PackedDataset:
  """Tokenizes conversations and packs each whole; see `PackedDataset.from_whole`.

  `settings` are `seq_len`, `batch_size` and `seed`. Raises ValueError as `encode` does.
  """
  return data.PackedDataset.from_whole([encode(chat, tokenizer) for chat in chats], **settings)


def encode(chat: Chat, tokenizer: Tokenizer) -> data.Document:
  """Renders and tokenizes a conversation, with the assistant's tokens marked as trained.

  A token that shares a character with the assistant's text is the assistant's.

  Raises:
    ValueError: the tokenizer has no chat template, or the template refuses the messages, or its
      text does not show which part is the assistant's.
  """
  try:
    text, spans = assistant_spans(tokenizer, chat.messages)
  except ValueError as error:
    raise ValueError(f'{chat.where}: {error}') from error
  ids, characters = tokenizer.encode_with_characters(text)
  trained = np.zeros(len(ids), bool)
  for start, stop in spans:
    trained |= (characters[:, 0] < stop) & (characters[:, 1] > start)
  return data.Document(np.asarray(ids, np.int32), trained)


def assistant_spans(tokenizer: Tokenizer, messages: Messages) -> tuple[str, list[Span]]:
  """Renders a conversation and finds the characters of the assistant's turns.

  Raises:
    ValueError: as `encode`.
  """
  template = tokenizer.chat_template
  if template is not None and chat_template.has_generation_blocks(template):
    return tokenizer.generation_spans(messages)
  text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
  spans = []
  for i, message in enumerate(messages):
    if message['role'] == ASSISTANT:
      start, stop = _turn(tokenizer, messages, i, text)
      spans.append((start, _without_space_after_end(tokenizer, text, start, stop)))
  return text, spans


def _turn(tokenizer: Tokenizer, messages: Messages, i: int, text: str) -> Span:
  """Where turn i is in the text of all messages."""
  if i == 0:
    raise ValueError('the conversation begins with the assistant; there is no prompt to reply to')
  before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
  after = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
  if not (after.startswith(before) and text.startswith(after)):
    raise ValueError(
      f'the chat template does not put message {i + 1} after an unchanged beginning, so the '
      "assistant's words cannot be told apart; use a template with {% generation %} blocks, or "
      'conversations of one turn'
    )
  return len(before), len(after)


def _without_space_after_end(tokenizer: Tokenizer, text: str, start: int, stop: int) -> int:
  """The end of a turn without the white space after a special token, if it ends in one."""
  stripped = text[start:stop].rstrip()
  ids = tokenizer.encode(stripped)
  ends = bool(ids) and ids[-1] in tokenizer.codec.added_ids()
  return start + len(stripped) if ends else stop


def _messages(record: Any, where: str) -> tuple[Mapping[str, Any], ...]:
  messages = record.get('messages') if isinstance(record, dict) else None
  if not isinstance(messages, list) or not messages:
    raise ValueError(f'{where}: expected an object with a list "messages" that is not empty')
  for number, message in enumerate(messages, 1):
    _check_message(message, f'{where}, message {number}')
  if all(message['role'] != ASSISTANT for message in messages):
    raise ValueError(f"{where}: no message is the assistant's, so there is nothing to learn")
  return tuple(messages)


def _check_message(message: Any, where: str) -> None:
  if not isinstance(message, dict):
    raise ValueError(f'{where}: expected an object with "role" and "content", not {message!r:.40}')
  role, content = message.get('role'), message.get('content')
  if role not in ROLES:
    raise ValueError(f'{where}: the role {role!r} is not one of {", ".join(ROLES)}')
  if not isinstance(content, str):
    raise ValueError(f'{where}: the content is {type(content).__name__}, not a string')
