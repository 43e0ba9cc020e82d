"""benchmark_serving: the times are those that a scripted server keeps, and all loads are put on."""

import asyncio
import json
import os
import threading
import time

import numpy as np
import pytest

from experiments import costs, load, soak
from experiments.load import Answer, Server
from model.eval import energy, records

STEP_S, TOKENS = 0.05, 4
KINDS = 'closed', 'open'


class Scripted:
  """A server whose answers have `TOKENS` pieces of a token, one every `STEP_S`."""

  def __init__(self):
    self.open, self.most, self.arrivals, self.status = 0, 0, [], 200
    self.step_s, self.wrong_at, self.metrics = STEP_S, frozenset(), b''

  async def __call__(self, reader, writer):
    headers = await reader.readuntil(b'\r\n\r\n')
    if headers.startswith(b'GET /v1/models'):
      writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"data": [{"id": "scripted"}]}')
    elif headers.startswith(b'GET /metrics'):
      writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n' + self.metrics)
    else:
      length = int(headers.lower().split(b'content-length:')[1].split(b'\r\n')[0])
      await self._answer(writer, json.loads(await reader.readexactly(length)))
    writer.close()

  async def _answer(self, writer, call):
    text = 'no' if len(self.arrivals) in self.wrong_at else 'né'
    self.arrivals.append(time.perf_counter())
    self.open += 1
    self.most = max(self.most, self.open)
    if self.status != 200:
      writer.write(f'HTTP/1.1 {self.status} No\r\n\r\nbusy'.encode())
    else:
      writer.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n')
      for _ in range(call['max_tokens']):
        await asyncio.sleep(self.step_s)
        self._event(writer, {'choices': [{'text': text}]})
      usage = {'completion_tokens': call['max_tokens'], 'prompt_tokens': len(call['prompt'])}
      self._event(writer, {'choices': [], 'usage': usage})
      self._chunk(writer, b'data: [DONE]\n\n')
      self._chunk(writer, b'')
    self.open -= 1

  def _event(self, writer, event):
    data = f'data: {json.dumps(event)}\n\n'.encode()
    self._chunk(writer, data[:9])
    self._chunk(writer, data[9:])

  def _chunk(self, writer, data):
    writer.write(b'%x\r\n%s\r\n' % (len(data), data))


def _with(scripted, work):
  async def main():
    listening = await asyncio.start_server(scripted, '127.0.0.1', 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening:
      return await work(Server('s', f'http://127.0.0.1:{port}/v1', 'm'))

  return asyncio.run(main())


CALLS = [{'prompt': [1, 2, 3], 'max_tokens': TOKENS}] * 6


def test_a_closed_load_has_so_many_clients_and_measures_their_times():
  scripted = Scripted()
  answers = _with(scripted, lambda server: load.closed(server, CALLS, 3))
  assert (len(answers), scripted.most) == (6, 3)
  for answer in answers:
    assert (answer.error, answer.tokens, answer.prompt_tokens) == (None, TOKENS, 3)
    assert STEP_S <= answer.first_s < answer.whole_s
    assert answer.whole_s >= TOKENS * STEP_S
    assert len(answer.gaps_s) == TOKENS - 1
    assert answer.each_s * (TOKENS - 1) == pytest.approx(answer.whole_s - answer.first_s)
    assert answer.each_s > 0  # less than a step where the first piece was read late


def test_an_open_load_arrives_as_the_seed_says():
  scripted = Scripted()
  answers = _with(scripted, lambda server: load.opened(server, CALLS, 20.0, seed=1))
  gaps = np.random.default_rng(1).exponential(1 / 20, 6)[1:]
  np.testing.assert_allclose(np.diff(scripted.arrivals), gaps, atol=0.04)
  assert all(answer.error is None for answer in answers)


def test_what_goes_wrong_is_in_the_answer():
  scripted = Scripted()
  scripted.status = 429
  (answer,) = _with(scripted, lambda server: load.closed(server, CALLS[:1], 1))
  assert answer.error == 'ValueError: status 429: busy'
  (answer,) = asyncio.run(load.closed(Server('s', 'http://127.0.0.1:9/v1', 'm'), CALLS[:1], 1))
  assert answer.error.startswith('ConnectionRefusedError')


def test_the_name_of_the_model_is_asked_for():
  assert _with(Scripted(), load.model_of) == 'scripted'
  with pytest.raises(ValueError, match='does not answer'):
    asyncio.run(load.model_of(Server('s', 'http://127.0.0.1:9/v1', 'm')))


HELD = b"""# HELP x
vllm:num_requests_running{model_name="a"} 1.0
vllm:num_requests_running{model_name="b"} 1.0
vllm:num_requests_waiting{model_name="a"} 3.0
process_resident_memory_bytes 2.097152e+06
"""


def test_a_load_that_lasts_counts_wrong_answers_and_what_stays_in_use(monkeypatch):
  """Calls 5 and 6 are the first and second of the load; four references precede them."""
  monkeypatch.setattr(soak, 'EVERY_S', 0.05)
  monkeypatch.setattr(soak, 'PATIENCE_S', 0.2)
  scripted = Scripted()
  scripted.step_s, scripted.wrong_at, scripted.metrics = 0.01, {4, 9}, HELD
  seen = _with(scripted, lambda server: soak.run(server, CALLS[:4], 3, 0.5))
  assert (len(seen.reference), scripted.most) == (4, 3)
  assert {answer.call for answer in seen.answers} == set(range(4))
  assert [str(wrong) for wrong in seen.wrong] == [
    f"call {call}, from character 1 on: 'ononono', not 'énénéné'" for call in (0, 1)
  ]
  found = {name: metric.value for name, metric in soak.metrics(seen).items()}
  assert (found['wrong'], found['failed'], found['in_use_afterwards']) == (2, 0, 5)
  assert found['completed'] == len(scripted.arrivals) - 4 > 20
  assert found['e2e_p99_s'] / found['e2e_median_s'] == found['e2e_p99_over_median']
  assert found['memory_start_bytes'] == found['memory_end_bytes'] == 2**21
  assert found['memory_slope_bytes_per_s'] == pytest.approx(0, abs=1e-3)
  lines = soak.words(soak.metrics(seen))
  assert lines[0].startswith(f'{found["completed"]:.0f} requests, 0 failed, 2 wrong; ')
  assert lines[-2:] == [
    'memory, MiB: 2.0 at the start, 2.0 after warm-up, 2.0 at the end, +0.00 a minute since, '
    '+0.00 in the later half',
    'in use afterwards: 5',
  ]


def _answer(asked_s, ended_s, text='a', **more):
  return Answer(asked_s=asked_s, ended_s=ended_s, pieces_s=[ended_s], tokens=1, text=text, **more)


def test_the_warm_up_is_left_out_of_times_and_of_the_slope_of_memory():
  """The first answers of two clients take 5 s, later ones 1 s; 3, then 10 bytes a second leak."""
  answers = [_answer(0, 5), _answer(0, 5), *(_answer(5 + i, 6 + i) for i in range(10))]
  answers.append(_answer(6, 6.1, error='OSError: gone'))
  memory = [(0, 100), (2, 900), *((float(t), 1000 + 3 * t) for t in range(5, 16))]
  memory += [(float(t), 1045 + 10 * (t - 15)) for t in range(16, 26)]
  seen = soak.Soak(
    clients=2, reference=[_answer(0, 1)], answers=answers, memory=memory, in_use=None
  )
  found = {name: metric.value for name, metric in soak.metrics(seen).items()}
  assert (found['warm_up_s'], found['e2e_p99_s'], found['failed']) == (5, 1, 1)
  assert 3 < found['memory_slope_bytes_per_s'] < found['memory_late_slope_bytes_per_s']
  assert found['memory_late_slope_bytes_per_s'] == pytest.approx(10)
  assert (found['memory_start_bytes'], found['memory_warm_bytes']) == (100, 1015)
  assert 'in_use_afterwards' not in found
  assert soak.words(soak.metrics(seen))[-1] == 'in use afterwards: not known'


def test_memory_is_read_where_it_is(monkeypatch):
  """Of a process of ours from /proc, which a large array changes; of no process, from nowhere."""
  server = Server('s', 'http://127.0.0.1:9/v1', 'm', pid=os.getpid())
  before = asyncio.run(soak._memory(server))[1]
  held = np.ones(40 * 2**20, np.uint8)
  assert asyncio.run(soak._memory(server))[1] - before > 30 * 2**20 < held.nbytes
  assert asyncio.run(soak._memory(Server('s', 'http://127.0.0.1:9/v1', 'm'))) is None


@pytest.fixture
def address():
  """The address of a scripted server in a thread of its own."""
  loop, ready = asyncio.new_event_loop(), threading.Event()

  async def main():
    async with await asyncio.start_server(Scripted(), '127.0.0.1', 0) as listening:
      stop = asyncio.Event()
      found.extend([listening.sockets[0].getsockname()[1], stop])
      ready.set()
      await stop.wait()

  found = []
  thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
  thread.start()
  assert ready.wait(10)
  yield f'http://127.0.0.1:{found[0]}/v1'
  loop.call_soon_threadsafe(found[1].set)
  thread.join(10)
  loop.close()


def test_servers_are_measured_side_by_side(script, base, tmp_path, capsys, monkeypatch, address):
  """Two servers, an open and a closed load, two rounds: a record each, and a figure."""
  put_on, order = script.module.Load.put_on, []

  async def noted(self, server, calls, seed):
    order.append((server.name, self.kind))
    return await put_on(self, server, calls, seed)

  monkeypatch.setattr(script.module.Load, 'put_on', noted)
  out, figure = tmp_path / 'load.jsonl', tmp_path / 'load.png'
  loads = ['--clients=2', '--rates=40', '--requests=4', '--rounds=2', '--slo_tpot_ms=1']
  loads += ['--price_per_hour=3.6', '--currency=EUR']
  lengths = [f'--new_tokens={TOKENS}', '--prompt_tokens=8']
  urls = [f'--url=a={address}', f'--url=b={address}']
  script(f'--model={base}', *urls, *loads, *lengths, f'--output={out}', f'--figure={figure}')
  assert order == [(name, kind) for names in ('ab', 'ba') for kind in KINDS for name in names]
  found = records.read(out)
  assert {(r.recipe, r.config['load']) for r in found} == {
    (n, kind) for n in 'ab' for kind in KINDS
  }
  for record in found:
    assert record.value('completed') == 8
    assert record.metrics['output_tokens_per_s'].n == 2
    assert record.value('tpot_median_s') > 0
    assert record.value('goodput_requests_per_s') == 0  # no token comes within a millisecond
    ratio = record.value('output_tokens_per_s') / record.value('requests_per_s')
    assert ratio == pytest.approx(TOKENS)
    price = record.metrics['money_per_million_tokens']  # a thousandth of a euro a second
    assert price.value == pytest.approx(1000 / record.value('output_tokens_per_s'), rel=0.05)
    assert (price.unit, price.n, record.config['currency']) == ('EUR', 2, 'EUR')
    assert ('energy_j_per_token' in record.metrics) != record.config['energy'].startswith('not ')
  assert figure.stat().st_size > 5000
  assert capsys.readouterr().out.count(' tokens/s') == 4


def test_a_load_that_lasts_is_recorded(script, base, tmp_path, capsys, address):
  out = tmp_path / 'soak.jsonl'
  lengths = [f'--new_tokens={TOKENS}', '--prompt_tokens=8', '--distinct=2']
  script(
    f'--model={base}',
    f'--url=a={address}',
    '--clients=2',
    '--seconds=1',
    *lengths,
    f'--output={out}',
  )
  (record,) = records.read(out)
  assert (record.config['seconds'], record.config['distinct']) == (1, 2)
  assert record.value('completed') >= 6 and record.value('wrong') == 0
  shown = capsys.readouterr().out
  assert shown.startswith('a, 2 clients for 1 s:\n') and ' 0 wrong; ' in shown


def test_the_counters_of_this_machine_do_not_measure_another(script):
  here = energy.Meters(meters=(object(),))
  spent = costs.Costs(meters=here)
  assert script.module._meters(Server('s', 'http://localhost:1/v1', 'm'), spent) is here
  there = script.module._meters(Server('s', 'http://10.0.0.7:1/v1', 'm'), spent)
  assert there.source == 'not measured: http://10.0.0.7:1/v1 is another machine'


@pytest.mark.slow
def test_smoke(script, capsys):
  script('--smoke')
  assert capsys.readouterr().out.startswith('own, 2 clients: ')


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'needs --model'),
    (['--smoke', '--clients=0'], '--clients must be above 0'),
    (['--smoke', '--rates=x'], '--rates must be numbers'),
    (['--smoke', '--rates=1', '--seconds=9'], '--seconds is for --clients'),
    (['--smoke', '--shared_tokens=200'], '--shared_tokens must be below'),
    (['--smoke', '--url=x'], '--url must be NAME=http'),
  ],
)
def test_bad_input_is_refused(script, arguments, message):
  with pytest.raises(ValueError, match=message):
    script(*arguments)
