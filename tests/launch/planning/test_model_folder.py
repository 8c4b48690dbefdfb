"""Model folders that are made here: the converted SmolLM2, and random weights of a published shape."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from launch.planning import model_folder


def test_the_converted_tokenizer_splits_digits_off():
    tokenizer = AutoTokenizer.from_pretrained(model_folder.smollm2())
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_random_weights_have_the_shape(tmp_path, monkeypatch):
    shape = model_folder.SHAPES["qwen2.5-3b"] | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    monkeypatch.setitem(model_folder.SHAPES, "small", shape)
    folder = model_folder.random_weights("small", tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.shape == (151936, 32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_parameters_of_the_published_shapes():
    """Their own model cards: 1.54, 3.09 and 7.6 billion parameters."""
    counts = {}
    for name, shape in model_folder.SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(Qwen2Config(**shape))
        counts[name] = round(sum(p.numel() for p in model.parameters()) / 1e9, 2)
    assert counts == {"qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62}
