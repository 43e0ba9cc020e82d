"""The main job's wrong input: one line, before any work, and nothing is left behind."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags
from flax import nnx

from experiments import base as embedded
from experiments import comparison, study
from model import hf, manifest
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def script(make_script, base):
  yield make_script('compress')
  flags.FLAGS.unparse_flags()


# What goes wrong before any model is loaded: (arguments, message).
EARLY = {
  'unknown recipe': (['--recipes=int9'], "unknown recipe 'int9'; did you mean int8"),
  'unknown technique': (['--recipes=wandaa'], 'did you mean wanda'),
  'no recipe file': (['--recipes=mine.yaml'], 'there is no recipe file mine.yaml'),
  'no recipe': (['--recipes='], '--recipes is empty; name recipes'),
  'an empty recipe': (['--recipes=int8,'], "unknown recipe ''"),
  'recipe twice': (['--recipes=int8,int8'], 'names int8 twice'),
  'two budgets': (['--max_megabytes=1', '--max_ppl_ratio=1.1'], 'not both'),
  'no such task': (['--tasks=python_lines,mmlu'], "'mmlu' is no task; there are python_words"),
  'task twice': (['--tasks=python_lines,python_lines'], "'python_lines' is named twice"),
  'no megabytes': (['--max_megabytes=0'], '--max_megabytes must be above 0, not 0'),
  'negative ratio': (['--max_ppl_ratio=-1'], '--max_ppl_ratio must be above 0'),
  'ratio that is no number': (['--max_ppl_ratio=nan'], 'a positive number, not nan'),
  'no price': (['--price_per_hour=0'], '--price_per_hour must be a number above 0, not 0'),
  'no country': (['--codecarbon'], '--codecarbon needs the country'),
  'text alone': (['--text=x.txt'], '--text needs a --model'),
  'no such model': (['--model=no/such/folder/x'], 'no folder'),
  'no such hub model': (['--model=nobody/nothing'], 'could not be fetched'),
  'no plug-in': (['--plugins=none.py'], 'there is no plug-in none.py'),
  'plug-in that is no Python': (['--plugins=README'], 'there is no plug-in README'),
}
FLAGS = (
  ['--seq_len=1'],
  ['--calibration_rows=0'],
  ['--rounds=1'],
  ['--max_windows=-1'],
  ['--max_megabytes=few'],
  ['--seq_length=64'],
)


@pytest.fixture
def refused(script, tmp_path, monkeypatch):
  """A function that runs the script and returns what it says, having done and left nothing."""

  def forbidden(*args, **kwargs):
    raise AssertionError('work was done')

  monkeypatch.setattr(study, 'baseline', forbidden)

  def run(*arguments) -> str:
    out = tmp_path / 'results' / 'out'
    with pytest.raises(ValueError) as error:
      script('--smoke', f'--out={out}', *arguments)
    assert not out.parent.exists()
    return str(error.value)

  return run


@pytest.mark.parametrize('case', EARLY)
def test_bad_input_is_refused_before_a_model_is_loaded(refused, script, monkeypatch, case):
  arguments, message = EARLY[case]
  monkeypatch.setattr(embedded, 'load_or_train', None)
  found = refused(*arguments)
  assert message in found
  assert '\n' not in found


@pytest.mark.parametrize('arguments', FLAGS, ids=lambda arguments: arguments[0])
def test_bad_flags_are_refused(script, arguments):
  with pytest.raises(flags.Error):
    script('--smoke', *arguments)


CHECKPOINTS = {
  'missing tensor': 'missing: model.layers.1.mlp.up_proj.weight (384, 128)',
  'extra tensor': 'unexpected: extra (3,)',
  'misshapen tensor': 'misshapen: model.layers.1.mlp.up_proj.weight is (384, 127), not (384, 128)',
  'nan': 'NaN or infinity in (1):\n  model.layers.1.mlp.up_proj.weight',
  'infinity': 'NaN or infinity in (1)',
  'truncated': 'model.safetensors',
  'another tokenizer': 'they do not belong together',
  'no tokenizer': 'has no tokenizer',
  'only pickles': 'holds its weights as pickles',
  'no config': 'has no config.json',
  'broken config': 'is no JSON',
}


@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused(refused, damaged, kind):
  assert CHECKPOINTS[kind] in refused(f'--model={damaged(kind)}')


TEXTS = {
  'too short': ('A text of a few words.\n' * 3, 'too little text|fewer than one window of 64'),
  'short': (''.join(f'Line {i} of a few words.\n' for i in range(30)), 'fewer than one window'),
  'empty': ('', 'empty'),
  'not UTF-8': ('caf\udce9', 'not UTF-8'),
}


@pytest.mark.parametrize('kind', TEXTS)
def test_unusable_text_is_refused(refused, base, tmp_path, kind):
  text, message = TEXTS[kind]
  path = tmp_path / 'text.txt'
  path.write_bytes(text.encode(errors='surrogateescape'))
  found = refused(f'--model={base}', f'--text={path}')
  assert any(part in found for part in message.split('|'))
  assert 'no such file' in refused(f'--model={base}', f'--text={tmp_path / "none"}')


def test_a_recipe_that_does_not_fit_the_model_is_refused(refused, tmp_path):
  path = tmp_path / 'mine.yaml'
  path.write_text('name: mine\nsteps: [{round_to_nearest: {format: int4, group_size: 96}}]')
  found = refused(f'--recipes=int8,{path}')
  assert 'recipe mine: round_to_nearest on layers.0.' in found
  assert 'a group size of 96 does not divide 128 inputs' in found


def test_windows_beyond_learned_positions_are_refused(refused, base, tmp_path):
  tokenizer = Tokenizer.load(base)
  layer = LayerConfig(
    mixer=AttentionConfig(
      query_heads=2, kv_heads=2, head_width=16, qkv_bias=True, output_bias=True
    ),
    ffn=FeedForwardConfig(width=64, activation='gelu_tanh', gated=False, bias=True),
  )
  config = hf.load_config(base).replace(
    family='gpt2', width=32, layers=(layer,), rope=None, norm='layer', max_positions=32, tied=True
  )
  hf.save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), tokenizer, tmp_path / 'gpt2')
  found = refused(f'--model={tmp_path / "gpt2"}', '--seq_len=64')
  assert 'windows of 64 tokens are longer than the 32 learned positions' in found


@pytest.mark.parametrize('kind', ['stranger', 'stranger beside records', 'file'])
def test_an_output_that_holds_something_else_is_refused(script, tmp_path, monkeypatch, kind):
  out = tmp_path / 'out'
  if kind == 'file':
    out.write_text('mine')
  else:
    out.mkdir()
    (out / 'thesis.tex').write_text('mine')
    if kind != 'stranger':
      (out / 'records.jsonl').touch()
      manifest.write(out, comparison.KIND)
      (out / 'more.tex').touch()
  monkeypatch.setattr(embedded, 'load_or_train', None)
  with pytest.raises(ValueError, match=r'holds something else|is not a folder'):
    script('--smoke', f'--out={out}')
  kept = out if kind == 'file' else out / 'thesis.tex'
  assert kept.read_text() == 'mine'
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_an_output_that_another_process_writes_is_refused(script, tmp_path, monkeypatch):
  code = (
    'import sys\nfrom model.files import claim\n'
    'with claim(sys.argv[1], kind="compress"):\n  print("held", flush=True)\n  sys.stdin.read()\n'
  )
  command = [sys.executable, '-c', code, tmp_path / 'out']
  monkeypatch.setattr(embedded, 'load_or_train', None)
  with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b'held\n'
    with pytest.raises(ValueError, match=f'out is in use by process {other.pid}; wait until'):
      script('--smoke', f'--out={tmp_path / "out"}')
    other.communicate()


def test_a_full_disk_is_found_before_any_work(script, tmp_path, monkeypatch):
  folder = tmp_path / 'm'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', folder]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('mounting is not allowed here')
  monkeypatch.setattr(embedded, 'load_or_train', None)
  try:
    for out in (folder, folder / 'out'):
      with pytest.raises(ValueError, match=f'{folder} cannot be written: No space left on device'):
        script('--smoke', f'--out={out}')
  finally:
    subprocess.run(['umount', folder], check=True)


def test_a_process_ends_with_one_line_and_status_2(tmp_path):
  command = [sys.executable, '-m', 'experiments.compress', '--recipes=int9', '--smoke']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith("error: unknown recipe 'int9'; did you mean int8")
  assert done.stderr.count('\n') == 1
