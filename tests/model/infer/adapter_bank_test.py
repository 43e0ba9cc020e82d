"""Adapters beside one another: each request gets what the model with its adapter alone gives."""

import jax
import numpy as np
import pytest
from flax import nnx

from model import adapters
from model.adapters import AdapterConfig
from model.config import ModelConfig
from model.infer.engine import Engine
from model.infer.lora_bank import LoraBank
from model.infer.request import Request
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears
from ops import quantized
from ops.lora import LoraTensor
from ops.rope import RopeConfig
from ops.sampling import SamplingConfig

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=16), ffn=FeedForwardConfig(width=48)
)
CONFIG = ModelConfig(
  family='llama', vocab_size=67, width=32, layers=(LAYER,) * 2, max_positions=256,
  rope=RopeConfig(), eos_ids=(2,),
)  # fmt: skip


def _model():
  model = Transformer(CONFIG, rngs=nnx.Rngs(0))
  for i, layer in enumerate(linears(model).values()):
    w_IO = 0.5 * jax.random.normal(jax.random.key(i), layer.weight.shape)
    layer.weight.set_value(quantized.quantize(w_IO, 'int8'))
  return model


def _adapted(model, rank, targets, seed):
  config = AdapterConfig(rank=rank, alpha=4.0 * rank, targets=targets)
  adapted = adapters.attach(model, config, key=jax.random.key(seed))
  for i, layer in enumerate(linears(adapted).values()):
    w = layer.weight.get_value()
    if isinstance(w, LoraTensor):  # B begins with zeros
      b_RO = 0.1 * jax.random.normal(jax.random.key(seed + i), w.b_RO.shape)
      layer.weight.set_value(LoraTensor(w.base, w.a_IR, b_RO, w.scale))
  return adapted


MODEL = _model()
ADAPTERS = {
  'all': _adapted(MODEL, 3, ('layers.*',), 10),
  'queries': _adapted(MODEL, 5, ('layers.*.attention.query',), 20),
}


def _requests():
  rng = np.random.default_rng(1)
  for i in range(12):
    yield Request(
      prompt=[*range(3, 40), *rng.integers(3, 67, 4).tolist()],  # they share a beginning
      max_new_tokens=12,
      sampling=SamplingConfig(temperature=(0.0, 0.9)[i % 2]),
      seed=i,
      adapter=(None, 'all', 'queries')[i % 3],
    )


def test_each_request_gets_its_adapter():
  together = Engine(MODEL, slots=2, capacity=96, part=32, adapters=ADAPTERS)
  found, requests = {}, list(_requests())
  for request, new in zip(requests, together.run(requests)):
    found.setdefault(request.adapter, []).append(new)
  assert together.metrics.prefix_hits > 0
  for name, model in {None: MODEL, **ADAPTERS}.items():
    own = [request for request in requests if request.adapter == name]
    alone = Engine(model, slots=1, capacity=96, part=32)
    plain = [Request(**{**vars(request), 'adapter': None}) for request in own]
    assert found[name] == alone.run(plain)
  assert found[None] != found['all'] != found['queries']


def test_rows_of_a_product_take_their_own_corrections(rng):
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  base, some = (
    normal(6, 5),
    [LoraTensor(None, normal(6, r), normal(r, 5), s) for r, s in ((2, 3.0), (4, 0.5))],
  )
  bank = LoraBank.of(
    jax.numpy.asarray(base), [some[0], None, some[1]], np.asarray([3, 0, 2, 1], np.int32)
  )
  x = normal(4, 7, 6)
  corrections = [some[1], None, None, some[0]]
  for row, (own, y) in enumerate(zip(corrections, bank.matmul(jax.numpy.asarray(x)))):
    w = base if own is None else base + own.scale * own.a_IR @ own.b_RO
    np.testing.assert_allclose(y, x[row] @ w, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match='3 rows, but 4 chose'):
    bank.matmul(jax.numpy.asarray(x[:3]))


def test_what_cannot_be_served_beside_others_is_refused():
  engine = lambda **named: Engine(MODEL, slots=1, capacity=96, adapters=named)
  with pytest.raises(ValueError, match='corrects no matrix'):
    engine(same=MODEL)
  dora = adapters.attach(MODEL, AdapterConfig(rank=2, dora=True), key=jax.random.key(0))
  with pytest.raises(ValueError, match=r'of its own in layers\.0\..*only LoRA over'):
    engine(dora=dora)
  more = nnx.clone(ADAPTERS['all'])  # its embedding was trained as well, as modules_to_save are
  more.embedding.table.set_value(1.5 * more.embedding.table.get_value())
  with pytest.raises(ValueError, match=r'of its own in embedding\.table'):
    engine(more=more)
  with pytest.raises(ValueError, match="no adapter 'other'; there are: all"):
    engine(all=ADAPTERS['all']).add(Request(prompt=[5], max_new_tokens=1, adapter='other'))
