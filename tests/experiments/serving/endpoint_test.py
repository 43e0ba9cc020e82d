"""What goes wrong around a call: clients leave, limits are met, engines fail, the server drains."""

import json
import socket
import threading
import time

import openai
import pytest

from experiments.serving import endpoint
from experiments.serving.limits import Limits

LONG = {'model': 'tiny', 'prompt': 'hello', 'max_tokens': 200, 'ignore_eos': True, 'seed': 0}


def _send(running, body, **headers):
  """Opens a connection and sends a call, without reading the answer."""
  data = json.dumps(body).encode()
  lines = ['POST /v1/completions HTTP/1.1', f'Host: localhost:{running.port}']
  known = {'Content-Type': 'application/json', 'Content-Length': len(data)}
  lines += [f'{name}: {value}' for name, value in (known | headers).items()]
  connection = socket.create_connection(('127.0.0.1', running.port), timeout=20)
  connection.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n' + data)
  return connection


@pytest.mark.parametrize('stream', [False, True])
def test_clients_that_leave_free_their_slots(serve, until, stream):
  running = serve(slots=4)
  engine = running.engine
  engine.gate.clear()
  clients = [_send(running, LONG | {'n': 2, 'stream': stream}) for _ in range(20)]
  until(lambda: running.worker.open == 40)
  for client in clients:
    client.close()
  until(lambda: running.worker.open == 0)
  engine.gate.set()
  until(lambda: not engine.busy and running.state.answering == 0)
  assert engine.metrics.generated_tokens < 40


def test_clients_that_leave_within_a_stream(serve, until):
  running = serve()
  clients = [_send(running, LONG | {'stream': True, 'max_tokens': 240}) for _ in range(8)]
  for client in clients:
    assert client.recv(20).startswith(b'HTTP/1.1 200')
    client.close()
  until(lambda: not running.engine.busy and running.state.answering == running.worker.open == 0)


def test_the_queue_has_an_end(serve, http, until):
  running = serve(slots=2, limits=Limits(queue=1))
  running.engine.gate.clear()
  waiting = _send(running, LONG | {'n': 3})
  until(lambda: running.worker.open == 3)
  answer = http.post(f'{running.url}/v1/completions', json=LONG)
  assert (answer.status_code, answer.headers['retry-after']) == (429, '1')
  assert answer.json()['error']['code'] == 'rate_limit_exceeded'
  running.engine.gate.set()
  assert b'"usage"' in _read(waiting)
  assert http.post(f'{running.url}/v1/completions', json=LONG).status_code == 200


def _read(connection):
  with connection:
    data = b''
    while not data.endswith(b'}'):
      data += connection.recv(2**16)
  return data


@pytest.mark.parametrize('stream', [False, True])
def test_an_answer_that_takes_too_long(serve, http, until, stream):
  running = serve(limits=Limits(seconds=1))
  running.engine.gate.clear()
  threading.Timer(1.5, running.engine.gate.set).start()
  answer = http.post(f'{running.url}/v1/completions', json=LONG | {'stream': stream})
  assert answer.status_code == 504
  assert answer.json()['error']['message'] == 'the answer took longer than 1 s'
  until(lambda: not running.engine.busy)


def test_a_stream_that_takes_too_long_ends_with_an_error(serve, client, until):
  running = serve(limits=Limits(seconds=1))
  step, held = running.engine.step, threading.Event()

  def slow():  # the first steps come, the rest takes too long
    if running.engine.metrics.generated_tokens > 20:
      held.wait(2)
    return step()

  running.engine.step = slow
  stream = client(running).completions.create(**_plain(LONG), stream=True)
  with pytest.raises(openai.APIError, match='took longer than 1 s'):
    list(stream)
  held.set()
  until(lambda: not running.engine.busy)


def _plain(call):
  return {k: v for k, v in call.items() if k != 'ignore_eos'}


def test_a_client_that_reads_nothing_is_left_in_the_end(serve, until, monkeypatch):
  monkeypatch.setattr(endpoint, 'FAREWELL_S', 0.2)
  running = serve(limits=Limits(seconds=1), slots=64)
  with _send(running, LONG | {'n': 64, 'logprobs': 20, 'stream': True, 'max_tokens': 240}):
    until(lambda: running.state.answering == 1)
    until(lambda: running.state.answering == 0)
  until(lambda: running.worker.open == 0)


def test_a_body_that_does_not_come(serve, until):
  running = serve(limits=Limits(body_seconds=1))
  with _send(running, {}, **{'Content-Length': 10}) as connection:
    assert connection.recv(2**16).startswith(b'HTTP/1.1 408')
  until(lambda: running.state.answering == 0)


def test_a_client_that_leaves_within_its_body(serve, until, caplog):
  running = serve()
  _send(running, {}, **{'Content-Length': 10}).close()
  until(lambda: running.state.answering == 0)
  assert not caplog.records


@pytest.mark.parametrize('declared', [True, False], ids=['declared', 'in pieces'])
def test_a_long_body_is_refused_early(serve, declared):
  running = serve(limits=Limits(body_bytes=10_000))
  length = {'Content-Length': 100 * 2**20} if declared else {'Transfer-Encoding': 'chunked'}
  lines = ['POST /v1/completions HTTP/1.1', f'Host: localhost:{running.port}']
  lines += ['Content-Type: application/json', *(f'{k}: {v}' for k, v in length.items())]
  with socket.create_connection(('127.0.0.1', running.port), timeout=20) as connection:
    connection.sendall('\r\n'.join(lines).encode() + b'\r\n\r\n')
    if not declared:
      connection.sendall(b'4000\r\n' + b'[' * 0x4000 + b'\r\n')
    answer = connection.recv(2**16)
    while b'request_too_large' not in answer:
      answer += connection.recv(2**16)
  assert answer.startswith(b'HTTP/1.1 413')
  assert b'longer than 10000 bytes' in answer


def test_a_failed_engine_fails_all_and_says_so(serve, http, client, until):
  running = serve()
  running.engine.gate.clear()
  waiting = _send(running, LONG)
  until(lambda: running.worker.open == 1)
  assert http.get(f'{running.url}/health').json() == {'status': 'ok'}
  running.engine.failing = True
  running.engine.gate.set()
  assert b'the engine has failed: RuntimeError: scripted' in _read(waiting)
  health = http.get(f'{running.url}/health')
  assert (health.status_code, health.json()['status']) == (503, 'failed')
  with pytest.raises(openai.InternalServerError, match='the engine has failed'):
    client(running).completions.create(**_plain(LONG))


def test_draining(serve, http, until):
  running = serve()
  running.engine.gate.clear()
  waiting = _send(running, LONG | {'stream': True})
  until(lambda: running.engine.busy)
  running.drain()
  until(lambda: http.get(f'{running.url}/health').status_code == 503)
  refused = http.post(f'{running.url}/v1/completions', json=LONG)
  assert (refused.status_code, refused.json()['error']['code']) == (503, 'shutting_down')
  running.engine.gate.set()
  data = b''
  with waiting:
    while b'[DONE]' not in data:
      data += waiting.recv(2**16)
  assert data.count(b'"text"') > 50
  until(lambda: not running._thread.is_alive())


def test_metrics(serve, http, client, until):
  running = serve('hello world, ')
  made = client(running)
  made.completions.create(model='tiny', prompt='hello', max_tokens=9, n=2, seed=0)
  made.completions.create(model='tiny', prompt='hello', max_tokens=9, stop='world', seed=0)
  time.sleep(0.05)
  text = http.get(f'{running.url}/metrics').text
  values = dict(line.rsplit(' ', 1) for line in text.splitlines() if not line.startswith('#'))
  of = lambda name, **more: float(values[f'vllm:{name}{{{_labels(more)}}}'])
  assert of('request_success_total', finished_reason='length') == 2
  assert of('request_success_total', finished_reason='stop') == 1
  assert of('request_success_total', finished_reason='abort') == 0
  assert of('prompt_tokens_total') == 6
  assert of('num_requests_running') == of('num_requests_waiting') == 0
  for name in ('time_to_first_token_seconds', 'e2e_request_latency_seconds'):
    assert of(f'{name}_count') == 3
  assert of('inter_token_latency_seconds_count') > 10
  assert of('request_generation_tokens_sum') == 18 + 3
  assert {'vllm:kv_cache_usage_perc', 'vllm:prefix_cache_hits_total'} <= {
    name.split('{')[0] for name in values
  }
  assert float(values['process_resident_memory_bytes']) > 2**20


def _labels(more):
  given = {'finished_reason': None, 'model_name': 'tiny'} | more
  return ','.join(f'{k}="{v}"' for k, v in given.items() if v is not None)
