"""generate: what it prints is the prompt and the library's tokens, streamed or not."""

import pytest
from absl import flags

from model import hf
from model.infer.generate import generate
from ops.sampling import SamplingConfig

PROMPTS = ('import os\n', 'def add(a, b):')


@pytest.fixture(scope='module')
def loaded(base):
  return hf.load_pretrained(base)


def _expected(loaded, **options):
  model, tokenizer = loaded
  new = generate(model, [tokenizer.encode(p) for p in PROMPTS], max_new_tokens=12, **options)
  return [p + tokenizer.decode(t, skip_special=True) for p, t in zip(PROMPTS, new)]


def test_one_prompt_is_streamed_and_two_are_printed(script, base, loaded, capsys):
  expected = _expected(loaded)
  script(f'--model={base}', f'--prompt={PROMPTS[0]}', '--max_new_tokens=12')
  assert capsys.readouterr().out == expected[0] + '\n'
  both = [f'--prompt={prompt}' for prompt in PROMPTS]
  script(f'--model={base}', *both, '--max_new_tokens=12')
  assert capsys.readouterr().out == ''.join(f'{text}\n' for text in expected)


def test_sampling_follows_the_seed(script, base, loaded, capsys):
  both = [f'--prompt={prompt}' for prompt in PROMPTS]
  script(f'--model={base}', *both, '--max_new_tokens=12', '--temperature=0.9', '--seed=3')
  config = SamplingConfig(temperature=0.9)
  expected = _expected(loaded, sampling_config=config, seed=3)
  assert capsys.readouterr().out == ''.join(f'{text}\n' for text in expected)


@pytest.mark.parametrize('format', ['int8+h2o16', 'int4'])
@pytest.mark.quick(format=('int8+h2o16',))
@pytest.mark.slow
def test_the_cache_has_the_format_asked_for(script, base, loaded, capsys, format):
  both = [f'--prompt={prompt}' for prompt in PROMPTS]
  script(f'--model={base}', *both, '--max_new_tokens=12', f'--kv_cache={format}')
  expected = _expected(loaded, cache_format=format)
  assert capsys.readouterr().out == ''.join(f'{text}\n' for text in expected)


def test_no_new_tokens(script, base, capsys):
  script(f'--model={base}', f'--prompt={PROMPTS[0]}', '--max_new_tokens=0')
  assert capsys.readouterr().out == PROMPTS[0] + '\n'


def test_characters_of_several_tokens_are_streamed_whole(script, loaded, capsys):
  tokenizer = loaded[1]
  tokens = tokenizer.encode('né 東京 🎉')
  stream, shown = script.module._Stream(tokenizer, tokenizer.encode('>'), ()), []
  for token in tokens:
    stream([token])
    shown.append(capsys.readouterr().out)
  assert '\ufffd' not in ''.join(shown)
  stream.end()
  assert ''.join(shown) + capsys.readouterr().out == 'né 東京 🎉\n'


def test_smoke_and_speed(script, capsys):
  script('--smoke', '--speed')
  shown = capsys.readouterr()
  assert shown.out.startswith('import ')
  assert 'tokens/s' in shown.err


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'needs --model and --prompt'),
    (['--model=BASE'], 'needs --model and --prompt'),
    (['--model=BASE', '--prompt='], '--prompt is empty'),
    (['--model=BASE', '--prompt=x', '--chat'], 'no chat template'),
    (['--model=no/such/folder/x', '--prompt=x'], 'is no folder'),
    (['--smoke', '--top_p=2'], 'top_p must be above 0 and at most 1, not 2'),
    (['--smoke', '--top_k=0'], 'top_k must be at least 1'),
    (['--smoke', '--min_p=-1'], 'min_p must be between'),
    (['--smoke', '--temperature=nan'], 'the temperature must be 0 or more, not nan'),
  ],
)
def test_bad_input_is_refused(script, base, arguments, message):
  with pytest.raises(ValueError, match=message):
    script(*(a.replace('BASE', str(base)) for a in arguments))


@pytest.mark.parametrize(
  'argument',
  ['--temperature=-1', '--max_new_tokens=-1', '--top_k=many', '--kv_cache=int2', '--kv_cache=h2o3'],
)
def test_bad_flags_are_refused(script, argument):
  with pytest.raises(flags.Error):
    script('--smoke', argument)
