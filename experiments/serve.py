r"""Serves a model, compressed or not, to many clients at once by OpenAI's API, with a chat page.

  python -m experiments.serve --model=DIR
  python -m experiments.serve --model=out/compress/models/int8 --kv_cache=int8 --slots=32
  LISSOM_API_KEY=... python -m experiments.serve --model=DIR --host=0.0.0.0 --port=8080

The line that it prints has the address: the chat page is there, the API at /v1 (models,
completions, chat/completions), /health and Prometheus' /metrics beside it. It listens to this
machine alone unless --host says otherwise. The variable LISSOM_API_KEY has the key that clients
must send; without it, anybody who reaches the address may ask. SIGTERM and Ctrl-C let the answers
end that have begun; a second one ends at once. docs/serving.md has more.

Device: any. Minutes: none; starting takes as long as loading and compiling the model.
"""

import asyncio
import json
import math
import os
import sys
import threading
import urllib.request

from absl import flags

from experiments import base as embedded
from experiments import common
from experiments.serving.limits import Access, Limits
from experiments.serving.tools import formats
from model import peft, sharding
from model.infer.cascade import Cascade
from model.infer.engine import Engine
from model.infer.speculation import Speculation
from model.infer.worker import Worker
from model.transformer import Transformer

KEY = 'LISSOM_API_KEY'
CONTEXT = 4096  # tokens of a context, unless the model has learned fewer
LOOPBACK = ('127.0.0.1', 'localhost', '::1')

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file.')
NAME = flags.DEFINE_string('name', None, "The model's name in requests; default: as in --model.")
HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at; 0.0.0.0 is every one.')
PORT = flags.DEFINE_integer('port', 8000, 'Port to listen at; 0 takes a free one.', 0, 65535)
SLOTS = flags.DEFINE_integer('slots', 8, 'Requests that run at once.', lower_bound=1)
CAPACITY = flags.DEFINE_integer(
  'capacity',
  None,
  f'Tokens of a prompt with its continuation; default: as the model has learned, up to {CONTEXT}.',
  lower_bound=2,
)
PREFIXES = flags.DEFINE_float(
  'prefix_megabytes', None, 'Memory for beginnings that prompts share; default: of two slots.', 0.0
)
QUEUE = flags.DEFINE_integer('max_queue', Limits.queue, 'Requests that may wait for a slot.', 0)
BODY = flags.DEFINE_float(
  'max_body_megabytes', Limits.body_bytes / 2**20, 'The longest body of a request.', 2**-10
)
SECONDS = flags.DEFINE_float('max_seconds', Limits.seconds, 'The longest time of an answer.', 1.0)
ADAPTERS = flags.DEFINE_multi_string(
  'adapter',
  [],
  'NAME=DIR of an adapter in the format of PEFT, a model name of its own; repeatable.',
)
DRAFT = flags.DEFINE_string('draft', None, 'A smaller model of the same tokens that drafts.')
DRAFTED = flags.DEFINE_integer(
  'draft_tokens', None, 'Tokens to draft at a time, by --draft or from the text so far.', 1, 7
)
CASCADE = flags.DEFINE_string(
  'cascade', None, 'A smaller model of the same tokens that answers NAME-cascade where it is sure.'
)
THRESHOLD = flags.DEFINE_float(
  'cascade_threshold',
  -0.5,
  'The mean log-probability of an answer from which it is sure; experiments.cascade finds one.',
)
TOOL_CALLS = flags.DEFINE_enum(
  'tool_calls',
  formats.AUTO,
  list(formats.NAMES),
  'How the model writes calls of tools; auto: by its chat template; none: they stay text.',
)
WARM = flags.DEFINE_bool('warm', True, 'Compile all programs before the first request.')
DTYPE = common.define_dtype()
SMOKE = flags.DEFINE_bool('smoke', False, 'Ask the tiny base model one thing, and end.')
KV_CACHE = common.define_kv_cache('float', 'How keys and values of past tokens are kept.')
MESH = common.define_mesh()
PLUGINS = common.define_plugins()


def main() -> None:
  common.need_extra('serve')
  from experiments.serving import server
  from experiments.serving.app import State, build
  from experiments.serving.served import Served
  from model.infer.grammar import Vocabulary

  common.load_plugins(PLUGINS.value)
  access, limits = _access(), _limits()
  bound = server.listen(HOST.value, 0 if SMOKE.value else PORT.value)
  with bound:
    model, tokenizer, name = _inputs()
    adapters = _adapters(model)
    engine, names = _engine(model, adapters, _speculation()), list(adapters)
    if CASCADE.value is not None:
      names.append(f'{name}-cascade')
      engine = _cascade(engine, names[-1])
    eos_ids = tuple(dict.fromkeys((*model.config.eos_ids, *tokenizer.eos_ids)))
    served = Served(
      name=name,
      tokenizer=tokenizer,
      vocabulary=Vocabulary(tokenizer, model.config.vocab_size, eos_ids),
      capacity=engine.capacity,
      adapters=tuple(names),
      limits=limits,
      tool_format=formats.pick(TOOL_CALLS.value, tokenizer.chat_template),
    )
    state, worker = State(), Worker(engine, most=engine.slots + limits.queue)
    app = build(served, worker, state, access)
    url = server.url(HOST.value, bound)
    on_start = lambda drain: _started(served, url, access, drain)
    asyncio.run(server.serve(app, state, bound, on_start))
  if worker.error is not None:
    raise ValueError(f'the engine failed: {worker.error}')


def _access() -> Access:
  key = os.environ.get(KEY)
  if key is not None or HOST.value not in LOOPBACK:
    return Access(key=key)
  return Access(hosts=frozenset({*LOOPBACK, '[::1]'}))


def _limits() -> Limits:
  if not math.isfinite(BODY.value):
    raise ValueError(f'--max_body_megabytes must be a number, not {BODY.value}')
  body_bytes = int(BODY.value * 2**20)
  return Limits(body_bytes=body_bytes, queue=QUEUE.value, seconds=SECONDS.value)


def _inputs():
  if SMOKE.value and MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    return trained.model, trained.tokenizer, NAME.value or 'smoke'
  if MODEL.value is None:
    raise ValueError('serve needs --model (or --smoke)')
  model, tokenizer = common.load_model(MODEL.value, common.dtype(DTYPE))
  mesh = common.mesh(MESH)
  if mesh.size > 1:
    sharding.shard(model, mesh)
  return model, tokenizer, NAME.value or MODEL.value.rstrip('/')


def _adapters(model) -> dict[str, Transformer]:
  found = {}
  for text in ADAPTERS.value:
    name, equals, folder = text.partition('=')
    if not (name and equals and folder) or name in found:
      raise ValueError(f'--adapter must be NAME=DIR with a name of its own, not {text!r}')
    found[name], _ = peft.load(folder, model)
  return found


def _speculation() -> Speculation | None:
  if DRAFT.value is None and DRAFTED.value is None:
    return None
  draft = None if DRAFT.value is None else common.load_model(DRAFT.value, common.dtype(DTYPE))[0]
  return Speculation(draft=draft, tokens=DRAFTED.value or Speculation.tokens)


def _engine(model, adapters, speculation) -> Engine:
  capacity = CAPACITY.value or min(CONTEXT, model.config.max_positions)
  engine = Engine(
    model,
    slots=2 if SMOKE.value else SLOTS.value,
    capacity=128 if SMOKE.value else capacity,
    cache_format=KV_CACHE.value,
    prefix_bytes=None if PREFIXES.value is None else int(PREFIXES.value * 2**20),
    speculation=speculation,
    adapters=adapters,
  )
  if WARM.value and not SMOKE.value:
    print('compiling', file=sys.stderr, flush=True)
    engine.warm()
  return engine


def _cascade(large: Engine, name: str) -> Cascade:
  small, _ = common.load_model(CASCADE.value, common.dtype(DTYPE))
  return Cascade(_engine(small, {}, None), large, threshold=THRESHOLD.value, name=name)


def _started(served, url: str, access: Access, drain) -> None:
  print(f'Serving {served.name} at {url}', flush=True)
  if access.key is None and access.hosts is None:
    print(f'anybody who reaches {url} may ask; {KEY} sets a key', file=sys.stderr, flush=True)
  if SMOKE.value:
    threading.Thread(target=_ask, args=(served, url, access.key, drain)).start()


def _ask(served, url, key, drain) -> None:
  """Asks the server for a few tokens, prints them and ends it."""
  call = {'model': served.name, 'prompt': 'import ', 'max_tokens': 8, 'temperature': 0}
  headers = {'Content-Type': 'application/json'}
  if key is not None:
    headers['Authorization'] = f'Bearer {key}'
  request = urllib.request.Request(f'{url}/v1/completions', json.dumps(call).encode(), headers)
  try:
    with urllib.request.urlopen(request, timeout=600) as answer:
      print('import ' + json.load(answer)['choices'][0]['text'], flush=True)
  finally:
    drain()


if __name__ == '__main__':
  common.run(main)
