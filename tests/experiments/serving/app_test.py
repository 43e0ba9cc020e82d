"""Who may ask, where, and what the server says of itself."""

import socket

import openai
import pytest

from experiments.serving.limits import Access

KEY = 'a-key-that-nobody-knows'
CALL = {'model': 'tiny', 'prompt': 'hello', 'max_tokens': 2, 'seed': 0}


@pytest.fixture(scope='module')
def locked(serve):
  return serve(access=Access(key=KEY, hosts=frozenset({'localhost', '127.0.0.1'})))


@pytest.fixture(scope='module')
def running(serve):
  return serve(adapters=('org/twin',))


@pytest.mark.parametrize('header', [None, 'Bearer x', 'Bearer', f'Basic {KEY}', f'Bearer {KEY}x'])
def test_without_the_key_nothing_is_answered(locked, http, header):
  headers = {} if header is None else {'Authorization': header}
  for method, path in (('POST', 'completions'), ('POST', 'chat/completions'), ('GET', 'models')):
    answer = http.request(method, f'{locked.url}/v1/{path}', headers=headers)
    assert (answer.status_code, answer.json()['error']['code']) == (401, 'invalid_api_key')
    assert KEY not in answer.text


def test_with_the_key(locked, client, http):
  assert client(locked, KEY).completions.create(**CALL).choices[0].text == 'hello'
  with pytest.raises(openai.AuthenticationError, match='the key is missing or wrong'):
    client(locked, 'no').models.list()
  for path in ('', 'health', 'metrics'):
    assert http.get(f'{locked.url}/{path}').status_code == 200
  assert KEY not in repr(Access(key=KEY))


@pytest.mark.parametrize('key', ['', 'né', 'a\n'])
def test_keys_that_no_header_can_have(key):
  with pytest.raises(ValueError, match='printable ASCII'):
    Access(key=key)


def test_other_hosts_are_refused(locked, http):
  for host, status in (('localhost:1', 200), ('127.0.0.1', 200), ('evil.example', 403)):
    answer = http.get(f'{locked.url}/health', headers={'Host': host})
    assert answer.status_code == status
  assert "not 'evil.example'" in answer.json()['error']['message']


def test_models(running, client):
  made = client(running)
  assert [model.id for model in made.models.list()] == ['tiny', 'org/twin']
  one = made.models.retrieve('org/twin')
  assert (one.id, one.parent, one.max_model_len) == ('org/twin', 'tiny', 256)
  with pytest.raises(openai.NotFoundError, match="no model 'x' here"):
    made.models.retrieve('x')


def test_errors_of_routes_have_the_form_of_others(running, http):
  answer = http.get(f'{running.url}/v1/nothing')
  assert (answer.status_code, answer.json()['error']['message']) == (
    404,
    'there is no GET /v1/nothing',
  )
  answer = http.get(f'{running.url}/v1/completions')
  assert (answer.status_code, answer.headers['allow']) == (405, 'POST')
  answer = http.post(f'{running.url}/v1/completions', content='{}')
  assert (answer.status_code, answer.json()['error']['type']) == (415, 'invalid_request_error')


def test_the_page_has_no_outside_assets(running, http):
  answer = http.get(running.url)
  assert answer.headers['content-type'].startswith('text/html')
  assert "default-src 'none'" in answer.headers['content-security-policy']
  assert '//' not in answer.text.replace('<!--', '').replace('http://www.w3.org', '')


def test_headers_without_an_end_are_refused(running):
  with socket.create_connection(('127.0.0.1', running.port), timeout=20) as connection:
    connection.sendall(b'GET / HTTP/1.1\r\nX: ' + b'x' * 200_000)
    assert connection.recv(100).startswith(b'HTTP/1.1 4')
