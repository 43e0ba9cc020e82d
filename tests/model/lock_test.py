"""Lock files, held by real processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from model import lock

HOLD = """
import sys, time
from model import lock
if {without_flock}:
  import errno
  def refuse(*_):
    raise OSError(errno.ENOLCK, 'No locks available')
  lock.fcntl.flock = refuse
with lock.hold(sys.argv[1], 'x'):
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture(params=[False, True], ids=['flock', 'without flock'])
def without_flock(request, monkeypatch):
  if request.param:

    def refuse(*_):
      raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', refuse)
  return request.param


@pytest.fixture
def holder(tmp_path, without_flock):
  """Another process that holds tmp_path/lock until its standard input closes."""
  command = [sys.executable, '-c', HOLD.format(without_flock=without_flock), tmp_path / 'lock']
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert process.stdout.readline() == b'held\n'
  yield process
  process.kill()
  process.wait()
  process.stdin.close()
  process.stdout.close()


def test_a_lock_is_held_by_one_process_and_names_it(tmp_path, holder):
  with pytest.raises(lock.InUse, match=f'the folder x is in use by process {holder.pid}; wait'):
    with lock.hold(tmp_path / 'lock', 'the folder x'):
      pytest.fail('held twice')


def test_a_process_that_waits_says_so_once_and_comes_next(tmp_path, holder):
  said = []

  def end(sentence):
    said.append(sentence)
    holder.stdin.close()

  with lock.hold(tmp_path / 'lock', 'x', on_wait=end):
    assert holder.wait(10) == 0
  assert said == [f'x is in use by process {holder.pid}']
  assert list(tmp_path.iterdir()) == []


def test_a_killed_process_blocks_nobody(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert list(tmp_path.iterdir()) != []
  with lock.hold(tmp_path / 'lock', 'x'):
    with pytest.raises(lock.InUse, match=f'process {os.getpid()};'):
      with lock.hold(tmp_path / 'lock', 'x'):
        pytest.fail('held twice')
  assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_not_taken_for_dead(tmp_path, monkeypatch):
  monkeypatch.setattr(fcntl, 'flock', lambda *_: _raise(errno.EOPNOTSUPP))
  (tmp_path / 'lock.owner').write_text('4194305 elsewhere')  # no process has such a number
  with pytest.raises(lock.InUse, match='process 4194305 on elsewhere'):
    with lock.hold(tmp_path / 'lock', 'x'):
      pytest.fail('held twice')


def _raise(number):
  raise OSError(number, os.strerror(number))


COUNT = """
import sys, time
from model import lock
for _ in range(40):
  with lock.hold(sys.argv[1] + '/lock', 'x', on_wait=lambda _: None):
    path = sys.argv[1] + '/number'
    number = int(open(path).read())
    time.sleep(0.001)
    open(path, 'w').write(str(number + 1))
"""


def test_nothing_is_lost_between_processes_that_count_together(tmp_path, monkeypatch):
  (tmp_path / 'number').write_text('0')
  code = COUNT.replace('import sys', 'from model import lock\nlock.POLL_S = 0.001\nimport sys')
  command = [sys.executable, '-c', code, tmp_path]
  start = time.monotonic()
  processes = [subprocess.Popen(command) for _ in range(3)]
  assert [process.wait(60 - (time.monotonic() - start)) for process in processes] == [0, 0, 0]
  assert (tmp_path / 'number').read_text() == '120'
