"""The exported folder: written whole or not at all; the adapter in PEFT's format; the base's tokenizer files."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from common.files import WEIGHTS
from common.types import UserError
from launch.exporting.names import base_name
from launch.exporting.source import Source, base_file

# Copied as they are, so that they mean the same to every version of transformers and vLLM.
WITH_THE_MODEL = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)


def check_new(out: Path) -> None:
    """Raise UserError for a path at which something is already: only an empty folder may be there."""
    if out.is_symlink() or out.exists():
        if not out.is_dir():
            raise UserError(f"--out {out} is not a folder; name another")
        if any(out.iterdir()):
            raise UserError(f"--out {out} is not empty; name another folder")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, which becomes `out` if the block ends well; otherwise nothing is left.

    Raises UserError if it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            yield made
            made.rename(out)  # fails if something has come there in the meantime
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} cannot be written ({reason}); make room, or name another folder") from None


def copy_tokenizer(source: Source, folder: Path) -> None:
    """Copy the base's tokenizer, chat template and generation configuration."""
    for name in WITH_THE_MODEL:
        path = base_file(source.base, name)
        if path is not None:
            shutil.copyfile(path, folder / name)


def save_adapter(source: Source, folder: Path) -> None:
    """Write the adapter in PEFT's format: its weights byte for byte, its configuration from the run's.

    The checkpoint's own adapter_config.json is not used: a stranger's may name a module for PEFT to import, and it has
    the path of the base model on the machine that trained.
    """
    shutil.copyfile(source.checkpoint / WEIGHTS, folder / WEIGHTS)
    model = source.config.model
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(source.config),
        "r": model.lora_rank,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
        "use_rslora": model.lora_variant == "rslora",
        "target_modules": source.targets,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
