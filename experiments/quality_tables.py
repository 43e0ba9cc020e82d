"""Tables on quality and size, from records of the main job and of comparisons."""

import pathlib

from experiments.speed_tables import link, machine, spread
from model.eval import columns, records
from model.eval.records import BASE, Record
from model.eval.select import MEGABYTE

EMBEDDED, COMPRESSING = 'docs/embedded.md', 'docs/compressing.md'


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


def quality(path: pathlib.Path) -> str:
  """The quality and the size of each recipe of one run on one text as a table."""
  rows = records.read(path)
  lines = [
    '| recipe | perplexity | vs base | KL, nats | linear layers, of bf16 | model, MB |',
    f'| --- |{" ---: |" * 5}',
    *(_quality_line(row) for row in rows),
  ]
  commands = ', '.join(f'`{command}`' for command in dict.fromkeys(row.command for row in rows))
  lines.append(f'\n{commands}; records: {link(path, COMPRESSING)}.')
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


def _quality(row: Record, text: str = '') -> list[str]:
  """Perplexity, its change against the base, and the KL divergence from the base."""
  ppl = f'{row.value(f"ppl{text}"):.3f}'
  if row.recipe == BASE:
    return [ppl, '', '']
  change, kl = columns.change(row.value(f'ppl_ratio{text}')), row.value(f'kl_to_base{text}')
  return [ppl, change, f'{kl:.4f}']


def _ratio(row: Record, name: str) -> str:
  return '' if row.recipe == BASE else spread(row, name, '.2f')


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
