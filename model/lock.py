"""A lock file that one process holds at a time, so that two runs never write into one folder.

The kernel keeps the lock (flock) and drops it when the process ends, however it ends: a killed run
blocks nobody. Some network file systems have no such locks. There the existence of a second file is
the lock, and a process of this machine that no longer runs loses it.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.2
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class InUse(ValueError):
  """Another process holds the lock."""


@contextlib.contextmanager
def hold(
  path: str | os.PathLike, what: str, *, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
  """Holds the lock file `path`, which is removed at the end. `what` names the thing it protects.

  If another process holds the lock, `on_wait` is called once with a sentence that names the
  process, and this process waits. Without `on_wait` there is no waiting.

  Raises:
    InUse: another process holds the lock, and `on_wait` is None.
    OSError: the file cannot be written.
  """
  path, told = Path(path), False
  while (held := _try(path)) is None:
    sentence = f'{what} is in use by {_owner(path)}'
    if on_wait is None:
      raise InUse(f'{sentence}; wait until it ends, or name another folder')
    if not told:
      on_wait(sentence)
    told = True
    time.sleep(POLL_S)
  handle, file = held
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      file.unlink()
    os.close(handle)


def _try(path: Path) -> tuple[int, Path] | None:
  """Returns the open lock file and its path, or None if another process holds the lock."""
  handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    os.close(handle)
    if error.errno in UNSUPPORTED:
      path.unlink(missing_ok=True)
      return _try_exclusive(_second(path))
    if isinstance(error, BlockingIOError):
      return None
    raise
  if not _names(path, handle):  # the last holder removed the file meanwhile
    os.close(handle)
    return _try(path)
  _sign(handle)
  return handle, path


def _try_exclusive(path: Path) -> tuple[int, Path] | None:
  """Takes the lock by creating `path`, which fails if the file exists."""
  try:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
  except FileExistsError:
    return _try_exclusive(path) if _remove_stale(path) else None
  _sign(handle)
  return handle, path


def _remove_stale(path: Path) -> bool:
  """Removes the file of a process of this machine that no longer runs."""
  text = _read(path)
  pid, _, host = text.partition(' ')
  if host != socket.gethostname() or not pid.isdigit() or _runs(int(pid)):
    return False
  # Of two processes that find the file, one renames it first; the other may catch a new file.
  caught = path.with_name(f'{path.name}.{secrets.token_hex(4)}')
  try:
    path.rename(caught)
    if _read(caught) != text:
      caught.rename(path)
      return False
    caught.unlink()
  except FileNotFoundError:
    pass
  return True


def _second(path: Path) -> Path:
  return path.with_name(f'{path.name}.owner')


def _names(path: Path, handle: int) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(handle))
  except FileNotFoundError:
    return False


def _sign(handle: int) -> None:
  os.ftruncate(handle, 0)
  os.write(handle, f'{os.getpid()} {socket.gethostname()}'.encode())


def _read(path: Path) -> str:
  try:
    return path.read_text(errors='replace')
  except OSError:
    return ''


def _owner(path: Path) -> str:
  """The holder of the lock in words."""
  pid, _, host = (_read(_second(path)) or _read(path)).partition(' ')
  if not pid:
    return 'another process'
  return f'process {pid}' + ('' if host == socket.gethostname() else f' on {host}')


def _runs(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True
