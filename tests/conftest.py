"""A tiny model with a tokenizer and a chat template, as a Hugging Face directory, and rows to train it on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer with ChatML, whose pad token is its end token, as SmolLM2's is."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer) -> Path:
    """A Llama with 3 layers of width 32 and dropout in its attention, so that randomness is put to the test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=0.1,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def still_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny Llama without dropout of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("models") / "still"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.attention_dropout = 0.0
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A BERT of the same size without a classification head."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("models") / "tiny-encoder"
    BertModel(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSONL and give the path."""

    def write(count: int = 23, name: str = "train.jsonl", *, label: bool = False) -> Path:
        file = tmp_path / name
        with file.open("w") as out:
            for i in range(count):
                question, answer = f"{i} plus {i * i % 7}?", f"it is {i + i * i % 7}" + "!" * (i % 5)
                chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                row = (
                    {"text": question + "?!"[i % 2] * 9, "label": ["odd", "even"][i % 2]}
                    if label
                    else {"messages": chat}
                )
                out.write(json.dumps(row) + "\n")
        return file

    return write
