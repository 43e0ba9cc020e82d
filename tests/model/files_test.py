"""Output folders appear whole or not at all, wherever they lie."""

import contextlib
import errno
import os
import pathlib
import subprocess
import sys

import pytest

from model import files, lock, manifest
from model.files import atomic_folder, claim

NAMES = [manifest.NAME, 'config.json']


def _save(path, name='model.safetensors'):
  with atomic_folder(path) as folder:
    (folder / 'config.json').write_text('{}')
    (folder / name).write_text(name)


def _names(path):
  return sorted(entry.name for entry in path.iterdir())


def test_a_new_folder_and_its_parents_appear(tmp_path):
  _save(tmp_path / 'a/b')
  assert _names(tmp_path / 'a/b') == [*NAMES, 'model.safetensors']
  assert _names(tmp_path / 'a') == ['b']


def test_an_empty_folder_and_an_earlier_output_are_replaced(tmp_path):
  (tmp_path / 'out').mkdir()
  _save(tmp_path / 'out', 'first.safetensors')
  _save(tmp_path / 'out', 'second.safetensors')
  assert _names(tmp_path / 'out') == [*NAMES, 'second.safetensors']
  assert _names(tmp_path) == ['out']


@pytest.mark.parametrize('exists', [False, True])
def test_a_failed_block_changes_nothing(exists, tmp_path):
  if exists:
    _save(tmp_path / 'out')
  with pytest.raises(KeyboardInterrupt):
    with atomic_folder(tmp_path / 'out') as folder:
      (folder / 'config.json').write_text('half')
      raise KeyboardInterrupt
  assert _names(tmp_path) == (['out'] if exists else [])
  if exists:
    assert (tmp_path / 'out/config.json').read_text() == '{}'


def test_a_claim_that_writes_nothing_leaves_nothing(tmp_path):
  with claim(tmp_path / 'a/b/out'):
    assert (tmp_path / 'a/b').is_dir()
  assert _names(tmp_path) == []


def test_a_partial_folder_with_a_key_is_kept_and_found_again(tmp_path):
  with contextlib.suppress(KeyboardInterrupt), claim(tmp_path / 'out') as output:
    with output.writing('abc') as folder:
      (folder / 'first').touch()
      raise KeyboardInterrupt
  assert _names(tmp_path) == ['.out.abc.partial']
  with claim(tmp_path / 'out') as output, output.writing('abc') as folder:
    (folder / 'second').touch()
  assert _names(tmp_path) == ['out']
  assert _names(tmp_path / 'out') == [manifest.NAME, 'first', 'second']


def test_work_that_appears_meanwhile_is_kept(tmp_path):
  with pytest.raises(ValueError, match='may be your work'):
    with atomic_folder(tmp_path / 'out') as folder:
      (folder / 'config.json').write_text('{}')
      (tmp_path / 'out').mkdir()
      (tmp_path / 'out/thesis.tex').write_text('years')
  assert (tmp_path / 'out/thesis.tex').read_text() == 'years'


@pytest.mark.parametrize('target', ['real', 'elsewhere/new'])
def test_a_link_keeps_pointing_at_the_output(target, tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / target)
  for _ in range(2):
    _save(tmp_path / 'link')
  assert (tmp_path / 'link').is_symlink()
  assert _names(tmp_path / target) == [*NAMES, 'model.safetensors']
  assert _names(tmp_path) == sorted({'link', 'real', target.split('/')[0]})


def test_a_file_and_the_current_folder_are_refused(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(ValueError, match='is not a folder; name a folder'):
    _save(tmp_path / 'file')
  with pytest.raises(ValueError, match=r'cannot be written: (Not a directory|File exists)'):
    _save(tmp_path / 'file/below')
  assert (tmp_path / 'file').read_text() == 'mine'
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  with pytest.raises(ValueError, match='current folder'):
    _save('.')


def test_two_processes_do_not_hold_one_output(tmp_path):
  code = (
    'import sys\nfrom model.files import claim\n'
    'with claim(sys.argv[1]):\n  print("held", flush=True)\n  sys.stdin.read()\n'
  )
  command = [sys.executable, '-c', code, tmp_path / 'out']
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b'held\n'
    with pytest.raises(lock.InUse, match=f'{tmp_path}/out is in use by process {process.pid}'):
      with claim(tmp_path / 'out'):
        pytest.fail('held twice')
    process.communicate()
  assert process.returncode == 0 and _names(tmp_path) == []


# Mount points.


@pytest.fixture
def mount(tmp_path):
  """A function (options, from) that mounts a new file system, or another folder, at tmp_path/m."""
  path, mounted = tmp_path / 'm', []

  def run(*arguments):
    path.mkdir()
    done = subprocess.run(['mount', *map(str, arguments), path], capture_output=True)
    if done.returncode:
      pytest.skip('mounting is not allowed here')
    mounted.append(path)
    return path

  yield run
  for one in mounted:
    subprocess.run(['umount', one], check=True)


@pytest.mark.parametrize('kind', ['another file system', 'the same file system'])
def test_a_mount_point_is_written_in_place(kind, mount, tmp_path):
  (tmp_path / 'other').mkdir()
  bind = ['--bind', tmp_path / 'other']
  path = mount(*(bind if kind.startswith('the') else ['-t', 'tmpfs', 'tmpfs']))
  with contextlib.suppress(KeyboardInterrupt), claim(path) as output:
    with output.writing('abc') as folder:
      (folder / 'first').touch()
      raise KeyboardInterrupt
  with claim(path) as output, output.writing('abc') as folder:
    (folder / 'models').mkdir()
    (folder / 'models/x').touch()
  assert _names(path) == [manifest.NAME, 'first', 'models']
  _save(path)
  assert _names(path) == [*NAMES, 'model.safetensors']
  (path / 'thesis.tex').write_text('years')
  with pytest.raises(ValueError, match=r'something else \(thesis\.tex\)'):
    _save(path)


def test_a_kill_between_moves_leaves_an_output_that_is_replaced(monkeypatch, mount):
  path = mount('-t', 'tmpfs', 'tmpfs')
  _save(path)
  rename, moves = pathlib.Path.rename, []
  count = 2 + 2  # two entries move out, two move in

  for at in range(count):

    def killed(self, target, at=at):
      moves.append(self.name)
      if len(moves) > at:
        raise KeyboardInterrupt
      return rename(self, target)

    moves.clear()
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, 'rename', killed)
      with pytest.raises(KeyboardInterrupt):
        _save(path)
    files.check_replaceable(path)
    _save(path)
    assert _names(path) == [*NAMES, 'model.safetensors']


def test_a_full_file_system_is_found_before_any_work(mount):
  path = mount('-t', 'tmpfs', '-o', 'size=64k', 'tmpfs')
  with pytest.raises(ValueError, match=f'{path}.* cannot be written: No space left on device'):
    with atomic_folder(path / 'out'):
      pytest.fail('work was done')
  assert _names(path) == []


def test_a_file_system_that_fills_up_is_an_error_that_names_the_output(mount):
  path = mount('-t', 'tmpfs', '-o', 'size=2m', 'tmpfs')
  with pytest.raises(OSError, match=f"No space left on device: '{path}/out'"):
    with atomic_folder(path / 'out') as folder:
      (folder / 'large').write_bytes(bytes(3 * 2**20))
  assert _names(path) == []


def test_a_read_only_file_system_is_found_before_any_work(mount, tmp_path):
  (tmp_path / 'other/empty').mkdir(parents=True)
  path = mount('--bind', '-o', 'ro', tmp_path / 'other')
  for name in ('empty', 'new', 'a/b'):
    with pytest.raises(ValueError, match=r'cannot be written: Read-only file system; name another'):
      with atomic_folder(path / name):
        pytest.fail('work was done')


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_what_the_system_says_of_a_folder_is_said_in_one_line(tmp_path, monkeypatch, number):
  def refuse(path, *_):
    raise OSError(number, os.strerror(number), os.fspath(path))

  monkeypatch.setattr(pathlib.Path, 'open', refuse)
  with pytest.raises(ValueError) as error:
    _save(tmp_path / 'out')
  told = f'{tmp_path} cannot be written: {os.strerror(number)}; name another folder'
  assert str(error.value) == told


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'file'
  path.write_text('old')
  with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as partial:
    partial.write_text('half')
    raise KeyboardInterrupt
  assert path.read_text() == 'old' and _names(tmp_path) == ['file']
  with files.atomic_file(path) as partial:
    partial.write_text('new')
  assert path.read_text() == 'new' and _names(tmp_path) == ['file']
