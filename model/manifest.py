"""The list of files that every output folder carries: what may be replaced, and what may not.

A folder that was written whole has a file `.lissom-manifest.json` with the kind of the output and
the name and size of each file. Another run replaces the folder only if the list is there, is of the
same kind, and accounts for all that the folder holds. Everything else is somebody's work.
"""

import json
import os
from pathlib import Path

PREFIX = '.lissom-'  # of the names that this package puts into an output folder for itself
NAME = f'{PREFIX}manifest.json'
MARK = 'lissom output folder'
MAX_LISTED = 5


def write(folder: str | os.PathLike, kind: str) -> None:
  """Lists the files of a folder. `kind` is a word for the output, such as 'model'."""
  data = {'mark': MARK, 'kind': kind, 'files': contents(folder)}
  text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
  (Path(folder) / NAME).write_text(text + '\n', encoding='utf-8')


def read(folder: str | os.PathLike) -> dict | None:
  """The manifest of a folder, or None if it has none of ours."""
  try:
    data = json.loads((Path(folder) / NAME).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None
  ours = isinstance(data, dict) and data.get('mark') == MARK
  return data if ours and isinstance(data.get('files'), dict) and 'kind' in data else None


def contents(folder: str | os.PathLike) -> dict[str, int]:
  """The size in bytes of each file below a folder, by its path; 0 for links and empty folders.

  Names at the top that begin with PREFIX are left out.
  """
  folder, found = Path(folder), {}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if name.startswith(PREFIX):
      continue
    if path.is_symlink():
      found[name] = 0
    elif path.is_dir():
      found |= {} if any(path.iterdir()) else {f'{name}/': 0}
    else:
      found[name] = path.stat().st_size
  return found


def check_replaceable(path: str | os.PathLike, *, kind: str = 'model') -> None:
  """Checks that an output of this kind may take the place of `path`.

  Raises:
    ValueError: `path` is a file, or a folder that is not empty and not an earlier output.
  """
  path = Path(path)
  if path.is_dir():
    problem = _problem(path, kind)
    if problem:
      raise ValueError(f'the output folder {path} {problem}; name a new folder, or empty it')
  elif os.path.lexists(path):
    raise ValueError(f'the output {path} is not a folder; name a folder')


def _problem(path: Path, kind: str) -> str | None:
  """What speaks against replacing a folder; without a manifest, only its top is read."""
  data = read(path)
  if data is None:
    top = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(PREFIX))
    if not top:
      return None
    return (
      f'holds something else ({_some(top)}): no {NAME} lists it, so it may be your work, or an '
      'output of a version that wrote no such list'
    )
  found = contents(path)
  strangers = [name for name in found if name not in data['files']]
  if strangers:
    return f'holds something else ({_some(strangers)}) besides an earlier output'
  changed = [name for name, size in found.items() if size != data['files'][name]]
  if changed:
    return f'holds an output that was changed since it was written ({_some(changed)})'
  if data['kind'] != kind:
    return f'holds an output of another kind ({data["kind"]}, not {kind})'
  return None


def _some(names: list[str]) -> str:
  more = len(names) - MAX_LISTED
  return ', '.join(names[:MAX_LISTED]) + (f' and {more} more' if more > 0 else '')
