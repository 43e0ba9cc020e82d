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

from experiments import common, pictures, serving_tables, study_tables
from experiments import lessons as lessons  # its techniques
from experiments.speed_tables import decoding, grouped, link, long_texts, machine, retrofit, spread
from model.compress import registry
from model.eval import columns, records
from model.eval.records import BASE, Record
from model.eval.select import MEGABYTE

CHECK = flags.DEFINE_bool('check', False, 'Only say whether the files are up to date.')
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results'
SHOWN = ('ops', 'model', 'experiments')
EMBEDDED, COMPRESSING, TRAINING = 'docs/embedded.md', 'docs/compressing.md', 'docs/training.md'
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


def results(path: pathlib.Path) -> str:
  """The records of one run of the main job as a table, with their command and machine."""
  rows = records.read(path)
  about = rows[0]
  versions = about.environment['versions']
  revision = (about.environment['git_revision'] or 'unknown')[:10]
  lines = [
    '| recipe | perplexity | vs base | KL, nats | linear weights, of bf16 | prefill, vs base '
    '| decode, vs base | |',
    '| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |',
    *(_result_line(row) for row in rows),
  ]
  lines.append(
    f'\n`{about.command}` on {machine(about)} (jax {versions["jax"]}, revision {revision}, seed '
    f'{about.seed}); records: {link(path, EMBEDDED)}.'
  )
  return '\n'.join(lines)


def quality(path: pathlib.Path) -> str:
  """The quality and the size of each recipe of one run on one text as a table."""
  rows = records.read(path)
  lines = [
    '| recipe | perplexity | vs base | KL, nats | linear layers, of bf16 | model, MB |',
    f'| --- |{" ---: |" * 5}',
    *(_quality_line(row) for row in rows),
  ]
  lines.append(f'\n`{rows[0].command}`; records: {link(path, COMPRESSING)}.')
  return '\n'.join(lines)


def _quality_line(row: Record) -> str:
  sizes = f'{row.value("linear_bytes_vs_bf16"):.3f}', f'{row.value("stored_bytes") / MEGABYTE:.1f}'
  return f'| {" | ".join([f"`{row.recipe}`", *_quality(row), *sizes])} |'


def real(path: pathlib.Path) -> str:
  """One run of the main job on a real model and two texts as a table."""
  rows = records.read(path)
  about = rows[0]
  _, other = about.config['texts']
  lines = [
    '| recipe | English: perplexity | vs base | KL, nats | code: perplexity | vs base | KL, nats '
    '| model, MB | linear layers, of bf16 | decode, tokens/s | vs base | |',
    f'| --- |{" ---: |" * 10} --- |',
    *(_real_line(row, other) for row in rows),
  ]
  commands = ', '.join(f'`{command}`' for command in dict.fromkeys(row.command for row in rows))
  lines.append(
    f'\n{commands} on {machine(about)}; KL: divergence from the base per token; decoding '
    f'at batch 1, medians ± half an interquartile range; records: {link(path)}.'
  )
  return '\n'.join(lines)


def _real_line(row: Record, other: str) -> str:
  decode = row.metrics['decode_tokens_per_s']
  cells = [
    f'`{row.recipe}`',
    *_quality(row),
    *_quality(row, f':{other}'),
    f'{row.value("stored_bytes") / MEGABYTE:.1f}',
    f'{row.value("linear_bytes_vs_bf16"):.3f}',
    f'{decode.value:.0f} ± {decode.spread / 2:.0f}',
    _ratio(row, 'decode_speedup'),
    'no kernel' if row.without_kernel else '',
  ]
  return f'| {" | ".join(cells)} |'


def _quality(row: Record, text: str = '') -> list[str]:
  """Perplexity, its change against the base, and the KL divergence from the base."""
  ppl = f'{row.value(f"ppl{text}"):.3f}'
  if row.recipe == BASE:
    return [ppl, '', '']
  change, kl = columns.change(row.value(f'ppl_ratio{text}')), row.value(f'kl_to_base{text}')
  return [ppl, change, f'{kl:.4f}']


def structured(path: pathlib.Path) -> str:
  """One run of the main job with recipes that remove units, on two texts, as a table."""
  rows = records.read(path)
  about = rows[0]
  _, other = about.config['texts']
  lines = [
    '| recipe | parameters, M | English: perplexity | vs base | KL, nats | code: perplexity '
    '| vs base | KL, nats | prefill, vs base | decode, vs base |',
    f'| --- |{" ---: |" * 9}',
    *(_structured_line(row, other) for row in rows),
  ]
  lines.append(
    f'\n`{about.command}` on {machine(about)}; records: {link(path, "docs/compressing.md")}.'
  )
  return '\n'.join(lines)


def _structured_line(row: Record, other: str) -> str:
  cells = [
    f'`{row.recipe}`',
    f'{row.value("parameters") / 1e6:.1f}',
    *_quality(row),
    *_quality(row, f':{other}'),
    _ratio(row, 'prefill_speedup'),
    _ratio(row, 'decode_speedup'),
  ]
  return f'| {" | ".join(cells)} |'


def peer(path: pathlib.Path) -> str:
  """Our compression beside llm-compressor's, one setting a line."""
  rows = records.read(path)
  lines = [
    '| setting | perplexity | llm-compressor | ratio | seconds | llm-compressor | ratio |',
    f'| --- |{" ---: |" * 6}',
    *(_peer_line(row) for row in rows),
  ]
  about, rounds = rows[0], min(row.metrics['seconds'].n for row in rows)
  lines.append(
    f'\nThe perplexity of the uncompressed model is {about.value("base_ppl"):.3f}; '
    f'at least {rounds} round{"s" if rounds > 1 else ""} a setting on {machine(about)}; records '
    f'with their commands: {link(path, COMPRESSING)}.'
  )
  return '\n'.join(lines)


def _peer_line(row: Record) -> str:
  error = row.metrics.get('ppl / peer, standard error')
  cells = [
    f'`{row.recipe}`',
    f'{row.value("ppl"):.3f}',
    f'{row.value("peer_ppl"):.3f}',
    f'{row.value("ppl / peer"):.4f}' + (f' ± {error.value:.4f}' if error else ''),
    f'{row.value("seconds"):.1f}',
    f'{row.value("peer_seconds"):.1f}',
    f'{row.value("seconds / peer"):.2f}',
  ]
  return f'| {" | ".join(cells)} |'


def llama_cpp(path: pathlib.Path) -> str:
  """Our files beside those of llama.cpp, one a line."""
  rows = records.read(path)
  lines = [
    '| file | MB | perplexity in llama.cpp | perplexity here | ratio |',
    f'| --- |{" ---: |" * 4}',
    *(_llama_cpp_line(row) for row in rows),
  ]
  commands = dict.fromkeys(f'`{row.command}`' for row in rows)
  lines.append(
    f'\n{", ".join(commands)} on {machine(rows[0])}; llama-cpp-python '
    f'{rows[0].config["llama_cpp_python"]}; records: {link(path, COMPRESSING)}.'
  )
  return '\n'.join(lines)


def _llama_cpp_line(row: Record) -> str:
  cells = [
    f'`{row.recipe}`',
    f'{row.value("file_bytes") / 1e6:.1f}',
    f'{row.value("peer_ppl"):.3f}',
    f'{row.value("ppl"):.3f}',
    f'{row.value("peer_ppl / ppl"):.4f}',
  ]
  return f'| {" | ".join(cells)} |'


def _result_line(row: Record) -> str:
  cells = [
    f'`{row.recipe}`',
    *_quality(row),
    f'{row.value("linear_bytes_vs_bf16"):.3f}',
    _ratio(row, 'prefill_speedup'),
    _ratio(row, 'decode_speedup'),
    'no kernel' if row.without_kernel else '',
  ]
  return f'| {" | ".join(cells)} |'


def _ratio(row: Record, name: str) -> str:
  return '' if row.recipe == BASE else spread(row, name, '.2f')


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
  Part(file='README.md', name='real', generate=real, results=('smollm2_cpu.jsonl',)),
  Part(file=EMBEDDED, name='results', generate=results, results=('compress_cpu.jsonl',)),
  Part(file=COMPRESSING, name='formats', generate=quality, results=('formats_smollm2_cpu.jsonl',)),
  Part(file=COMPRESSING, name='heads', generate=quality, results=('heads_smollm2_cpu.jsonl',)),
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
    generate=structured,
    results=('structured_smollm2_cpu.jsonl',),
  ),
  Part(
    file=COMPRESSING,
    name='peer',
    generate=peer,
    results=('llm_compressor_smollm2_cpu.jsonl',),
  ),
  Part(
    file=COMPRESSING,
    name='llama_cpp',
    generate=llama_cpp,
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
  Part(
    file='docs/measuring.md', name='long', generate=long_texts, results=('long_context_cpu.jsonl',)
  ),
  Part(
    file=COMPRESSING,
    name='retrofit',
    generate=functools.partial(retrofit, page=COMPRESSING),
    results=('retrofit_smollm2_cpu.jsonl',),
  ),
  Part(file='docs/techniques.md', name='techniques', generate=techniques),
  Part(file='docs/tree.md', name='tree', generate=tree),
)


if __name__ == '__main__':
  common.run(main)
