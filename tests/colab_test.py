"""The notebooks are tidy, define no algorithm, run, and show what they claim.

The quick tests run two of them with tiny sizes. The claims need a model that has learned something,
so the slow tests run all of them as they are.
"""

import ast
import dataclasses
import json
import os
import pathlib
import re

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / 'colab').glob('*.ipynb'))}
QUICK = {'your_checkpoint', 'your_technique'}
LONGEST_FUNCTION = 10  # lines, with its decorator
TIMEOUT_S = 1200
PROBE = 'import json\nfrom model.transformer import matrices\nprint(json.dumps({}))'
# What a kernel may say on stderr: the training of the small model, and progress bars.
USUAL = re.compile(r'training the base model once, kept in .*|.*\|.*\[\d\d:\d\d.*|\s*')


@dataclasses.dataclass(frozen=True)
class Run:
  """What an executed notebook has put out."""

  cells: list

  def outputs(self, kind: str) -> list:
    """All data of a MIME type, in order."""
    found = [output for cell in self.cells for output in cell.get('outputs', [])]
    return [output.data[kind] for output in found if kind in output.get('data', {})]

  def stream(self, name: str) -> str:
    """All text of stdout or stderr."""
    found = [output for cell in self.cells for output in cell.get('outputs', [])]
    return ''.join(o.text for o in found if o.output_type == 'stream' and o.name == name)

  def table(self, n: int = 0) -> dict[str, list[str]]:
    """The cells of a table by the first cell of each row, without the headings."""
    rows = self.outputs('text/markdown')[n].splitlines()[2:]
    cells = [[cell.strip(' `') for cell in row.strip('|').split('|')] for row in rows]
    return {first: others for first, *others in cells}


@pytest.fixture(scope='module')
def execute(tmp_path_factory):
  """A function (name, probe, smoke) -> the run of a notebook, and the value of an expression."""
  folder = tmp_path_factory.mktemp('notebooks')

  def run(name: str, probe: str, smoke: bool):
    notebook = nbformat.read(PATHS[name], as_version=4)
    notebook.cells.append(new_code_cell(PROBE.format(probe)))
    environment = {name: value for name, value in os.environ.items() if name != 'LISSOM_SMOKE'}
    environment |= {'PYTHONPATH': str(ROOT), 'LISSOM_CACHE': str(folder)}
    client = nbclient.NotebookClient(
      notebook,
      timeout=TIMEOUT_S,
      kernel_name='python3',
      resources={'metadata': {'path': str(folder)}},
    )
    client.execute(env=environment | ({'LISSOM_SMOKE': '1'} if smoke else {}))
    *cells, last = notebook.cells
    done = Run(cells)
    unusual = [s for s in re.split(r'[\r\n]', done.stream('stderr')) if not USUAL.fullmatch(s)]
    assert unusual == []
    return done, json.loads(last.outputs[0].text)

  return run


def _code(path: pathlib.Path) -> list[str]:
  """The code cells, without the commands of IPython."""
  cells = nbformat.read(path, as_version=4).cells
  strip = lambda source: re.sub(r'^(\s*)%.*$', r'\1pass', source, flags=re.MULTILINE)
  return [strip(cell.source) for cell in cells if cell.cell_type == 'code']


def test_there_are_the_five():
  assert list(PATHS) == [
    *('first_look', 'long_context', 'qlora', 'your_checkpoint', 'your_technique'),
  ]
  readme = (ROOT / 'README.md').read_text()
  assert all(f'](colab/{name}.ipynb)' in readme for name in PATHS)


@pytest.mark.parametrize('path', PATHS.values(), ids=PATHS)
def test_a_notebook_is_tidy(path):
  text = path.read_text()
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert nbformat.writes(notebook) == text.rstrip('\n')
  assert notebook.metadata.kernelspec.name == 'python3'
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.mark.parametrize('path', PATHS.values(), ids=PATHS)
def test_it_opens_with_its_claim_and_the_same_installation(path):
  first, second, *_ = nbformat.read(path, as_version=4).cells
  title, claim, *_ = first.source.split('\n\n')
  assert re.fullmatch(r'# [A-Z].*', title)
  assert re.fullmatch(r'\*\*[A-Z][^.]*\.\*\*', claim), 'one sentence'
  assert second.source == nbformat.read(PATHS['qlora'], as_version=4).cells[1].source
  assert re.search(
    r"find_spec\('model'\) is None:\n  %pip install .*git\+\{REPOSITORY\}", second.source
  )


@pytest.mark.parametrize('path', PATHS.values(), ids=PATHS)
def test_it_imports_the_package_and_defines_no_algorithm(path):
  nodes = [node for source in _code(path) for node in ast.walk(ast.parse(source))]
  imported = {node.module.split('.')[0] for node in nodes if isinstance(node, ast.ImportFrom)}
  assert {'experiments', 'model'} <= imported
  assert not any(isinstance(node, ast.ClassDef | ast.AsyncFunctionDef) for node in nodes)
  defined = [node for node in nodes if isinstance(node, ast.FunctionDef)]
  assert [node.name for node in defined] == (['ria'] if path.stem == 'your_technique' else [])
  for node in defined:
    start = min(each.lineno for each in [node, *node.decorator_list])
    assert node.end_lineno - start < LONGEST_FUNCTION


def _size_and_ppl(row):
  return float(row[0]), float(row[1])


def _check_checkpoint(run):
  found = {name: _size_and_ppl(row) for name, row in run.table().items()}
  assert list(found) == ['original', 'compressed', 'loaded again']
  (size, ppl), small = found['original'], found['compressed']
  assert small[0] < 0.4 * size
  assert small[1] == pytest.approx(ppl, rel=0.1)
  assert run.table()['loaded again'] == run.table()['compressed']
  assert run.stream('stdout').count('import os\n') == 2


SHARES_OF_ZEROS = (
  '[float((w == 0).mean()) for n, w in matrices(pruned).items() if n.startswith("layers.")]'
)


def test_a_checkpoint_comes_out_smaller_and_loads_again(execute):
  run, same = execute(
    'your_checkpoint', 'qualities["compressed"].nll_B == qualities["loaded again"].nll_B', True
  )
  assert same
  _check_checkpoint(run)


@pytest.mark.slow
def test_a_technique_of_ten_lines_prunes_a_model(execute):
  run, zeros = execute('your_technique', SHARES_OF_ZEROS, True)
  assert zeros and zeros == pytest.approx([0.5] * len(zeros), abs=1e-3)
  table = run.table()
  assert list(table) == ['magnitude', 'wanda', 'ria']
  ppls = [float(ppl) for (ppl,) in table.values()]
  assert len(set(ppls)) == 3, 'each score leaves another model'
  assert max(ppls) < 2 * min(ppls)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(set(PATHS) - QUICK))
def test_the_others_run_with_tiny_sizes(name, execute):
  run, _ = execute(name, 'SMOKE', True)
  assert len(run.outputs('text/markdown')) >= 1


@pytest.mark.slow
def test_a_first_look_shows_what_bits_cost(execute):
  run, rows = execute(
    'first_look', '{r.recipe: {n: m.value for n, m in r.metrics.items()} for r in records}', False
  )
  assert (
    list(run.table())
    == list(rows)
    == [
      *('base', 'int8', 'int4', 'gptq_int4', 'int3', 'gptq_int3', 'sparsegpt_2of4'),
    ]
  )
  assert len(run.outputs('image/png')) == 1
  assert rows['int8']['ppl_ratio'] == pytest.approx(1, abs=2e-3)
  divergence = {name: row['kl_to_base'] for name, row in rows.items() if name != 'base'}
  assert divergence['int8'] < divergence['gptq_int4'] < divergence['int4']
  assert divergence['gptq_int3'] < divergence['int3']
  sizes = [rows[name]['linear_bytes'] for name in ('base', 'int8', 'int4', 'int3')]
  assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_a_checkpoint_of_some_training_keeps_its_quality(execute):
  run, ratio = execute(
    'your_checkpoint', 'qualities["compressed"].ppl / qualities["original"].ppl', False
  )
  _check_checkpoint(run)
  assert 1 < ratio < 1.03


@pytest.mark.slow
def test_the_technique_beside_magnitude_and_wanda(execute):
  run, _ = execute('your_technique', 'SMOKE', False)
  table = {name: list(map(float, row)) for name, row in run.table().items()}
  assert len(table['ria']) == 3
  assert all(a < b for a, b in zip(table['ria'][1:], table['magnitude'][1:]))


@pytest.mark.slow
def test_merging_says_its_loss(execute):
  run, losses = execute('qlora', 'losses', False)
  base, before, trained, dense, again = losses.values()
  assert trained < before and base < before
  assert dense == pytest.approx(trained, abs=1e-4)
  assert trained < again < before
  sizes = [float(row[0]) for row in run.table().values()]
  assert sizes[4] < sizes[1] == sizes[2] < sizes[3] == sizes[0]


@pytest.mark.slow
def test_a_window_reads_on_where_full_attention_gets_worse(execute):
  run, ends = execute('long_context', 'CONTEXTS', False)
  curves = {name: list(map(float, row)) for name, row in run.table().items()}
  full, streaming = curves['full attention'], curves['window and first tokens']
  assert streaming[-1] < 0.95 * full[-1]
  assert streaming[-1] < 1.1 * streaming[0]
  assert len(run.outputs('image/png')) == 1
  number = lambda cell: float(cell.replace(',', ''))
  caches = {name: [number(cell) for cell in row] for name, row in run.table(1).items()}
  grown = {name: (row[0], row[len(ends) - 1]) for name, row in caches.items()}
  short, long = grown['full attention, float']
  assert long == pytest.approx(short * ends[-1] / ends[0], rel=1e-3)  # the table rounds
  assert grown['full attention, int8'][1] < long / 3
  for bounded in ('full attention, int8+snapkv64', 'window and first tokens, int8'):
    assert grown[bounded][1] < 1.1 * grown[bounded][0] < short
  losses = {name: row[-1] for name, row in caches.items()}
  assert losses['full attention, int8'] == pytest.approx(losses['full attention, float'], rel=1e-2)
