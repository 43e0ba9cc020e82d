"""serve: the script answers itself, ends when it is told to, and refuses what cannot work."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from absl import flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
CALL = b'{"prompt": "import", "max_tokens": 900, "ignore_eos": true, "stream": true}'


def test_smoke(script, capsys):
  script('--smoke')
  shown = capsys.readouterr().out
  assert shown.startswith('Serving smoke at http://127.0.0.1:')
  assert 'import ' in shown


def _start(base, cache):
  command = [sys.executable, '-m', 'experiments.serve', f'--model={base}', '--port=0', '--nowarm']
  environment = {**os.environ, 'LISSOM_CACHE': str(cache), 'PYTHONPATH': str(ROOT)}
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
  return process, process.stdout.readline().split()[-1]


def _ask(url):
  headers = {'Content-Type': 'application/json'}
  request = urllib.request.Request(f'{url}/v1/completions', CALL, headers)
  return urllib.request.urlopen(request, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM])
def test_a_signal_drains_and_a_second_one_ends_at_once(base, cache, number):
  process, url = _start(base, cache)
  with process, _ask(url) as answer:
    answer.readline()
    process.send_signal(number)
    assert b'[DONE]' in answer.read()
    assert process.wait(60) == 0
  process, url = _start(base, cache)
  with process, _ask(url) as answer:
    answer.readline()
    process.send_signal(number)
    with pytest.raises(urllib.error.HTTPError, match='503'):  # two signals at once would be one
      for _ in range(500):
        urllib.request.urlopen(f'{url}/health', timeout=20).close()
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(5) == 128 + number


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'serve needs --model'),
    (['--smoke', '--host=256.1.1.1'], 'cannot listen on 256.1.1.1'),
    (['--model=no/such/folder/x', '--port=0'], 'is no folder'),
    (['--smoke', '--max_body_megabytes=nan'], 'max_body_megabytes'),
    (['--smoke', '--adapter=x'], '--adapter must be NAME=DIR'),
  ],
)
def test_bad_input_is_refused(script, arguments, message):
  with pytest.raises((ValueError, flags.Error), match=message):
    script(*arguments)


def test_a_port_that_is_taken(script):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=f'cannot listen on 127.0.0.1, port {port}: '):
      script('--model=not-looked-at', f'--port={port}')
