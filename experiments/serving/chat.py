"""`/v1/chat/completions`: answers a conversation."""

import asyncio
import json
from collections.abc import Callable

from experiments.serving import settings as common
from experiments.serving.body import Fields, shown
from experiments.serving.call import Call, Form
from experiments.serving.choice import Choice, Piece, Scored
from experiments.serving.errors import invalid
from experiments.serving.grammars import grammar
from experiments.serving.served import Served
from experiments.serving.tools.asked import Tools, tools
from experiments.serving.tools.calls import ToolCall
from experiments.serving.words import Words

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
KEPT = ('name', 'tool_call_id', 'reasoning', 'reasoning_content')
MOST_MESSAGES = 2000
# Fields that would change the answer, with what changes nothing.
REFUSED = {
  'audio': (),
  'chat_template': (),
  'continue_final_message': (False,),
  'documents': ([],),
  'echo': (False,),
  'function_call': ('none',),
  'functions': ([],),
  'modalities': (['text'],),
  'prediction': (),
  'web_search_options': (),
}
# What a template gets from elsewhere.
RESERVED = ('messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token')


async def prepare(fields: Fields, served: Served) -> Call:
  """Reads a call. Raises ApiError where something is wrong."""
  model, adapter = served.model(fields)
  own = common.settings(fields, adapter, served)
  for field, neutral in REFUSED.items():
    fields.only(field, *neutral)
  scored = fields.flag('logprobs')
  top = common.logprobs_within(fields, 'top_logprobs')
  if top is not None and not scored:
    raise invalid('top_logprobs', 'top_logprobs needs "logprobs": true')
  most = common.limit(fields, ['max_completion_tokens', 'max_tokens'], None, 1)
  asked = tools(fields, served.tool_format)
  prompt = await asyncio.to_thread(_prompt, fields, served, asked)
  served.check_tokens([prompt])
  limit = common.new_tokens(prompt, most, served.capacity, 1)
  rules = await grammar(fields, served, asked.schema)
  requests = own.requests([prompt], [limit], rules, logprobs=(top or 0) if scored else None)
  text = lambda request: own.text(served.tokenizer, request.prompt, special=asked.marked)
  choices = [
    Choice(i, r, served.tokenizer, text(r), tools=asked.stream()) for i, r in enumerate(requests)
  ]
  form = form_of(served.words, scored=scored, new_id=asked.new_id)
  return Call(model=model, settings=own, choices=tuple(choices), form=form)


def _prompt(fields: Fields, served: Served, asked: Tools) -> list[int]:
  messages, variables = _messages(fields), _variables(fields) | asked.variables
  if not served.chats:
    raise invalid('messages', 'this model has no chat template; continue a text at /v1/completions')
  generation = fields.flag('add_generation_prompt', True)
  try:
    text = served.tokenizer.apply_chat_template(messages, generation, **variables)
  except ValueError as error:
    raise invalid('messages', str(error)) from None
  served.check_text(fields.checked('messages', text))
  prompt = served.tokenizer.encode(text)
  if not prompt:
    raise invalid('messages', 'the chat template makes an empty prompt of these messages')
  return prompt


def _messages(fields: Fields) -> list[dict]:
  messages = fields.list('messages')
  if not messages or len(messages) > MOST_MESSAGES:
    raise fields.wrong('messages', f'a list of 1 to {MOST_MESSAGES} messages')
  found = []
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      raise invalid('messages', f'messages[{i}] must be an object, not {shown(message)}')
    found.append(_message(Fields(message, f'messages[{i}].')))
  return found


def _message(fields: Fields) -> dict:
  role = fields.text('role')
  if role not in ROLES:
    raise fields.wrong('role', f'one of {", ".join(ROLES)}')
  message = {'role': 'system' if role == 'developer' else role, 'content': _content(fields)}
  calls = fields.list('tool_calls')
  if calls:
    message['tool_calls'] = [_tool_call(fields, call) for call in calls]
  elif message['content'] is None:
    raise fields.wrong('content', 'a text or a list of parts')
  return message | {key: fields.text(key) for key in KEPT if fields.has(key)}


def _content(fields: Fields) -> str | None:
  content = fields.values.get('content')
  if not isinstance(content, list):
    return fields.text('content')
  texts = []
  for part in content:
    if not isinstance(part, dict) or part.get('type') != 'text':
      raise fields.wrong('content', 'a text or parts of the type text; this model reads text alone')
    if not isinstance(part.get('text'), str):
      raise fields.wrong('content', 'parts of the type text, each with its text')
    texts.append(fields.checked('content', part['text']))
  return '\n'.join(texts)


def _tool_call(fields: Fields, call) -> dict:
  function = call.get('function') if isinstance(call, dict) else None
  if not isinstance(function, dict) or not isinstance(function.get('name'), str):
    raise fields.wrong('tool_calls', 'a list of calls of functions, each with a name')
  arguments = function.get('arguments', {})
  if isinstance(arguments, str):  # templates write arguments as JSON themselves
    try:
      arguments = json.loads(arguments or '{}')
    except (ValueError, RecursionError):
      raise fields.wrong('tool_calls', 'calls whose arguments are JSON') from None
  return {**call, 'type': 'function', 'function': {**function, 'arguments': arguments}}


def _variables(fields: Fields) -> dict:
  extra = fields.inner('chat_template_kwargs')
  values = {} if extra is None else dict(extra.values)
  for name in RESERVED:
    if name in values:
      raise extra.wrong(name, 'left out: it has its own place')
  if fields.has('reasoning_effort'):
    values['reasoning_effort'] = fields.text('reasoning_effort')
  return values


def form_of(words: Words, *, scored: bool, new_id: Callable[[], str]) -> Form:
  """The form of chats; `scored`: with log-probabilities. `new_id` names a call of a tool."""

  def entry(choice: Choice, what: dict, piece: Piece) -> dict:
    content = [_logprob(words, score) for score in piece.scored]
    logprobs = {'content': content, 'refusal': None} if scored else None
    finish = 'tool_calls' if piece.finish == 'stop' and choice.called else piece.finish
    ends = {'finish_reason': finish, 'stop_reason': piece.stop}
    return {'index': choice.index, **what, 'logprobs': logprobs, **ends}

  def message(piece: Piece) -> dict:
    content = piece.text or (None if piece.calls else '')
    calls = {'tool_calls': [_tool(new_id, call) for call in piece.calls]} if piece.calls else {}
    return {'message': {'role': 'assistant', 'content': content, 'refusal': None} | calls}

  def delta(piece: Piece) -> dict:
    numbered = enumerate(piece.calls, piece.called)
    calls = [{'index': i, **_tool(new_id, call)} for i, call in numbered]
    content = {'content': piece.text} if piece.text else {}
    return {'delta': content | ({'tool_calls': calls} if calls else {})}

  opening = {'delta': {'role': 'assistant', 'content': ''}}
  return Form(
    prefix='chatcmpl',
    whole_object='chat.completion',
    part_object='chat.completion.chunk',
    opening=lambda choice: entry(choice, opening, Piece()),
    part=lambda choice, piece: entry(choice, delta(piece), piece),
    whole=lambda choice, piece: entry(choice, message(piece), piece),
  )


def _tool(new_id: Callable[[], str], call: ToolCall) -> dict:
  function = {'name': call.name, 'arguments': call.arguments}
  return {'id': new_id(), 'type': 'function', 'function': function}


def _logprob(words: Words, score: Scored) -> dict:
  one = lambda token, logprob: {
    'token': words.text(token),
    'logprob': logprob,
    'bytes': words.bytes(token),
  }
  top = [one(token, logprob) for token, logprob in score.likeliest]
  return one(score.token, score.logprob) | {'top_logprobs': top}
