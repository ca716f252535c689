"""Packed documents are the documents alone: logits, gradients, and nothing of a neighbour."""

import pytest
import torch
import transformers as tf
from packaging import version

from lorakit.core.errors import UsageError
from lorakit.models import enable_packing
from lorakit.models import packing as packing_module

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITHOUT_GROUPS = {name: value for name, value in SIZE.items() if name != "num_key_value_heads"}
CAPPED = {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}

PACKED = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZE)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)),
    "gemma2, softcap and window 4": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZE, **CAPPED)),
    "mistral, window 4": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZE, sliding_window=4)),
    "llama4, chunks of 4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**SIZE, head_dim=8, num_local_experts=2, attention_chunk_size=4, intermediate_size_mlp=48)
    ),
    "bert, both directions": lambda: tf.BertForMaskedLM(tf.BertConfig(**WITHOUT_GROUPS)),
}
REFUSED = {
    "gpt-oss, attention sinks": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZE, head_dim=8, num_local_experts=2)),
    "bloom, attention of its own": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(
            vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    ),
    "t5, encoder and decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=97, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    ),
    "a classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZE)),
}
# Gemma 2 takes its softmax in float32 whatever the weights are, Llama 4 its rotation.
ROUGH = {"gemma2, softcap and window 4", "llama4, chunks of 4"}
LENGTHS = [7, 1, 12, 6]  # longer than every window and chunk


def made(kind, dtype=None):
    torch.manual_seed(0)
    build = PACKED[kind] if kind in PACKED else REFUSED[kind]
    model = build().to(dtype or (torch.float32 if kind in ROUGH else torch.float64)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)  # strong attention, so that a leak shows
    return model


def enabled(model, kind):
    """Older transformers has no cap under SDPA and counts chunks across documents: the proof has to fail there."""
    proven = enable_packing(model)
    if not proven and kind in ROUGH and version.parse(tf.__version__) < version.parse("5.23"):
        pytest.skip(f"transformers {tf.__version__} computes another attention")
    return proven


def documents(seed=1):
    return list(torch.randint(3, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed)).split(LENGTHS))


def packed_logits(model, docs, **options):
    lengths = [len(doc) for doc in docs]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return model(torch.cat(docs)[None], position_ids=positions, lengths=lengths, use_cache=False, **options).logits[0]


def logits_alone(model, docs):
    return torch.cat([model(doc[None], use_cache=False).logits[0] for doc in docs])


def gradients(model, logits):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_is_alone_in_logits_and_gradients(kind):
    model, docs = made(kind), documents()
    alone = logits_alone(model, docs)
    expected = gradients(model, alone)
    assert enabled(model, kind)
    together = packed_logits(model, docs)
    tolerance = 1e-4 if kind in ROUGH else 1e-9
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients(model, together).items():
        torch.testing.assert_close(gradient, expected[name], rtol=10 * tolerance, atol=10 * tolerance, msg=name)


@pytest.mark.parametrize("kind", PACKED)
def test_a_poisoned_neighbour_changes_nothing(kind):
    model, docs = made(kind), documents()
    assert enabled(model, kind)
    before = packed_logits(model, docs).split(LENGTHS)
    for poisoned in range(len(docs)):
        other = [documents(seed=9)[i] if i == poisoned else doc for i, doc in enumerate(docs)]
        after = packed_logits(model, other).split(LENGTHS)
        for i in range(len(docs)):
            assert torch.equal(before[i], after[i]) == (i != poisoned), (i, poisoned)


@pytest.mark.parametrize("kind", [kind for kind in PACKED if "bert" not in kind])
def test_without_lengths_nothing_has_changed(kind):
    model = made(kind)
    ids, mask = torch.stack([torch.arange(10, 24), torch.arange(30, 44)]), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    logits, written = model(ids, attention_mask=mask).logits[:, 5:], model.generate(ids, **options)
    assert enabled(model, kind)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 5:], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(ids, **options), written)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gemma2, softcap and window 4"])
def test_the_lengths_arrive_again_when_checkpointing_recomputes(kind):
    model, docs = made(kind), documents()
    assert enabled(model, kind)
    expected = gradients(model, packed_logits(model, docs))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for name, gradient in gradients(model, packed_logits(model, docs)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_pack_is_left_as_it_was(kind):
    model = made(kind, torch.float32)
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before and not model.training


@pytest.mark.parametrize("fault", ["sees everything", "scores scaled", "lengths ignored"])
def test_the_proof_finds_a_wrong_attention(fault, monkeypatch):
    right = packing_module._document

    def wrong(q, k, v, pattern, dropout, scaling, softcap):
        if fault == "sees everything":
            pattern = packing_module.Pattern(False, None)
        return right(q, k, v, pattern, dropout, scaling * (2 if fault == "scores scaled" else 1), softcap)

    def careless(module, *args, lengths=None, **kwargs):
        return packing_module._ordinary(module, *args[:3], None, 0.0, kwargs["scaling"], None, None, {})

    if fault == "lengths ignored":
        monkeypatch.setattr(packing_module, "packed_attention", careless)
    else:
        monkeypatch.setattr(packing_module, "_document", wrong)
    model = made("llama", torch.float32)
    assert not enable_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_documents_that_do_not_fill_the_row_are_refused():
    model = made("llama")
    assert enable_packing(model)
    for ids, lengths in ((torch.ones(1, 9, dtype=torch.long), [4, 4]), (torch.ones(2, 4, dtype=torch.long), [4, 4])):
        with pytest.raises(UsageError, match="must fill one row"):
            model(ids, lengths=lengths)
    with pytest.raises(UsageError, match="no padding to mask"):
        model(torch.ones(1, 8, dtype=torch.long), attention_mask=torch.ones(1, 8), lengths=[4, 4])


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_of_a_long_document_is_read_in_slices(window, monkeypatch):
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    monkeypatch.setattr(packing_module, "_ROWS", 4)
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask = packing_module.packed_mask(batch_size=1, q_length=30, kv_length=30, mask_function=function)
    causal, found = mask.document(5, 11)
    if window is None:
        assert causal and found is None
    else:
        rows, columns = torch.arange(11)[:, None], torch.arange(11)[None]
        assert not causal and torch.equal(found, (columns <= rows) & (columns > rows - window))


@pytest.mark.parametrize("length", [40, 600])
def test_bfloat16_is_as_exact_as_sdpa(length):
    """Short documents take the explicit way, long ones SDPA: both within bfloat16 of the float64 answer."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 16, dtype=torch.float64) for heads in (6, 2, 2))
    half = [tensor.to(torch.bfloat16) for tensor in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.double() for tensor in half), is_causal=True, enable_gqa=True
    )
    ours = packing_module._document(*half, packing_module.Pattern(True, None), 0.0, None, None)
    assert (ours.double() - exact).norm() / exact.norm() < 5e-3


def test_the_built_in_model_packs(built_in):
    from lorakit.models import load

    built_in("smollm2")
    model = load("smollm2", dtype="bfloat16", device="cpu").model
    docs = documents()
    alone = logits_alone(model, docs)
    assert enable_packing(model)
    together = packed_logits(model, docs)
    assert (together - alone).norm() / alone.norm() < 0.02
    assert (together.argmax(-1) == alone.argmax(-1)).float().mean() > 0.85


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_kernel_for_all_documents_on_a_gpu(monkeypatch):
    calls = []
    right = packing_module._in_one_kernel
    monkeypatch.setattr(packing_module, "_in_one_kernel", lambda *args: calls.append(1) or right(*args))
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZE, "hidden_size": 256})).to("cuda", torch.bfloat16).eval()
    docs = [doc.cuda() for doc in documents()]
    alone = logits_alone(model, docs)
    assert enable_packing(model)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    together = model(torch.cat(docs)[None], position_ids=positions, lengths=LENGTHS, use_cache=False).logits[0]
    assert (together - alone).norm() / alone.norm() < 0.02
    assert len(calls) == 2 * SIZE["num_hidden_layers"]  # the proof, and this
    together.float().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
