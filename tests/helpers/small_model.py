"""A model that vLLM serves, small enough to start in seconds."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch.planning import model_folder


def save_model(folder: Path) -> None:
    """Save a SmolLM2 with two layers of random weights, and the real tokenizer."""
    source = model_folder.smollm2()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in source.glob("*"):
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
