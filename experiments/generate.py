r"""Continues a prompt with a model, compressed or not.

  python -m experiments.generate --model=DIR --prompt='import os' --max_new_tokens=64
  python -m experiments.generate --model=DIR --prompt='Hello' --chat --temperature=0.7 --top_p=0.9
  python -m experiments.generate --model=DIR --prompt='import os' --kv_cache=int8+snapkv512
  python -m experiments.generate --model=DIR --prompts=FILE.jsonl --out=ANSWERS.jsonl --slots=32

Several prompts, as repeated --prompt flags, run as one batch, and each gives what it gives alone.
--temperature=0 is greedy, and gives the same tokens every time; a draw follows from --seed. The
prompt gets the special tokens that the tokenizer's files ask for, such as a BOS; with --chat they
come from the chat template. A single continuation is streamed as it appears.

A file of --prompts runs through the engine that serves requests, --slots of them at once. Each line
is {"prompt": TEXT} or {"messages": [...]}, and may have settings of its own; the answers come in
the same order, and a run that was ended goes on where it was (experiments/offline.py).

Device: any. Minutes: below 1.
"""

import pathlib
import sys
import time

import tqdm
from absl import flags

from experiments import base as embedded
from experiments import common, offline
from model import fingerprint, sharding
from model.infer import generate as generation
from model.infer.engine import Engine
from model.text_stream import TextStream
from ops.sampling import SamplingConfig

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file.')
PROMPT = flags.DEFINE_multi_string('prompt', None, 'Text to continue; repeat it for a batch.')
CHAT = flags.DEFINE_bool('chat', False, "Put the prompt into the model's chat template.")
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 64, 'Tokens to add.', lower_bound=0)
TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 takes the most likely token.', 0.0)
TOP_K = flags.DEFINE_integer('top_k', None, 'Sample among the k most likely tokens.')
TOP_P = flags.DEFINE_float('top_p', None, 'Sample among the most likely tokens of this mass.')
MIN_P = flags.DEFINE_float('min_p', None, 'Leave out tokens below this share of the likeliest.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sampling, of each prompt.')
DTYPE = common.define_dtype()
PROMPTS = flags.DEFINE_string('prompts', None, 'File of prompts, one JSON object a line.')
OUT = flags.DEFINE_string('out', None, 'File of the answers to --prompts.')
SLOTS = flags.DEFINE_integer('slots', 8, 'How many of --prompts run at once.', lower_bound=1)
SPEED = flags.DEFINE_bool('speed', False, 'Report tokens a second on stderr, compilation included.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A few tokens from the tiny base model.')
KV_CACHE = common.define_kv_cache('float', 'How keys and values of past tokens are kept.')
MESH = common.define_mesh()
PLUGINS = common.define_plugins()


def main() -> None:
  common.load_plugins(PLUGINS.value)
  sampling = SamplingConfig(
    temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value, min_p=MIN_P.value
  )
  if (PROMPTS.value is None) != (OUT.value is None):
    raise ValueError('--prompts and --out go together: prompts in, answers out')
  if PROMPTS.value is not None:
    _answer_all(sampling)
    return
  model, tokenizer, texts, limit = _inputs()
  sharding.shard(model, common.mesh(MESH))
  prompts = [_encode(tokenizer, text) for text in texts]
  stream = None
  if len(texts) == 1:
    print(_shown(texts[0]), end='', flush=True)
    stream = _Stream(tokenizer, prompts[0], model.config.eos_ids)
  start = time.perf_counter()
  new = generation.generate(
    model,
    prompts,
    max_new_tokens=limit,
    sampling_config=sampling,
    seed=SEED.value,
    on_tokens=stream,
    cache_format=KV_CACHE.value,
  )
  seconds = time.perf_counter() - start
  if stream is not None:
    stream.end()
  else:
    for text, prompt, tokens in zip(texts, prompts, new):
      print(_shown(text) + tokenizer.continuation(prompt, tokens))
  if SPEED.value:
    count = sum(map(len, new))
    print(f'{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s', file=sys.stderr)


def _answer_all(sampling: SamplingConfig) -> None:
  if MODEL.value is None or PROMPT.value:
    raise ValueError('--prompts needs --model, and is instead of --prompt')
  lines = offline.read(pathlib.Path(PROMPTS.value).expanduser())
  model, tokenizer = common.load_model(MODEL.value, common.dtype(DTYPE))
  sharding.shard(model, common.mesh(MESH))
  own = {'max_new_tokens': MAX_NEW_TOKENS.value, 'sampling': sampling, 'seed': SEED.value}
  requests = [offline.request(line, tokenizer, **own) for line in lines]
  longest = max((len(one.prompt) + one.max_new_tokens for one in requests), default=2)
  engine = Engine(model, slots=SLOTS.value, capacity=longest, cache_format=KV_CACHE.value)
  start = time.perf_counter()

  def answer(left):
    shown = tqdm.tqdm(total=len(left), desc='answers', leave=False, file=sys.stderr)
    for one in offline.answers(engine, left, tokenizer):
      yield one
      shown.update()
    shown.close()

  made_with = {'model': fingerprint.of_model(model), 'kv_cache': KV_CACHE.value}
  out = pathlib.Path(OUT.value).expanduser()
  there = offline.write(out, made_with, requests, answer)
  seconds, new = time.perf_counter() - start, engine.metrics.generated_tokens
  print(f'{len(requests) - there} answers, {there} were there already: {out}', file=sys.stderr)
  if SPEED.value and new:
    print(f'{new} tokens in {seconds:.2f} s: {new / seconds:.1f} tokens/s', file=sys.stderr)


class _Stream:
  """Prints the text of one row as its tokens come, each character once it is whole."""

  def __init__(self, tokenizer, prompt, eos_ids):
    self._text, self._eos_ids = TextStream(tokenizer, prompt), eos_ids

  def __call__(self, tokens_B):
    if int(tokens_B[0]) not in self._eos_ids:
      print(self._text.push(tokens_B[0]), end='', flush=True)

  def end(self):
    print(self._text.end(), flush=True)


def _shown(prompt) -> str:
  return '' if CHAT.value else prompt


def _encode(tokenizer, text):
  if CHAT.value:
    return tokenizer.encode(tokenizer.apply_chat_template([{'role': 'user', 'content': text}]))
  tokens = tokenizer.prompt(text)
  if not tokens:
    raise ValueError('--prompt is empty; give it some text')
  return tokens


def _inputs():
  if SMOKE.value and MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    return trained.model, trained.tokenizer, PROMPT.value or ['import '], 8
  if MODEL.value is None or not PROMPT.value:
    raise ValueError('generate needs --model and --prompt (or --smoke)')
  model, tokenizer = common.load_model(MODEL.value, common.dtype(DTYPE))
  return model, tokenizer, PROMPT.value, MAX_NEW_TOKENS.value


if __name__ == '__main__':
  common.run(main)
