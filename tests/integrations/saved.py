"""A small model, its tokenizer and a few examples in a folder, for trainers that start from files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

EXAMPLES = [{"instruction": f"count {i}", "input": "", "output": f"{i} {i + 1} {i + 2}"} for i in range(16)]


def save_model(folder: Path) -> None:
    """A Llama of two layers, whose tokens are characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {token: i for i, token in enumerate([*special.values(), *map(chr, range(32, 127))])}
    characters = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), num_key_value_heads=1, **sizes, **ids)).save_pretrained(folder)


def save_examples(folder: Path) -> None:
    folder.mkdir()
    (folder / "counting.json").write_text(json.dumps(EXAMPLES))
    (folder / "dataset_info.json").write_text(json.dumps({"counting": {"file_name": "counting.json"}}))


def same_weights(one: Path, other: Path) -> bool:
    """Whether two safetensors files have the same weights, bit for bit."""
    from safetensors.torch import load_file

    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
