r"""Measures servers under load: times to the first token and per token, throughput, goodput.

  python -m experiments.benchmark_serving --model=DIR --clients=1,8,32
  python -m experiments.benchmark_serving --model=DIR --rates=0.5,1,2 --figure=load.png
  python -m experiments.benchmark_serving --model=DIR --clients=32 --serve='--slots=32 --name=own' \
    --url=llama.cpp=http://127.0.0.1:8080/v1
  python -m experiments.benchmark_serving --model=DIR --clients=64 --seconds=600 --output=FILE

Servers are ours, started by this script with the options of each --serve, and any others of
OpenAI's API at each --url, all on the same prompts. Each round puts each load on every server in
turn, so that all meet the same noise. A load is closed (--clients: so many ask at once, again and
again) or open (--rates: so many requests arrive a second, at times of a Poisson process).

Prompts are excerpts of Python's language reference, cut to --prompt_tokens tokens of the model's
tokenizer; they are sent as tokens, or with --text as text. Answers have --new_tokens tokens, by
ignore_eos. TTFT is the time from the call to the first piece of text, TPOT the time after it over
the number of tokens but one, ITL the time between pieces, which may have several tokens. Goodput
counts the requests a second that keep --slo_ttft_ms and --slo_tpot_ms.

With --seconds, each closed load lasts so long and asks the same --distinct greedy prompts again and
again: experiments/soak.py says how wrong answers, percentiles after warm-up, memory with its slope
and slots that stay in use are found.

Energy and price are per token of the answers, with the reading of the prompts. The counters are
those of this machine: they include the idle servers beside the one that answers, and the clients.

Device: any. Minutes: a load takes as long as the server does for --requests requests, or --seconds
after --distinct answers alone.
"""

import asyncio
import contextlib
import dataclasses
import functools
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from pydoc_data import topics

import numpy as np
from absl import flags

from experiments import base as embedded
from experiments import carbon, common, costs, latency, load, soak
from experiments.load import Answer, Server
from model import hf
from model.eval import energy, records, serving_figure, timing
from model.eval.records import Metric, Record
from model.tokenizer import Tokenizer

CHARACTERS = 300_000  # of the language reference
LOCAL = {'127.0.0.1', 'localhost', '::1'}

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file: model and tokenizer.')
SERVE = flags.DEFINE_multi_string('serve', None, 'Options of experiments.serve; may be repeated.')
URL = flags.DEFINE_multi_string('url', [], 'NAME=ADDRESS of another server; may be repeated.')
KEY = flags.DEFINE_string('key', None, 'The API key of the servers at --url.')
CLIENTS = flags.DEFINE_list('clients', [], 'Closed loads: clients that ask at once.')
RATES = flags.DEFINE_list('rates', [], 'Open loads: requests a second.')
REQUESTS = flags.DEFINE_integer('requests', 64, 'Requests of each load.', lower_bound=1)
SECONDS = flags.DEFINE_float('seconds', None, 'Let each closed load last so long.', 1.0)
DISTINCT = flags.DEFINE_integer('distinct', 16, 'Prompts of a load that lasts.', lower_bound=1)
PROMPT = flags.DEFINE_integer('prompt_tokens', 128, 'Tokens of a prompt.', lower_bound=1)
SHARED = flags.DEFINE_integer('shared_tokens', 0, 'Of these, tokens that all prompts share.', 0)
NEW = flags.DEFINE_integer('new_tokens', 128, 'Tokens of an answer.', lower_bound=1)
TEXT = flags.DEFINE_bool('text', False, 'Send prompts as text.')
ROUNDS = flags.DEFINE_integer('rounds', 1, 'Rounds of all loads and servers.', lower_bound=1)
SLO_TTFT = flags.DEFINE_float('slo_ttft_ms', 1000.0, 'The longest good time to the first token.')
SLO_TPOT = flags.DEFINE_float('slo_tpot_ms', 100.0, 'The longest good time per token after it.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of prompts and arrivals.')
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
FIGURE = flags.DEFINE_string('figure', None, 'A PNG to draw latency over throughput into.')
COSTS, CARBON = costs.define(), carbon.define()
SMOKE = flags.DEFINE_bool('smoke', False, 'The tiny base model, few requests.')


@dataclasses.dataclass(frozen=True)
class Load:
  """A closed load of so many clients, or an open one of so many requests a second."""

  kind: str
  amount: float

  async def put_on(self, server: Server, calls: Sequence[dict], seed: int) -> list[Answer]:
    if self.kind == 'closed':
      return await load.closed(server, calls, int(self.amount))
    return await load.opened(server, calls, self.amount, seed)


def main() -> None:
  loads, requests = _loads(), 4 if SMOKE.value else REQUESTS.value
  if _options():
    common.need_extra('serve')
  spent = costs.of(COSTS, gpus=None)
  others = [_other(text) for text in URL.value]
  found = {}
  with contextlib.ExitStack() as stack:
    totals = stack.enter_context(carbon.tracked(CARBON))
    model, tokenizer = _inputs(stack)
    tokens = tokenizer.encode('\n\n'.join(topics.topics.values())[:CHARACTERS])
    calls = functools.partial(_calls, tokenizer, tokens)
    servers = [stack.enter_context(_own(model, options)) for options in _options()]
    servers += others
    if len({server.name for server in servers}) < len(servers):
      raise ValueError('servers need different names: --serve has --name, --url has NAME=')
    if SECONDS.value is not None:
      return _last(servers, loads, calls(DISTINCT.value, 0))
    for server in servers:  # compiles what it compiles, and is not measured
      asyncio.run(load.closed(server, calls(4, -1), 2))
    for turn in common.progress(range(ROUNDS.value), 'rounds'):
      round_calls = calls(requests, turn)
      for one in loads:
        for server in [*servers[turn % len(servers) :], *servers[: turn % len(servers)]]:
          with costs.counted(_meters(server, spent)) as joules:
            answers = asyncio.run(one.put_on(server, round_calls, SEED.value + turn))
          found.setdefault((server, one), []).append((answers, joules))
  results = [_record(*pair, rounds, spent) for pair, rounds in found.items()]
  for record in results:
    print(_words(record))
    if OUTPUT.value:
      records.append(OUTPUT.value, record)
  if FIGURE.value:
    serving_figure.write(results, FIGURE.value)
  if totals.found:
    print(totals)


def _loads() -> list[Load]:
  clients, rates = CLIENTS.value, RATES.value
  if rates and SECONDS.value is not None:
    raise ValueError('--seconds is for --clients; an open load lasts for --requests requests')
  if not clients and not rates:
    clients = ['2'] if SMOKE.value else ['1', '8', '32']
  found = []
  for name, kind, values in (('clients', 'closed', clients), ('rates', 'open', rates)):
    for text in values:
      try:
        amount = int(text) if kind == 'closed' else float(text)
      except ValueError:
        raise ValueError(f'--{name} must be numbers, not {text!r}') from None
      if not 0 < amount < 1e6:
        raise ValueError(f'--{name} must be above 0, not {text}')
      found.append(Load(kind, amount))
  return found


def _last(servers: Sequence[Server], loads: Sequence[Load], calls: Sequence[dict]) -> None:
  """Puts the loads on for the set time, prints and records what was seen."""
  for one in loads:
    for server in servers:
      found = asyncio.run(soak.run(server, calls, int(one.amount), SECONDS.value))
      errors = sorted({answer.error for answer in found.answers if answer.error is not None})
      record = Record(
        experiment='benchmark_serving_lasting',
        recipe=server.name,
        command=common.command(),
        config={**_config(one), 'seconds': SECONDS.value, 'distinct': DISTINCT.value},
        environment=records.environment(),
        seed=SEED.value,
        metrics=soak.metrics(found),
        notes=(*errors[:3], *map(str, found.wrong[:3])),
      )
      print(f'{server.name}, {one.amount:g} clients for {SECONDS.value:g} s:')
      print('\n'.join(f'  {line}' for line in (*soak.words(record.metrics), *record.notes)))
      if OUTPUT.value:
        records.append(OUTPUT.value, record)


def _options() -> list[str]:
  if SERVE.value is not None:
    return SERVE.value
  return [] if URL.value else ['']


def _inputs(stack: contextlib.ExitStack) -> tuple[str, Tokenizer]:
  """What to give to a server of ours as --model, and the tokenizer."""
  if SHARED.value >= PROMPT.value:
    raise ValueError(f'--shared_tokens must be below --prompt_tokens, not {SHARED.value}')
  if SMOKE.value and MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    hf.save_pretrained(trained.model, trained.tokenizer, folder)
    return folder, trained.tokenizer
  if MODEL.value is None:
    raise ValueError('benchmark_serving needs --model, for its tokenizer too (or --smoke)')
  return MODEL.value, common.load_model(MODEL.value)[1]


def _calls(tokenizer: Tokenizer, tokens: list[int], count: int, turn: int) -> list[dict]:
  """Calls with excerpts of their own, which other turns do not have."""
  length, new = (16, 4) if SMOKE.value else (PROMPT.value, NEW.value)
  if len(tokens) <= length:
    raise ValueError(f'the text has {len(tokens)} tokens; --prompt_tokens is {length}')
  rng = np.random.default_rng((SEED.value, turn + 1))
  starts = rng.integers(0, len(tokens) - length, count)
  shared = list(tokens[: SHARED.value])
  prompts = [shared + list(tokens[s : s + length - len(shared)]) for s in starts.tolist()]
  if TEXT.value:
    prompts = [tokenizer.decode(prompt) for prompt in prompts]
  settings = {'max_tokens': new, 'ignore_eos': True, 'temperature': 0}
  return [{'prompt': prompt, **settings} for prompt in prompts]


@contextlib.contextmanager
def _own(model: str, options: str) -> Iterator[Server]:
  """A server of ours in a process of its own, while the context lasts."""
  command = [sys.executable, '-m', 'experiments.serve', f'--model={model}', '--name=own']
  command += ['--port=0', *shlex.split(options)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      line = process.stdout.readline()
      if not line.startswith('Serving '):
        raise ValueError(f'{shlex.join(command)} ended with the status {process.wait()}')
      _, name, _, url = line.rsplit(maxsplit=3)
      yield Server(name, f'{url}/v1', name, pid=process.pid)
    finally:
      process.send_signal(signal.SIGTERM)


def _other(text: str) -> Server:
  name, _, url = text.rpartition('=')
  if not url.startswith('http://'):
    raise ValueError(f'--url must be NAME=http://HOST:PORT/v1, not {text!r}')
  server = Server(name or url, url, '', KEY.value)
  return dataclasses.replace(server, model=asyncio.run(load.model_of(server)))


def _meters(server: Server, spent: costs.Costs) -> energy.Meters | None:
  """The counters of this machine, which are not those of a server elsewhere."""
  if spent.meters is None or urllib.parse.urlsplit(server.url).hostname in LOCAL:
    return spent.meters
  return energy.Meters(missing=(f'{server.url} is another machine',))


def _record(server: Server, one: Load, counted: list[tuple], spent: costs.Costs) -> Record:
  rounds = [answers for answers, _ in counted]
  good = [answer for answers in rounds for answer in answers if answer.error is None]
  errors = [answer.error for answers in rounds for answer in answers if answer.error is not None]
  if not good:
    raise ValueError(f'{server.name} answered nothing: {errors[0]}')
  metrics = {
    'completed': Metric(len(good), 'requests'),
    'failed': Metric(len(errors), 'requests'),
    'requests_per_s': _rate(rounds, lambda a: 1, 'request/s'),
    'output_tokens_per_s': _rate(rounds, lambda a: a.tokens, 'token/s'),
    'tokens_per_s': _rate(rounds, lambda a: a.tokens + a.prompt_tokens, 'token/s'),
    'goodput_requests_per_s': _rate(rounds, _is_good, 'request/s'),
  }
  metrics |= latency.of(good)
  tokens = [sum(a.tokens for a in answers if a.error is None) for answers in rounds]
  seconds = [_seconds(answers) for answers in rounds]
  found, about = spent.of_rounds([joules for _, joules in counted], seconds, tokens)
  return Record(
    experiment='benchmark_serving',
    recipe=server.name,
    command=common.command(),
    config={**_config(one), **spent.settings, **about},
    environment=records.environment(),
    seed=SEED.value,
    metrics=metrics | found,
    notes=tuple(sorted(set(errors))[:3]),
  )


def _rate(rounds, amount, unit) -> Metric:
  """An amount per second, from the first call of a round to its last answer, over all rounds."""
  rates = []
  for answers in rounds:
    rates.append(sum(amount(a) for a in answers if a.error is None) / _seconds(answers))
  return timing.summarize(rates, unit)


def _seconds(answers: Sequence[Answer]) -> float:
  return max(a.ended_s for a in answers) - min(a.asked_s for a in answers)


def _is_good(answer: Answer) -> bool:
  each_s = answer.each_s or 0.0
  return 1e3 * answer.first_s <= SLO_TTFT.value and 1e3 * each_s <= SLO_TPOT.value


def _config(one: Load) -> dict:
  return {
    'model': 'smoke' if MODEL.value is None else pathlib.Path(MODEL.value).name,
    'load': one.kind,
    'amount': one.amount,
    'requests': REQUESTS.value,
    'rounds': ROUNDS.value,
    'prompt_tokens': PROMPT.value,
    'shared_tokens': SHARED.value,
    'new_tokens': NEW.value,
    'text': TEXT.value,
    'serve': SERVE.value or [],
    'slo_ttft_ms': SLO_TTFT.value,
    'slo_tpot_ms': SLO_TPOT.value,
  }


def _words(record: Record) -> str:
  value = record.value
  unit = 'clients' if record.config['load'] == 'closed' else 'requests/s arrive'
  ms = lambda name: f'{1e3 * value(f"{name}_median_s"):.0f} ({1e3 * value(f"{name}_p95_s"):.0f})'
  times = [
    f'{name.upper()} {ms(name)}'
    for name in ('ttft', 'tpot', 'itl', 'e2e')
    if f'{name}_median_s' in record.metrics
  ]
  failed = f', {value("failed"):.0f} failed' if value('failed') else ''
  energy_j, price = value(costs.ENERGY), record.metrics.get(costs.MONEY)
  spent = '' if energy_j is None else f'; {energy_j:.3g} J/token'
  spent += '' if price is None else f'; {price.value:.3g} {price.unit} per million tokens'
  return (
    f'{record.recipe}, {record.config["amount"]:g} {unit}: '
    f'{value("output_tokens_per_s"):.1f} tokens/s, {value("requests_per_s"):.2f} requests/s, '
    f'{value("goodput_requests_per_s"):.2f} good{failed}; '
    f'ms, median (p95): {", ".join(times)}{spent}'
  )


if __name__ == '__main__':
  common.run(main)
