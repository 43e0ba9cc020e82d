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
  task_tables,
  vocabulary_tables,
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


def _parts(file: str, generate: Callable[..., str], *names: str, suffix: str = '') -> list[Part]:
  """A part for each name, with the records of the same name and suffix."""
  return [
    Part(file=file, name=name, generate=generate, results=(f'{name}{suffix}.jsonl',))
    for name in names
  ]


SMOLLM2 = '_smollm2_cpu'
PARTS = (
  Part(
    file='README.md',
    name='real',
    generate=quality_tables.real,
    results=('smollm2_cpu.jsonl',),
  ),
  Part(file='README.md', name='decoding', generate=decoding, results=('decode_cpu.jsonl',)),
  Part(
    file=EMBEDDED,
    name='results',
    generate=quality_tables.results,
    results=('compress_cpu.jsonl',),
  ),
  Part(
    file=COMPRESSING,
    name='experts',
    generate=functools.partial(decoding, page=COMPRESSING),
    results=('decode_olmoe_cpu.jsonl',),
  ),
  Part(
    file=COMPRESSING,
    name='peer',
    generate=quality_tables.peer,
    results=('llm_compressor_smollm2_cpu.jsonl',),
  ),
  *_parts(
    COMPRESSING,
    functools.partial(decoding, page=COMPRESSING),
    'decode_tinyllama_gpu',
    'decode_olmoe_gpu',
  ),
  *_parts(COMPRESSING, grouped, 'grouped_gpu'),
  *_parts(COMPRESSING, quality_tables.quality, 'formats', 'heads', suffix=SMOLLM2),
  *_parts(COMPRESSING, quality_tables.structured, 'structured', suffix=SMOLLM2),
  *_parts(COMPRESSING, quality_tables.llama_cpp, 'llama_cpp', suffix=SMOLLM2),
  *_parts(
    COMPRESSING, functools.partial(retrofit, page=COMPRESSING), 'retrofit', 'chosen', suffix=SMOLLM2
  ),
  *_parts(COMPRESSING, vocabulary_tables.vocabularies, 'vocabularies', suffix=SMOLLM2),
  *_parts(COMPRESSING, vocabulary_tables.fertility, 'fertility', suffix=SMOLLM2),
  *_parts(COMPRESSING, study_tables.study, *study_tables.OF_COMPRESSING),
  *_parts(TRAINING, study_tables.study, *study_tables.OF_TRAINING, 'study_attention_1600'),
  Part(
    file=TRAINING,
    name='essay',
    generate=study_tables.essay,
    results=('study_distillation.jsonl', 'study_speed.jsonl'),
  ),
  *_parts(TRAINING, study_tables.training, 'training_gpu'),
  *_parts(TRAINING, study_tables.fine_tuning, 'finetune_smollm2_gpu', 'finetune_smollm2_cpu'),
  *_parts(TRAINING, study_tables.healing, 'healing_smollm2_gpu'),
  *_parts(
    TRAINING,
    functools.partial(vocabulary_tables.vocabularies, page=TRAINING),
    'transplants',
    suffix=SMOLLM2,
  ),
  *_parts(serving_tables.PAGE, serving_tables.servers, 'serving', suffix=SMOLLM2),
  *_parts(serving_tables.PAGE, serving_tables.drafts, 'speculation', suffix=SMOLLM2),
  *_parts(serving_tables.PAGE, serving_tables.cascades, 'cascade', suffix=SMOLLM2),
  Part(file=MEASURING, name='long', generate=long_texts, results=('long_context_cpu.jsonl',)),
  *_parts(MEASURING, functools.partial(beside_peers, page=MEASURING), 'long_peers', suffix=SMOLLM2),
  *_parts(MEASURING, task_tables.tasks, 'tasks', suffix=SMOLLM2),
  *_parts(MEASURING, task_tables.lm_eval, 'lm_eval', suffix=SMOLLM2),
  Part(file='docs/techniques.md', name='techniques', generate=techniques),
  Part(file='docs/tree.md', name='tree', generate=tree),
)


if __name__ == '__main__':
  common.run(main)
