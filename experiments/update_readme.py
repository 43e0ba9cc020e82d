r"""Writes the generated parts of README.md: the techniques, the measured tables, the tree.

  python -m experiments.update_readme            # rewrites README.md
  python -m experiments.update_readme --check    # exits with 2 if it is out of date

A part stands between `<!-- NAME -->` and `<!-- /NAME -->`. Numbers come from the committed records
in experiments/results alone, so a table cannot say what no run has measured.

Device: any. Minutes: below 1.
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator

from absl import flags

from experiments import common
from model.compress import registry
from model.eval import records
from model.eval.records import BASE, Record

CHECK = flags.DEFINE_bool('check', False, 'Only say whether README.md is up to date.')
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results'
SHOWN = ('ops', 'model', 'experiments')


def main() -> None:
  path = ROOT / 'README.md'
  old = path.read_text()
  new = render(old)
  if CHECK.value and new != old:
    raise ValueError('README.md is out of date; run python -m experiments.update_readme')
  if new != old:
    path.write_text(new)
    print('README.md was rewritten', file=sys.stderr)


def render(text: str) -> str:
  """README's text with every generated part made anew. Raises ValueError if one is missing."""
  for name, body in parts().items():
    pattern = re.compile(rf'(<!-- {name} -->\n).*?(\n<!-- /{name} -->)', re.DOTALL)
    text, count = pattern.subn(lambda m, body=body: m[1] + body + m[2], text)
    if count != 1:
      raise ValueError(f'README.md needs the part {name} once, not {count} times')
  return text


def parts() -> dict[str, str]:
  """Every generated part by its name."""
  return {
    'techniques': techniques(),
    'results': results(RESULTS / 'compress_cpu.jsonl'),
    'decoding': decoding(RESULTS / 'decode_cpu.jsonl'),
    'tree': '\n'.join(['```', *tree(), '```']),
  }


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
    f'\n`{about.command}` on {_machine(about)} (jax {versions["jax"]}, revision {revision}, seed '
    f'{about.seed}); records: {_link(path)}.'
  )
  return '\n'.join(lines)


def decoding(path: pathlib.Path) -> str:
  """The records of one run of `benchmark_decode` as a table, ours and the peers', at batch 1."""
  rows = [row for row in records.read(path) if row.config['batch'] == 1]
  lines = [
    '| | prefill, tokens/s | decode, tokens/s | decode, vs float32 | decode, of copy bandwidth |',
    '| --- | ---: | ---: | ---: | ---: |',
    *(_speed_line(row) for row in rows),
  ]
  own = rows[0].config
  lines.append(
    f'\n{own["model"]}{"" if own["tied"] else " with a head of its own"}, random weights, a prompt '
    f'of {own["prompt"]} tokens, a {own["kv_cache"]} cache, '
    f'{rows[0].metrics["decode_tokens_per_s"].n} interleaved rounds on '
    f'{_machine(rows[0])}, medians ± half an interquartile range; records with their command: '
    f'{_link(path)}.'
  )
  return '\n'.join(lines)


def _speed_line(row: Record) -> str:
  ours = 'decode_speedup' in row.metrics
  name = {BASE: 'float32'}.get(row.recipe, row.recipe)
  cells = [
    f'Lissom {name}' if ours else name,
    _spread(row, 'prefill_tokens_per_s', '.0f'),
    _spread(row, 'decode_tokens_per_s', '.0f'),
    _spread(row, 'decode_speedup', '.2f') if ours else '',
    f'{row.value("decode_of_copy"):.0%}' if ours else '',
  ]
  return f'| {" | ".join(cells)} |'


def _machine(row: Record) -> str:
  return f'{row.environment["cpu"]}, {row.environment["cpu_cores"]} cores'


def _link(path: pathlib.Path) -> str:
  return f'[`{path.relative_to(ROOT)}`]({path.relative_to(ROOT)})'


def _result_line(row: Record) -> str:
  value = row.value
  cells = [
    f'`{row.recipe}`',
    f'{value("ppl"):.3f}',
    '' if row.recipe == BASE else f'{value("ppl_ratio") - 1:+.2%}',
    '' if row.recipe == BASE else f'{value("kl_to_base"):.4f}',
    f'{value("linear_bytes_vs_bf16"):.3f}',
    _ratio(row, 'prefill_speedup'),
    _ratio(row, 'decode_speedup'),
    'no kernel' if row.without_kernel else '',
  ]
  return f'| {" | ".join(cells)} |'


def _ratio(row: Record, name: str) -> str:
  return '' if row.recipe == BASE else _spread(row, name, '.2f')


def _spread(row: Record, name: str, digits: str) -> str:
  metric = row.metrics[name]
  return f'{metric.value:{digits}} ± {metric.spread / 2:{digits}}'


def tree() -> Iterator[str]:
  """One line a file: its path and the first sentence of its docstring."""
  for package in SHOWN:
    for path in sorted((ROOT / package).rglob('*.py')):
      name = path.relative_to(ROOT)
      docstring = ast.get_docstring(ast.parse(path.read_text())) or ''
      first = re.split(r'(?<=[.:;])\s', docstring.replace('\n', ' '), maxsplit=1)[0].rstrip('.:;')
      label = f'{name.parent}/' if path.name == '__init__.py' else f'{name}'
      yield f'{label:32} {first}'


if __name__ == '__main__':
  common.run(main)
