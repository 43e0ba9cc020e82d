r"""Writes the generated parts of README.md and docs/: tables, pictures, techniques, the tree.

  python -m experiments.update_readme            # rewrites the files
  python -m experiments.update_readme --check    # exits with 2 if one is out of date

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`; `PARTS` lists them with their files.
Numbers come only from the committed records in experiments/results. A part whose records are not
committed yet is left out, and has to stand in its file as soon as they are.

Device: any. Minutes: below 1.
"""

import ast
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

from absl import flags

from experiments import (
  common,
  pictures,
  quality_tables,
  serving_tables,
  study_tables,
)
from experiments import lessons as lessons  # its techniques
from experiments.speed_tables import beside_peers, decoding, grouped, long_texts, retrofit
from model.compress import registry

CHECK = flags.DEFINE_bool('check', False, 'Only say whether the files are up to date.')
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results'
SHOWN = ('ops', 'model', 'experiments')
EMBEDDED, MEASURING = quality_tables.EMBEDDED, 'docs/measuring.md'
COMPRESSING, TRAINING = quality_tables.COMPRESSING, 'docs/training.md'
# A full stop before a capital letter or code, but not that of an abbreviation.
SENTENCE_END = re.compile(r'(?<=\.)(?<!et al\.)(?<!e\.g\.)\s+(?=[A-Z`])')


def main() -> None:
  for name in dict.fromkeys(part.file for part in PARTS):
    path = ROOT / name
    old = path.read_text()
    new = render(name, old)
    if CHECK.value and new != old:
      raise ValueError(f'{name} is out of date; run python -m experiments.update_readme')
    if new != old:
      path.write_text(new)
      print(f'{name} was rewritten', file=sys.stderr)
  pictures.update(RESULTS, check=CHECK.value)


def render(file: str, text: str) -> str:
  """The text of a file with its generated parts made anew. Raises ValueError if one is missing."""
  for part in PARTS:
    if part.file != file or not part.has_records():
      continue
    pattern = re.compile(rf'(<!-- {part.name} -->\n).*?(\n?<!-- /{part.name} -->)', re.DOTALL)
    body = part.generate(*part.paths())
    text, count = pattern.subn(lambda m, body=body: f'{m[1]}{body}\n{m[2].lstrip()}', text)
    if count != 1:
      raise ValueError(f'{file} needs the part {part.name} once, not {count} times')
  return text


def techniques() -> str:
  """The registry as a table."""
  lines = ['| technique | what it does | options | paper |', '| --- | --- | --- | --- |']
  for row in registry.TECHNIQUES.values():
    options = ', '.join(f'`{name}`' for name in row.spec.__dataclass_fields__)
    author, _, url = row.paper.rpartition(', ')
    lines.append(f'| `{row.name}` | {row.summary} | {options} | [{author}]({url}) |')
  return '\n'.join(lines)


def tree() -> str:
  """A table for each folder: its files and the first sentences of their docstrings."""
  folders = sorted({path.parent for name in SHOWN for path in (ROOT / name).rglob('*.py')})
  return '\n\n'.join('\n'.join(_folder(folder)) for folder in sorted(folders, key=_order))


def _order(folder: pathlib.Path) -> tuple:
  parts = folder.relative_to(ROOT).parts
  return SHOWN.index(parts[0]), parts


def _folder(folder: pathlib.Path) -> Iterator[str]:
  yield f'## {folder.relative_to(ROOT)}/\n'
  yield f'{_first_sentence(folder / "__init__.py")}\n'
  files = [path for path in sorted(folder.glob('*.py')) if path.name != '__init__.py']
  if files:
    yield '| file | what it does |'
    yield '| --- | --- |'
  for path in files:
    name = path.relative_to(ROOT)
    yield f'| [`{path.name}`](../{name}) | {_first_sentence(path)} |'


def _first_sentence(path: pathlib.Path) -> str:
  docstring = ast.get_docstring(ast.parse(path.read_text())) or ''
  paragraph = docstring.split('\n\n')[0].replace('\n', ' ').replace('|', '\\|')
  return SENTENCE_END.split(paragraph, maxsplit=1)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A generated part of a file, made from records of `experiments/results`."""

  file: str
  name: str
  generate: Callable[..., str]
  results: tuple[str, ...] = ()

  def paths(self) -> list[pathlib.Path]:
    return [RESULTS / name for name in self.results]

  def has_records(self) -> bool:
    return all(path.is_file() for path in self.paths())


PARTS = (
  Part(file='README.md', name='real', generate=quality_tables.real, results=('smollm2_cpu.jsonl',)),
  Part(
    file=EMBEDDED, name='results', generate=quality_tables.results, results=('compress_cpu.jsonl',)
  ),
  Part(
    file=COMPRESSING,
    name='formats',
    generate=quality_tables.quality,
    results=('formats_smollm2_cpu.jsonl',),
  ),
  Part(
    file=COMPRESSING,
    name='heads',
    generate=quality_tables.quality,
    results=('heads_smollm2_cpu.jsonl',),
  ),
  Part(file='README.md', name='decoding', generate=decoding, results=('decode_cpu.jsonl',)),
  Part(
    file=COMPRESSING,
    name='experts',
    generate=functools.partial(decoding, page=COMPRESSING),
    results=('decode_olmoe_cpu.jsonl',),
  ),
  *(
    Part(
      file=COMPRESSING,
      name=name,
      generate=functools.partial(decoding, page=COMPRESSING),
      results=(f'{name}.jsonl',),
    )
    for name in ('decode_tinyllama_gpu', 'decode_olmoe_gpu')
  ),
  Part(file=COMPRESSING, name='grouped_gpu', generate=grouped, results=('grouped_gpu.jsonl',)),
  Part(
    file='docs/compressing.md',
    name='structured',
    generate=quality_tables.structured,
    results=('structured_smollm2_cpu.jsonl',),
  ),
  Part(
    file=COMPRESSING,
    name='peer',
    generate=quality_tables.peer,
    results=('llm_compressor_smollm2_cpu.jsonl',),
  ),
  Part(
    file=COMPRESSING,
    name='llama_cpp',
    generate=quality_tables.llama_cpp,
    results=('llama_cpp_smollm2_cpu.jsonl',),
  ),
  *(
    Part(
      file=COMPRESSING if name in study_tables.OF_COMPRESSING else TRAINING,
      name=name,
      generate=study_tables.study,
      results=(f'{name}.jsonl',),
    )
    for name in study_tables.STUDIES
  ),
  Part(
    file=TRAINING,
    name='study_attention_1600',
    generate=study_tables.study,
    results=('study_attention_1600.jsonl',),
  ),
  Part(
    file=TRAINING,
    name='essay',
    generate=study_tables.essay,
    results=('study_distillation.jsonl', 'study_speed.jsonl'),
  ),
  Part(
    file=TRAINING,
    name='training_gpu',
    generate=study_tables.training,
    results=('training_gpu.jsonl',),
  ),
  *(
    Part(file=TRAINING, name=name, generate=study_tables.fine_tuning, results=(f'{name}.jsonl',))
    for name in ('finetune_smollm2_gpu', 'finetune_smollm2_cpu')
  ),
  Part(
    file=TRAINING,
    name='healing_smollm2_gpu',
    generate=study_tables.healing,
    results=('healing_smollm2_gpu.jsonl',),
  ),
  *(
    Part(
      file=serving_tables.PAGE, name=name, generate=table, results=(f'{name}_smollm2_cpu.jsonl',)
    )
    for name, table in (
      ('serving', serving_tables.servers),
      ('speculation', serving_tables.drafts),
      ('cascade', serving_tables.cascades),
    )
  ),
  Part(file=MEASURING, name='long', generate=long_texts, results=('long_context_cpu.jsonl',)),
  Part(
    file=MEASURING,
    name='long_peers',
    generate=functools.partial(beside_peers, page=MEASURING),
    results=('long_peers_smollm2_cpu.jsonl',),
  ),
  *(
    Part(
      file=COMPRESSING,
      name=name,
      generate=functools.partial(retrofit, page=COMPRESSING),
      results=(f'{name}_smollm2_cpu.jsonl',),
    )
    for name in ('retrofit', 'chosen')
  ),
  Part(file='docs/techniques.md', name='techniques', generate=techniques),
  Part(file='docs/tree.md', name='tree', generate=tree),
)


if __name__ == '__main__':
  common.run(main)
