"""Merging tensor by tensor: hand numbers, shards, bounded memory."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import local_run
import numpy as np
import psutil
import pytest
import torch
import trained_run
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from common.types import UserError
from launch.exporting import comparison, merge, source
from launch.exporting.merge import Retained
from launch.exporting.source import Factors


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return local_run.save_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_weight_by_hand():
    """Scale 2, rank 1: D = 2 · [1, -2]^T [.5, .25] = [[1, .5], [-2, -1]]."""
    factors = Factors(torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0], [-2.0]]))
    weight = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.bfloat16)
    merged, update = merge.merged_weight(weight, factors, 2.0, torch.float32)
    assert merged.tolist() == [[11.0, 20.5], [28.0, 39.0]]
    assert update.tolist() == [[1.0, 0.5], [-2.0, -1.0]]


def test_the_retained_share_by_hand():
    """A bfloat16 has steps of 2^-7 from 1 on, and of 2^-10 from 2^-3 on. D = [2^-10, 2^-9]: the first entry is lost.

    <K, D> = 2^-18, <D, D> = 2^-20 + 2^-18 = 5 · 2^-20, |K - D|^2 = 2^-20.
    """
    weight = torch.tensor([[1.0, 0.125]], dtype=torch.bfloat16)
    factors = Factors(torch.tensor([[2.0**-10, 2.0**-9]]), torch.tensor([[1.0]]))
    retained = Retained()
    merged, update = merge.merged_weight(weight, factors, 1.0, torch.bfloat16)
    assert merged.tolist() == [[1.0, 0.125 + 2.0**-9]]
    retained.add("x.q_proj", merged.float() - weight.float(), update)
    assert retained.share == pytest.approx(4 / 5)
    assert retained.error == pytest.approx((1 / 5) ** 0.5)
    retained.add("x.o_proj", torch.zeros(1, 1), torch.tensor([[2.0**-10]]))  # all of it lost: <D, D> is 6 · 2^-20 now
    assert retained.share == pytest.approx(4 / 6)
    assert retained.least == ("x.o_proj", 0.0)


def test_no_update_has_nothing_to_lose():
    retained = Retained()
    retained.add("x.q_proj", torch.zeros(2, 2), torch.zeros(2, 2))
    assert (retained.share, retained.error, retained.least) == (1.0, 0.0, ("", 1.0))


def test_a_model_in_shards_is_the_model(model, tmp_path, monkeypatch):
    """The base in several files, the merged model in several other ones."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    local_run.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    found = source.read(trained_run.saved(trained_run.write(tmp_path / "run", tmp_path / "sharded")))
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    for folder, limit in ((whole, 10**9), (shards, 6000)):
        folder.mkdir()
        monkeypatch.setattr(merge, "SHARD_BYTES", limit)
        merge.merge(found, torch.float32, folder)
    assert [path.name for path in whole.glob("*.safetensors")] == ["model.safetensors"]
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    sizes = {}
    for name in names:
        with safe_open(shards / name, framework="pt") as file:
            sizes[name] = {each: file.get_tensor(each).nbytes for each in file.keys()}  # noqa: SIM118 (no iterator)
    assert all(sum(each.values()) <= 6000 or len(each) == 1 for each in sizes.values())
    index = json.loads((shards / merge.INDEX).read_text())
    assert index["weight_map"] == {tensor: name for name, each in sizes.items() for tensor in each}
    assert index["metadata"]["total_size"] == sum(sum(each.values()) for each in sizes.values())
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, shards))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_numbers_beyond_float16_are_refused(model, tmp_path):
    found = source.read(trained_run.saved(trained_run.write(tmp_path / "run", model)))
    found.factors["model.layers.0.self_attn.q_proj"].b_OR.fill_(1e6)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"^--dtype float16 cannot hold model\.layers\.0\.self_attn\.q_proj\.weight"):
        merge.merge(found, torch.float16, tmp_path / "out")


def without_safetensors(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def other_names(base: Path) -> None:
    tensors = {f"transformer.{name}": tensor for name, tensor in merge_load(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def other_shape(base: Path) -> None:
    save_file(
        {name: tensor[:1] for name, tensor in merge_load(base).items()}, base / "model.safetensors", {"format": "pt"}
    )


def quantised(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))


def damaged(base: Path) -> None:
    (base / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")


def index_of(shards: object):
    return lambda base: (base / merge.INDEX).write_text(json.dumps(shards))


def merge_load(base: Path) -> dict[str, torch.Tensor]:
    with safe_open(base / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without_safetensors, "has no model.safetensors, and only safetensors are merged into"),
        (other_names, "names its tensors otherwise than transformers does"),
        (other_shape, "has another shape than config.json"),
        (quantised, "is quantised"),
        (damaged, "is damaged"),
        (index_of({"weight_map": {"x": "../secret.safetensors"}}), "has no ../secret.safetensors"),
        (index_of({"weight_map": [1]}), "has no weight_map in its index"),
        (index_of([1]), "is not JSON (not an object)"),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_one_line(tmp_path, spoil, reason):
    base = local_run.save_model(tmp_path / "base")
    found = source.read(trained_run.saved(trained_run.write(tmp_path / "run", base)))
    spoil(base)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError) as error:
        merge.merge(found, torch.float32, tmp_path / "out")
    assert reason in str(error.value)


def test_the_comparison_by_hand():
    compared = comparison.compare(np.array([-1.0, -2.0]), np.array([-1.5, -2.25]), np.array([-2.0, -1.25]), 1)
    assert (compared.difference, compared.effect) == (0.375, 0.75)
    assert compared.lost == 0.5
    noise = comparison.compare(np.array([-1.0]), np.array([-1.0 - 5e-5]), np.array([-1.0 - 6e-5]), 1)
    assert noise.lost == 0.0


def test_a_model_that_memory_does_not_hold_is_refused(model, tmp_path, monkeypatch):
    found = source.read(trained_run.saved(trained_run.write(tmp_path / "run", model)))
    comparison.check_memory(found)
    needed = 4 * sum(tensor.numel() for tensor in merge_load(model).values())  # the head is tied to the embeddings
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(UserError, match=r"^--merge loads model\.path=.* in float32"):
        comparison.check_memory(found)


@pytest.mark.slow
def test_memory_is_bounded_by_a_shard_however_large_the_model(model, tmp_path, monkeypatch):
    """A base of 10 weights of 2 MB, then one of 100: the process takes no more memory for the second."""
    monkeypatch.setattr(merge, "SHARD_BYTES", 4 * 10**6)
    found = source.read(trained_run.saved(trained_run.write(tmp_path / "run", model)))
    small, large = (peak_of_merging(found, tmp_path / str(num), num=num) for num in (10, 100))
    assert large - small < 60 * 10**6, "of the 180 MB that the second base has more"


def peak_of_merging(found: source.Source, base: Path, *, num: int, side: int = 1024) -> int:
    """Most anonymous bytes of this process while it merges into `num` weights of bfloat16, which are zeros."""
    (base / "out").mkdir(parents=True)
    modules = [f"layers.{i}.q_proj" for i in range(num)]
    size = 2 * side * side
    header: dict = {
        f"{module}.weight": {"dtype": "BF16", "shape": [side, side], "data_offsets": [i * size, (i + 1) * size]}
        for i, module in enumerate(modules)
    }
    with (base / "model.safetensors").open("wb") as file:  # not save_file: what it needs would stay with the allocator
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + num * size)
    (base / "config.json").write_text("{}")
    factors = {module: Factors(torch.ones(1, side), torch.full((side, 1), 0.25)) for module in modules}
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        retained = merge.merge(replace(found, base=base, factors=factors), torch.bfloat16, base / "out")
    finally:
        done.set()
        watcher.join()
    assert retained.share == 1.0  # 16 · 0.25: bfloat16 holds it
    return peak[0]


def anonymous_bytes() -> int:
    """Of this process; without the pages of the files that it maps."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024
