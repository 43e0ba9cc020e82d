"""Generation: batches against rows, transformers as the oracle, ends, seeds, compilations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from model import hf
from model.config import ModelConfig
from model.eval import cached
from model.infer import generate as generation
from model.infer.generate import generate, pad
from model.infer.prepare import prepare
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears
from ops import quantized
from ops.rope import RopeConfig
from ops.sampling import SamplingConfig

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=4, kv_heads=2, head_width=16), ffn=FeedForwardConfig(width=96)
)
CONFIG = ModelConfig(
  family='llama', vocab_size=89, width=64, layers=(LAYER,) * 2, max_positions=64, bos_id=1
)
LENGTHS = (1, 5, 33)  # of two prompt buckets
DRAW = SamplingConfig(temperature=1.0)


def _model(layer=LAYER, seed=0, **changes) -> Transformer:
  config = CONFIG.replace(layers=(layer,) * 2, **changes)
  model = Transformer(config, rngs=nnx.Rngs(seed))
  for i, linear in enumerate(linears(model).values()):
    # Large enough for the choice of a token to be no matter of rounding.
    linear.weight.set_value(0.2 * jax.random.normal(jax.random.key(i), linear.weight.shape))
  return model


def _int8():
  model = _model()
  for linear in linears(model).values():
    linear.weight.set_value(quantized.quantize(linear.weight.get_value(), 'int8'))
  # Rounded activations could change the choice of a token.
  return prepare(model, activations='float')


MODELS = {
  'plain': _model,
  'int8': _int8,
  'windowed': lambda: _model(LAYER.with_mixer(window=6)),
  'learned positions': lambda: _model(
    LAYER.with_mixer(kv_heads=4).with_ffn(gated=False), family='gpt2', rope=None
  ),
}


@pytest.fixture(scope='module')
def plain():
  return _model()


@pytest.fixture
def prompts(rng):
  return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in LENGTHS]


def _uncached(model, prompt, count):
  """Greedy continuation by whole forward passes over one padded shape."""
  tokens = list(prompt)
  for _ in range(count):
    padded_BT = np.zeros((1, 48), np.int32)
    padded_BT[0, : len(tokens)] = tokens
    tokens.append(int(_logits(model, padded_BT)[0, len(tokens) - 1].argmax()))
  return tokens[len(prompt) :]


def _logits(model, tokens_BT):
  graphdef, state = nnx.split(model)
  return _forward(graphdef, state, tokens_BT)


_forward = jax.jit(lambda graphdef, state, t: nnx.merge(graphdef, state)(t), static_argnums=0)


@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.quick(kind=('int8', 'windowed'))
def test_a_ragged_batch_gives_what_each_row_gives_alone(kind, prompts):
  model = MODELS[kind]()
  together = generate(model, prompts, max_new_tokens=8)
  for prompt, tokens in zip(prompts, together):
    assert tokens == _uncached(model, prompt, 8)
  for row in (0, 2):
    assert together[row] == generate(model, [prompts[row]], max_new_tokens=8)[0]
  assert len({tuple(tokens) for tokens in together}) > 1


@pytest.mark.parametrize('format', ['int8', 'int4'])
@pytest.mark.quick(format=('int4',))
def test_quantized_caches_give_the_tokens_that_evaluation_sees(format, prompts):
  model, count = MODELS['windowed'](), 40  # over the edge of a page
  together = generate(model, prompts, max_new_tokens=count, cache_format=format)
  alone = generate(model, prompts[2:], max_new_tokens=count, cache_format=format)
  assert together[2:] == alone
  # A prompt within one page sees itself exactly however it is fed, so every token has an oracle.
  whole_BT, _ = pad([prompts[row] + together[row] for row in (0, 1)])
  predicted_BT = _one_by_one(model, whole_BT[:, :48], format)
  for b, length in enumerate(LENGTHS[:2]):
    assert together[b] == predicted_BT[b, length - 1 : length - 1 + count].tolist()


@pytest.mark.parametrize('format', ['int8+h2o16', 'snapkv40'])
@pytest.mark.quick(format=('int8+h2o16',))
def test_rows_that_give_tokens_up_do_so_without_their_company(plain, format, rng):
  prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (50, 5)]
  run = functools.partial(generate, plain, max_new_tokens=50)
  together = run(prompts, cache_format=format)
  assert together[1:] == run(prompts[1:], cache_format=format)
  assert together[0] != run(prompts)[0]


def _one_by_one(model, tokens_BT, format):
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, tokens_BT):
    model = nnx.merge(graphdef, state)
    return model.logits(cached.hidden(model, tokens_BT, format, piece=1)).argmax(-1)

  return np.asarray(run(state, tokens_BT))


def test_dynamic_rope_goes_by_the_length_of_each_row(prompts):
  # Cached keys keep the angles of their time, so whole forward passes are no oracle here.
  model = _model(rope=RopeConfig(kind='dynamic', factor=4.0, original_max_positions=16))
  together = generate(model, prompts, max_new_tokens=8)
  for prompt, tokens in zip(prompts, together):
    assert tokens == generate(model, [prompt], max_new_tokens=8)[0]


def test_greedy_tokens_equal_those_of_transformers(plain, prompts, tmp_path):
  hf.save_pretrained(plain, None, tmp_path / 'x')
  other = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'x', dtype=torch.float32)
  found = generate(plain, prompts, max_new_tokens=20)
  for prompt, tokens in zip(prompts, found):
    out = other.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      max_new_tokens=20,
      do_sample=False,
      pad_token_id=0,
    )
    assert tokens == out[0, len(prompt) :].tolist()


def test_an_end_token_stops_its_row_and_is_left_out(plain, prompts):
  free = generate(plain, prompts, max_new_tokens=8)
  ends = (free[0][2], free[2][0])
  steps = []
  stopping = _model(eos_ids=ends)
  found = generate(stopping, prompts, max_new_tokens=8, on_tokens=steps.append)
  for row, tokens in zip(free, found):
    cut = next((i for i, token in enumerate(row) if token in ends), len(row))
    assert tokens == row[:cut]
  assert len(found[2]) == 0
  assert len(steps) == min(8, 1 + max(map(len, found)))


@pytest.mark.parametrize('count', [1, 2, 8, 9, 10, 20])
def test_tokens_are_the_same_however_many_a_call_takes(plain, prompts, count, monkeypatch):
  steps = []
  whole = generate(plain, prompts[:2], max_new_tokens=20)
  monkeypatch.setattr(generation, 'BURST_S', 0.0)  # streamed one by one
  streamed = generate(plain, prompts[:2], max_new_tokens=count, on_tokens=steps.append)
  assert streamed == [row[:count] for row in whole] == np.stack(steps, 1).tolist()
  assert generate(plain, prompts[:2], max_new_tokens=count) == streamed


def test_generation_ends_early_where_all_rows_have_ended(plain, prompts):
  first = generate(plain, prompts[:1], max_new_tokens=4)[0]
  steps = []
  ended = generate(
    _model(eos_ids=(first[1],)), prompts[:1], max_new_tokens=50, on_tokens=steps.append
  )
  assert ended == [first[: first.index(first[1])]]
  assert len(steps) == first.index(first[1]) + 1


def test_tokens_are_streamed_as_they_come(plain, prompts):
  steps = []
  tokens = generate(plain, prompts, max_new_tokens=5, on_tokens=lambda t: steps.append(t.copy()))
  assert all(step.shape == (3,) and step.dtype == np.int32 for step in steps)
  assert np.stack(steps, 1).tolist() == tokens


def test_no_new_tokens(plain, prompts):
  assert generate(plain, prompts, max_new_tokens=0) == [[], [], []]


def test_a_seed_reproduces_a_sample(plain, prompts):
  run = lambda seed: generate(plain, prompts, max_new_tokens=12, sampling_config=DRAW, seed=seed)
  assert run(3) == run(3)
  assert run(3) != run(4)
  narrow = SamplingConfig(temperature=1.0, top_k=1)
  greedy = generate(plain, prompts, max_new_tokens=6)
  assert generate(plain, prompts, max_new_tokens=6, sampling_config=narrow) == greedy


SETTINGS = {
  'greedy': SamplingConfig(),
  'drawn': DRAW,
  'cut': SamplingConfig(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01),
}


@pytest.mark.parametrize('format', ['float', 'int8'])
@pytest.mark.parametrize('name', SETTINGS)
@pytest.mark.quick(name=('cut',), format=('int8',))
@pytest.mark.slow
def test_company_does_not_change_a_row(plain, rng, name, format):
  run = functools.partial(generate, plain, max_new_tokens=12, cache_format=format)
  prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (3, 1, 40, 17, 8)]
  config = SETTINGS[name]
  alone = [run([prompt], sampling_config=config, seed=7)[0] for prompt in prompts]
  assert run(prompts, sampling_config=config, seed=7) == alone
  assert run(prompts[::-1], sampling_config=config, seed=7) == alone[::-1]
  assert run(prompts[:2], sampling_config=config, seed=7) == alone[:2]


def test_each_row_has_settings_and_a_seed_of_its_own(plain, prompts):
  run = functools.partial(generate, plain, max_new_tokens=12)
  configs = list(SETTINGS.values())
  together = run(prompts, sampling_config=configs, seed=[4, 5, 6])
  for prompt, config, seed, tokens in zip(prompts, configs, [4, 5, 6], together):
    assert run([prompt], sampling_config=config, seed=seed) == [tokens]
  one, other = run(prompts[:1] * 2, sampling_config=DRAW, seed=[1, 2])
  assert one != other
  assert run(prompts[:1] * 2, sampling_config=DRAW, seed=1) == [one, one]


@pytest.mark.slow
def test_samples_follow_the_models_distribution():
  # A vocabulary of 5 and 400 continuations of one prompt: frequencies against probabilities.
  model, tokens = _model(vocab_size=5), []
  for first in range(0, 400, 4):
    seeds = range(first, first + 4)
    drawn = generate(model, [[1, 2, 3]] * 4, max_new_tokens=1, sampling_config=DRAW, seed=seeds)
    tokens.extend(drawn)
  counts_V = np.bincount(np.ravel(tokens), minlength=5)
  logits_V = _logits(model, np.asarray([[1, 2, 3]], np.int32))[0, -1]
  expected_V = 400 * np.asarray(jax.nn.softmax(logits_V))
  chi_squared = ((counts_V - expected_V) ** 2 / expected_V).sum()
  assert chi_squared < 18.5  # the 0.1 % point of 4 degrees of freedom


def test_decode_is_compiled_once_a_bucket(plain, prompts, rng):
  generate(plain, prompts, max_new_tokens=3)
  count = generation._decode._cache_size(), generation._prefill._cache_size()
  other = [rng.integers(0, 89, n).tolist() for n in (64, 40, 2)]
  generate(plain, other, max_new_tokens=20, seed=5)
  generate(_model(seed=1), prompts, max_new_tokens=4)
  assert (generation._decode._cache_size(), generation._prefill._cache_size()) == count


def test_settings_of_another_value_are_not_compiled_again(plain, prompts):
  run = functools.partial(generate, plain, prompts, max_new_tokens=3)
  run(sampling_config=SamplingConfig(temperature=0.7, top_k=5, top_p=0.9), seed=1)
  count = generation._decode._cache_size()
  run(sampling_config=SamplingConfig(temperature=1.1, top_k=7, top_p=0.5), seed=2)
  assert generation._decode._cache_size() == count


def test_prompts_are_padded_on_the_right_to_a_bucket():
  tokens_BT, lengths_B = pad([[1, 2, 3], [4]])
  assert tokens_BT.shape == (2, generation.PROMPT_BUCKET)
  assert tokens_BT[:, :4].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
  assert lengths_B.tolist() == [3, 1]


@pytest.mark.parametrize('length, expected', [(1, 32), (32, 32), (33, 64), (256, 256), (257, 512)])
def test_buckets(length, expected):
  assert generation._bucket(length, 32) == expected


@pytest.mark.parametrize(
  'prompts, count, message',
  [
    ([], 1, 'at least one token'),
    ([[1], []], 1, 'at least one token'),
    ([[1, 89]], 1, 'token 89 is outside the vocabulary of 89'),
    ([[-1]], 1, 'token -1 is outside'),
    ([[1]], -1, 'cannot be negative, as -1 is'),
  ],
)
def test_wrong_requests_are_refused(plain, prompts, count, message):
  with pytest.raises(ValueError, match=message):
    generate(plain, prompts, max_new_tokens=count)


def test_settings_of_other_rows_are_refused(plain):
  with pytest.raises(ValueError, match='there are 2 prompts, but 1 seeds'):
    generate(plain, [[1], [2]], max_new_tokens=1, seed=[3])
  with pytest.raises(ValueError, match='there are 1 prompts, but 2 sampling settings'):
    generate(plain, [[1]], max_new_tokens=1, sampling_config=[DRAW, DRAW])


def test_an_unknown_cache_is_refused(plain):
  with pytest.raises(ValueError, match="'fp4' is not a cache format"):
    generate(plain, [[1]], max_new_tokens=1, cache_format='fp4')


def test_learned_positions_are_a_limit():
  model = MODELS['learned positions']()
  assert len(generate(model, [[1] * 60], max_new_tokens=4)[0]) == 4
  with pytest.raises(ValueError, match='65 positions are needed, but the model has learned 64'):
    generate(model, [[1] * 60], max_new_tokens=5)


def test_half_precision_activations(prompts):
  model = _model()
  model.dtype = jnp.dtype(jnp.bfloat16)  # of the activations
  tokens = generate(model, prompts[1:2], max_new_tokens=3)[0]
  assert tokens[0] == int(_logits(model, np.asarray(prompts[1:2], np.int32))[0, -1].argmax())
  assert len(tokens) == 3
