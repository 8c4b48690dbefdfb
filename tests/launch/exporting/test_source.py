"""What is exported is checked first: a stranger's checkpoint runs nothing, and takes no file of this machine along."""

import json
import os
import pickle
import shutil
from pathlib import Path

import local_run
import pytest
import torch
import trained_run
from safetensors.torch import load_file, save_file
from stranger import contents, rewrite, seal

from launch import export
from launch.exporting import source

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    local_run.save_model(folder / "tiny")
    return trained_run.write(folder / "run", folder / "tiny")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy that a test may change, with a model of its own."""
    shutil.copytree(trained.parent / "tiny", tmp_path / "stranger" / "tiny")
    copy = shutil.copytree(trained, tmp_path / "stranger" / "run")
    rewrite(copy, model={"path": str(tmp_path / "stranger" / "tiny")})
    return copy


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def tensors(change):
    def changed(saved: Path, trace: Path) -> None:
        save_file(change(load_file(saved / ADAPTER)), saved / ADAPTER)

    return changed


def first(change):
    return tensors(lambda found: found | {name: change(found[name]) for name in list(found)[:1]})


CONTENTS = {
    "a pickled adapter": lambda saved, trace: (saved / ADAPTER).write_bytes(pickle.dumps(Exploit(trace))),
    "a pickle beside it": lambda saved, trace: (saved / "more.pt").write_bytes(pickle.dumps(Exploit(trace))),
    "a module less": tensors(lambda found: dict(list(found.items())[1:])),
    "a tensor more": tensors(lambda found: found | {"more": torch.zeros(1)}),
    "another shape": first(lambda tensor: torch.zeros(3, 3)),
    "another dimension": first(lambda tensor: tensor[0]),
    "a number that is none": first(lambda tensor: tensor.fill_(float("nan"))),
    "no step": lambda saved, trace: (saved / "learner_state.json").write_text("{}"),
    "a step that is a text": lambda saved, trace: (saved / "learner_state.json").write_text('{"step": "4"}'),
    "a link": lambda saved, trace: (saved / "more.json").symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_that_no_run_writes_are_one_line(run, tmp_path, what, capfd):
    """With the checksums that belong to them."""
    saved, trace = trained_run.saved(run), tmp_path / "ran"
    CONTENTS[what](saved, trace)
    seal(saved)
    assert export.main([str(saved), "--out", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "use another checkpoint" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger"]


def test_a_damaged_checkpoint_is_one_line(run, tmp_path, capfd):
    (trained_run.saved(run) / "adapter_config.json").write_text("{}")  # without its checksum
    assert export.main([str(trained_run.saved(run)), "--out", str(tmp_path / "out")]) == 2
    assert "adapter_config.json has another checksum than when it was written" in capfd.readouterr().err


def test_pefts_configuration_is_written_anew(run, tmp_path):
    """The checkpoint's own may name a module that PEFT imports, and another rank than the run had."""
    saved = trained_run.saved(run)
    evil = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "r": 64, "use_dora": True}
    (saved / "adapter_config.json").write_text(json.dumps(evil))
    seal(saved)
    assert export.main([str(saved), "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (2, 32.0, False)
    assert "auto_mapping" not in written and "use_dora" not in written


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "special_tokens_map.json"])
def test_a_link_out_of_the_models_folder_is_not_published(run, tmp_path, name, capfd):
    secret = tmp_path / "id_rsa"
    secret.write_text("the owner's\n")
    link = run.parent / "tiny" / name
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    assert export.main([str(trained_run.saved(run)), "--out", str(tmp_path / "out")]) == 2
    assert f"{name} is a symbolic link to another folder" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hub_cache_is_a_model_folder(run, tmp_path):
    """models--X/snapshots/REVISION/NAME links to models--X/blobs/HASH."""
    cache = tmp_path / "models--ada--tiny"
    shutil.copytree(run.parent / "tiny", cache / "blobs")
    (cache / "snapshots" / "main").mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (cache / "snapshots" / "main" / path.name).symlink_to(Path("../../blobs") / path.name)
    rewrite(run, model={"path": str(cache / "snapshots" / "main")})
    assert export.main([str(trained_run.saved(run)), "--out", str(tmp_path / "out")]) == 0
    written = contents(tmp_path / "out")
    assert written["tokenizer.json"] == (run.parent / "tiny" / "tokenizer.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_an_export_writes_nothing_into_the_run(run, tmp_path):
    before = contents(run.parent)
    assert export.main([str(trained_run.saved(run)), "--out", str(tmp_path / "out")]) == 0
    assert contents(run.parent) == before


def test_the_best_checkpoint_is_one_too(run, tmp_path):
    best = trained_run.saved(run).rename(run / "checkpoints" / "best")
    assert source.read(best).step == trained_run.STEP
