"""Output folders that appear whole or not at all, with a manifest of what was written.

All that writes a whole folder goes through `claim`, or through its short form `atomic_folder`. The
work is done in a partial folder on the same file system, which takes the place of the output by a
rename. Links are resolved first. A mount point cannot be renamed, nor can a folder whose parent is
read-only. There the partial folder lies inside the output, and its entries are moved at the end.
"""

import contextlib
import dataclasses
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from model import lock, manifest
from model.manifest import check_replaceable

__all__ = [
  'Output',
  'atomic_file',
  'atomic_folder',
  'check_replaceable',
  'claim',
  'make_folder',
  'read_json',
]

ADVICE = 'name another folder'
PROBE_BYTES = 2**20  # a file system with less room than this counts as full
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


@dataclasses.dataclass(frozen=True)
class Output:
  """An output folder that this process holds. Made by `claim`."""

  path: Path  # absolute, without links
  kind: str
  inside: bool  # whether the partial folder lies in `path`, instead of beside it

  def companion(self, name: str) -> Path:
    """The path of a file or folder of our own in or beside the output."""
    if self.inside:
      return self.path / f'{manifest.PREFIX}{name}'
    return self.path.with_name(f'.{self.path.name}.{name}')

  @contextlib.contextmanager
  def writing(self, key: str | None = None) -> Iterator[Path]:
    """Yields the partial folder, which becomes the output when the block succeeds.

    When it does not, the output stays as it was. With a key, the partial folder is kept, and the
    next call with the same key yields it again.

    Raises:
      ValueError: the output has become something that may not be replaced.
      OSError: the disk is full or failed; the error names the output.
    """
    partial = self.companion(f'{key or secrets.token_hex(4)}.partial')
    try:
      with naming(self.path):
        partial.mkdir(exist_ok=key is not None)
        yield partial
        manifest.write(partial, self.kind)
        check_replaceable(self.path, kind=self.kind)
        self._put(partial)
    finally:
      if key is None:
        shutil.rmtree(partial, ignore_errors=True)

  def _put(self, partial: Path) -> None:
    old = self.companion('old')
    shutil.rmtree(old, ignore_errors=True)
    if self.inside:
      _swap_entries(partial, self.path, old)
    else:
      _swap(partial, self.path, old)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def claim(
  path: str | os.PathLike, *, kind: str = 'model', on_wait: Callable[[str], None] | None = None
) -> Iterator[Output]:
  """Holds the output folder `path` for this process, and checks that it can be written.

  If another process holds it, `on_wait` decides as in `lock.hold`. Parents are made, and removed
  again if nothing was written into them.

  Raises:
    ValueError: `path` may not be replaced (see `check_replaceable`), cannot be written, is the
      current folder, or is held by another process.
  """
  path = Path(os.path.realpath(path))
  if path == Path.cwd():
    raise ValueError(f'the output {path} is the current folder; name another one')
  check_replaceable(path, kind=kind)
  output = Output(path, kind, inside=_stays_in_place(path))
  with _made(path if output.inside else path.parent):
    with lock.hold(output.companion('lock'), f'the output folder {path}', on_wait=on_wait):
      check_replaceable(path, kind=kind)  # its last holder may have written it
      yield output


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike, *, kind: str = 'model') -> Iterator[Path]:
  """Yields a partial folder, which takes the place of `path` when the block succeeds.

  A block that raises, or a run that is killed, leaves `path` as it was. An earlier output of the
  same kind is replaced. Another process that writes the same folder is waited for.

  Raises:
    ValueError: as `claim` does.
  """
  with claim(path, kind=kind, on_wait=lambda _: None) as output, output.writing() as partial:
    yield partial


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
  """Yields a file name beside `path`; the file takes the place of `path` if nothing was raised."""
  path = Path(path)
  partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.partial')
  try:
    with naming(path):
      yield partial
      os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def make_folder(folder: str | os.PathLike, advice: str = ADVICE) -> None:
  """Makes a folder and its parents, if they are missing, and checks that it can be written.

  Raises ValueError with the reason and the advice if that fails.
  """
  with _explained(folder, advice):
    Path(folder).mkdir(parents=True, exist_ok=True)
    probe = Path(folder) / f'{manifest.PREFIX}probe.{secrets.token_hex(4)}'
    try:
      with probe.open('wb') as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    finally:
      probe.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Adds `path` to an error of the disk that names no file, as errors of writing do not."""
  try:
    yield
  except OSError as error:
    if error.filename is not None or error.errno not in DISK_ERRORS:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[Path]:
  """Makes a folder and its parents, and removes those of them that are empty in the end."""
  missing = [path for path in (folder, *folder.parents) if not path.exists()]
  try:
    make_folder(folder)
    yield folder
  finally:
    for path in missing:
      with contextlib.suppress(OSError):
        path.rmdir()


@contextlib.contextmanager
def _explained(folder: str | os.PathLike, advice: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ValueError(
      f'{os.fspath(folder)} cannot be written: {error.strerror}; {advice}'
    ) from error


def _stays_in_place(path: Path) -> bool:
  """Whether a folder cannot be renamed: it is a mount point, or its parent is read-only."""
  if not path.is_dir():
    return False
  return os.path.ismount(path) or path in _mounts() or not os.access(path.parent, os.W_OK)


def _mounts() -> set[Path]:
  """The mount points of this machine, those of one file system twice included (Linux)."""
  try:
    lines = Path('/proc/self/mountinfo').read_text(errors='surrogateescape').splitlines()
  except OSError:
    return set()
  escaped = (line.split()[4].encode(errors='surrogateescape') for line in lines)
  return {Path(os.fsdecode(name.decode('unicode_escape').encode('latin-1'))) for name in escaped}


def _swap(partial: Path, path: Path, old: Path) -> None:
  if path.exists():
    path.rename(old)
  try:
    partial.rename(path)
  except OSError:
    if old.exists():
      old.rename(path)
    raise


def _swap_entries(partial: Path, path: Path, old: Path) -> None:
  """Moves what `path` holds away and the new entries in.

  At every moment, the manifest accounts for all that is there, so a kill leaves a folder that the
  next run replaces.
  """
  old.mkdir()
  for entry in list(path.iterdir()):
    if not entry.name.startswith(manifest.PREFIX):
      entry.rename(old / entry.name)
  os.replace(partial / manifest.NAME, path / manifest.NAME)
  for entry in list(partial.iterdir()):
    entry.rename(path / entry.name)
  partial.rmdir()


def read_json(path: str | os.PathLike) -> dict:
  """Reads a file that holds one JSON object. Raises ValueError if it holds anything else."""
  try:
    data = json.loads(Path(path).read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from None
  if not isinstance(data, dict):
    raise ValueError(f'{path} must hold one JSON object, not {type(data).__name__}')
  return data
