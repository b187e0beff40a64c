"""The decoder without Python computes what the model computes, or says that it does not know the model."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from bitquilt.core.packing import pack
from bitquilt.core.types import Layer, uniform_plan
from bitquilt.layer.nearest import round_symmetric
from bitquilt.layer.table import solve_rows
from bitquilt.model.linear import QuantizedLinear, replace_module
from bitquilt.model.replace import put_embedding
from bitquilt.model.tables.embedding import QuantizedEmbedding
from bitquilt.model.tables.mixed_rows import MixedEmbedding, MixedHead
from bitquilt.ops import cpu_kernels
from bitquilt.recipes.rtn import RTN
from bitquilt.serve import generation
from bitquilt.serve.cpu_decoder import CpuDecoder

pytestmark = pytest.mark.skipif(not cpu_kernels.built(), reason="the package was installed without its kernels")
SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
    "tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32)),
}


def quantized(family, config, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family(config).eval()
        for parameter in model.parameters():  # norms and biases of 1 and 0 would hide that they are left out
            parameter.data += 0.2 * torch.randn_like(parameter)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            weight = module.weight.detach()
            layer = Layer(name, weight, None, None)
            solved = RTN(bits=4, group_size=16).quantize(layer, uniform_plan(weight.shape[1], 4, 16), None).weight
            replace_module(model, name, QuantizedLinear.from_weight(solved, module.bias))
    return model.to(dtype)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_token_is_the_models(name):
    model = quantized(*FAMILIES[name])
    ids = torch.randint(0, 100, (20,), generator=torch.Generator().manual_seed(1))
    decoder = CpuDecoder(model, 20)
    expected = model(ids[None]).logits[0]
    logits = decoder.begin(ids[:5])
    assert logits is not None
    for i in range(5, 21):
        torch.testing.assert_close(logits, expected[i - 1], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        if i < 20:
            logits = decoder.step(int(ids[i]))
    with pytest.raises(ValueError, match="position is 20; the cache has 20 places"):
        decoder.step(1)


@torch.no_grad()
def test_gains_of_rows_reach_products_and_head_before_the_bias():
    """Some layers have them, some not; the tokens that follow are those of transformers' own loop."""
    model = quantized(*FAMILIES["llama"])
    model.lm_head = QuantizedLinear.from_weight(round_symmetric(model.lm_head.weight.detach(), 6, 16))
    for i, (path, module) in enumerate(list(model.named_modules())):
        if isinstance(module, QuantizedLinear) and (i % 3 or path == "lm_head"):
            generator = torch.Generator().manual_seed(i)
            gains = (torch.rand(module.out_features, generator=generator) + 0.5).to(torch.float8_e4m3fn)
            layout = replace(module.layout, row_gain_dtype=torch.float8_e4m3fn)
            tensors = {**dict(module.named_buffers()), "row_gains": gains}
            replace_module(model, path, QuantizedLinear.from_tensors(tensors, layout, module.bias))
    ids = torch.randint(0, 100, (6,), generator=torch.Generator().manual_seed(2))
    expected = model.generate(ids[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
    decoder = CpuDecoder(model, 20)
    logits = decoder.begin(ids)
    assert logits is not None
    written = ids.tolist()
    for _ in range(12):
        written.append(int(logits.argmax()))
        logits = decoder.step(written[-1])
    assert written == expected
    assert any(module.has_row_gains for module in model.modules() if isinstance(module, QuantizedLinear))
    assert model.lm_head.has_row_gains


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    model = quantized(*FAMILIES["llama"], dtype)
    ids = torch.arange(10)
    decoder = CpuDecoder(model, 10)
    logits = decoder.begin(ids)
    assert logits is not None
    expected = model(ids[None]).logits[0, -1].float()
    assert float((logits - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_quantized_head(tied):
    """Of its own codes, or those of the embedding."""
    model = quantized(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=tied))
    stored = round_symmetric(model.lm_head.weight.detach(), 6, 16)
    if tied:
        put_embedding(model, "model.embed_tokens", QuantizedEmbedding.from_weight(stored))
    else:
        model.lm_head = QuantizedLinear.from_weight(stored)
    ids = torch.arange(12)
    decoder = CpuDecoder(model, 13)
    assert decoder.begin(ids) is not None
    expected = model(torch.cat([ids, torch.tensor([7])])[None]).logits[0, -1]
    torch.testing.assert_close(decoder.step(7), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_head_whose_rows_differ_in_width(tied):
    """Each part is a product of its own whose logits go where its rows are."""
    model = quantized(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=tied))
    widths = torch.tensor([2, 3, 5, 8], dtype=torch.uint8)
    bits = widths[torch.randperm(100, generator=torch.Generator().manual_seed(4)) % 4]
    solved = solve_rows(model.lm_head.weight.detach(), bits, None, 64)
    parts = {f"rows_{width}": (pack(stored), stored.layout) for width, stored in solved.items()}
    if tied:
        put_embedding(model, "model.embed_tokens", MixedEmbedding.of(parts))
    else:
        model.lm_head = MixedHead.of(parts)
    ids = torch.arange(20)
    decoder = CpuDecoder(model, 20)
    expected = model(ids[None]).logits[0]
    logits = decoder.begin(ids[:5])
    for i in range(5, 20):
        torch.testing.assert_close(logits, expected[i - 1], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        logits = decoder.step(int(ids[i]))


@torch.no_grad()
def test_threads_do_not_change_the_logits():
    model = quantized(LlamaForCausalLM, LlamaConfig(**{**SIZES, "hidden_size": 512, "intermediate_size": 512}))
    ids = torch.arange(30)
    decoder = CpuDecoder(model, 30)
    first = decoder.begin(ids).clone()
    torch.set_num_threads(2)
    try:
        assert torch.equal(decoder.begin(ids), first)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64), "otherwise"),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16), "window"),
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=8), "its attention has a window"),
        (LlamaForCausalLM, LlamaConfig(**SIZES, hidden_act="gelu"), "its MLP has no SiLU"),
    ],
)
def test_other_models_are_left_to_transformers(family, config, reason):
    begun = generation.start_generation(quantized(family, config), torch.arange(3), 10)
    assert begun.decoder is None
    assert reason in begun.why


@torch.no_grad()
def test_a_model_that_only_looks_alike_is_found_out(monkeypatch):
    """Norms that add one to their weight, as Gemma's do."""
    model = quantized(*FAMILIES["llama"])
    norm = type(model.model.norm)
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x) * (1 + 1 / self.weight))
    assert CpuDecoder(model, 10).begin(torch.arange(5)) is None
    assert (
        generation.start_generation(model, torch.arange(5), 10).why == "it looks like Llama and computes something else"
    )


def test_an_unquantized_model_is_left_to_transformers():
    begun = generation.start_generation(LlamaForCausalLM(FAMILIES["llama"][1]), torch.arange(3), 10)
    assert (begun.decoder, begun.why) == (None, "a layer is not quantized")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([8, 2, 1, 4, 4, 8, 10], "8 sizes, not 7"),
        ([8, 2, 1, 4, 0, 8, 10, 5], "size is 0"),
        ([8, 3, 2, 4, 4, 8, 10, 5], "do not go together"),
        ([8, 2, 1, 4, 6, 8, 10, 5], "do not go together"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        cpu_kernels.decoder(sizes, 1e-5, 1.0)


def test_layers_that_do_not_fit_are_named():
    decoder = cpu_kernels.decoder([64, 4, 2, 16, 16, 96, 10, 5], 1e-5, 1.0)
    layer = quantized(*FAMILIES["llama"]).model.layers[0]
    good = layer.self_attn.q_proj.settle().native
    with pytest.raises(ValueError, match="7 products and 20 arrays"):
        decoder.add_layer([good], [], 0)
    with pytest.raises(ValueError, match=r"key is not \[32, 64\]"):
        decoder.add_layer([good] * 7, [0] * 20, 0)
    with pytest.raises(ValueError, match="no ends yet"):
        decoder.step(0, 0, 0, 2, 1)
    with pytest.raises(ValueError, match="a norm, cosines and sines"):
        decoder.set_ends(0, 0, 0)
    with pytest.raises(ValueError, match="a decoder has a head"):
        decoder.set_head(0, 0)
    with pytest.raises(ValueError, match=r"the head is \[64, 64\], not \[10, 64\]"):
        decoder.set_product_head(good, 0)


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_whose_storages_move_in_the_middle_of_a_text(name, dtype):
    model = quantized(*FAMILIES[name], dtype)
    ids = list(range(3, 11))
    texts = []
    for moves in (False, True):
        decoder = CpuDecoder(model, 16)
        assert decoder.begin(torch.tensor(ids[:4])) is not None
        found = []
        for token in ids[4:]:
            if moves:
                norm = model.model.norm.weight
                model.share_memory()
                torch.utils.swap_tensors(norm, torch.nn.Parameter(norm.clone()))
                rubbish = [torch.ones_like(tensor) for tensor in model.state_dict().values()]
            found.append(decoder.step(token).clone())
            rubbish = None
        texts.append(torch.stack(found))
    assert rubbish is None
    assert torch.equal(*texts)
