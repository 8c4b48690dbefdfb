"""An adapter merged into its base: W + scale · B A in float32, rounded once, one tensor at a time.

No model is loaded: the base's safetensors files are read tensor by tensor and written in shards, so that memory holds a
shard and a few copies of one weight, however large the model is. Suffixes: O outputs, I inputs, R rank.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.types import UserError
from launch.exporting.source import Factors, Source, base_file, base_object

SHARD_BYTES = 2 * 10**9  # of the merged model's files; only a tensor that is larger makes a larger one
INDEX = "model.safetensors.index.json"


@dataclass
class Retained:
    """What is left of the update after rounding.

    A module's update is D = scale · B A, its merged weight M = round(W + D), and its kept update K = M - W, where W is
    the weight as the base's files hold it. A weight of bfloat16 has 8 significant bits: entries of D below half a step
    of W vanish from M, unless many of them happen to lie next to a rounding boundary.
    """

    kept: float = 0.0  # <K, D>, summed over modules
    whole: float = 0.0  # <D, D>
    wrong: float = 0.0  # |K - D|^2
    shares: dict[str, float] = field(default_factory=dict)  # <K, D> / <D, D> of each module whose D is not zero

    @property
    def share(self) -> float:
        """The part of the update along itself that is kept: <K, D> / <D, D>; 1: all, 0: none. 1 for an update of 0."""
        return self.kept / self.whole if self.whole else 1.0

    @property
    def error(self) -> float:
        """Relative error of the update, |K - D| / |D|, which also counts the noise that rounding adds across it."""
        return (self.wrong / self.whole) ** 0.5 if self.whole else 0.0

    @property
    def least(self) -> tuple[str, float]:
        """The module that keeps the smallest share, and that share."""
        return min(self.shares.items(), key=lambda item: item[1], default=("", 1.0))

    def __str__(self) -> str:
        module, least = self.least
        return (
            f"{self.share:.1%} of the update retained (least of all modules {least:.1%}, {module}), "
            f"relative error of the update {self.error:.1%}"
        )

    def add(self, module: str, kept_OI: Tensor, update_OI: Tensor) -> None:
        """Count one module."""
        kept = (kept_OI * update_OI).sum(dtype=torch.float64).item()
        whole = update_OI.square().sum(dtype=torch.float64).item()
        self.kept += kept
        self.whole += whole
        self.wrong += (kept_OI - update_OI).square().sum(dtype=torch.float64).item()
        if whole:
            self.shares[module] = kept / whole


def merge(source: Source, dtype: torch.dtype, folder: Path) -> Retained:
    """Write the merged model's weights and configuration, in `dtype`, into the existing `folder`.

    Raises UserError for a base model whose files cannot be merged into, or whose weights `dtype` cannot hold.
    """
    (folder / "config.json").write_text(json.dumps(_config(source, dtype), indent=2) + "\n", encoding="utf-8")
    retained = Retained()
    left = dict(source.factors)
    _save_sharded(folder, _merged(source, left, dtype, retained))
    if left:
        raise UserError(
            f"model.path={source.config.model.path} names its tensors otherwise than transformers does its modules: no "
            f"{next(iter(left))}.weight in its files; export the adapter without --merge"
        )
    return retained


def merged_weight(weight_OI: Tensor, factors: Factors, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """round(W + D) in `dtype`, and D = scale · B A in float32."""
    update_OI = scale * (factors.b_OR @ factors.a_RI)
    return (weight_OI.float() + update_OI).to(dtype), update_OI


def _merged(
    source: Source, left: dict[str, Factors], dtype: torch.dtype, retained: Retained
) -> Iterator[tuple[str, Tensor]]:
    """The merged model's tensors, one at a time; removes from `left` what has been merged."""
    for name, tensor in _base_tensors(source):
        module = name.removesuffix(".weight")
        if module in left:
            factors = left.pop(module)
            if tensor.shape != (len(factors.b_OR), factors.a_RI.shape[1]):
                raise UserError(f"{name} has another shape than config.json of the base model says; use another model")
            made, update_OI = merged_weight(tensor, factors, source.scale, dtype)
            retained.add(module, made.float() - tensor.float(), update_OI)
        else:
            made = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if made.is_floating_point() and not made.isfinite().all():
            raise UserError(f"--dtype {str(dtype)[6:]} cannot hold {name}, which has larger numbers; use bfloat16")
        yield name, made


def _base_tensors(source: Source) -> Iterator[tuple[str, Tensor]]:
    for path in _weight_files(source):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); restore the base model") from None


def _weight_files(source: Source) -> list[Path]:
    """The safetensors files of the base model."""
    index = base_object(source.base, INDEX)
    shards = index.get("weight_map") if index else {"": "model.safetensors"}
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    files = {name: base_file(source.base, name) if Path(name).name == name else None for name in names}
    if not files or None in files.values():
        lacking = next((name for name, path in files.items() if path is None), "weight_map in its index")
        raise UserError(
            f"model.path={source.config.model.path} has no {lacking}, and only safetensors are merged into; export the "
            "adapter without --merge"
        )
    return [path for path in files.values() if path is not None]


def _config(source: Source, dtype: torch.dtype) -> dict[str, object]:
    """The base's config.json with the merged model's dtype, and without code of its own, which was not used."""
    config = base_object(source.base, "config.json")
    assert config is not None, "the plan made a model of it"
    if "quantization_config" in config:
        raise UserError(f"model.path={source.config.model.path} is quantised; export the adapter without --merge")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # the name before transformers 5
    return {name: value for name, value in config.items() if name != "auto_map"} | {key: str(dtype)[6:]}


def _save_sharded(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write the tensors under transformers' names: model.safetensors, or several files of SHARD_BYTES and an index."""
    files: list[dict[str, int]] = []  # bytes of each tensor of each file
    shard: dict[str, Tensor] = {}

    def write() -> None:
        files.append({name: tensor.nbytes for name, tensor in shard.items()})
        save_file(shard, folder / f"{len(files)}.safetensors", {"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
        shard[name] = tensor.contiguous()
    write()
    if len(files) == 1:
        (folder / "1.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for number, name in enumerate(names, start=1):
        (folder / f"{number}.safetensors").rename(folder / name)
    index = {
        "metadata": {"total_size": sum(sum(each.values()) for each in files)},
        "weight_map": {tensor: name for name, each in zip(names, files, strict=True) for tensor in each},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
