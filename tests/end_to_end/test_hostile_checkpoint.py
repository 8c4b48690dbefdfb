"""A checkpoint from a stranger: nothing in it is run, and contents that no run writes are one line."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stranger import LAST, SECRET, contents, rewrite, seal

pytestmark = pytest.mark.slow


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def state(**changed: object):
    """A change of run_state.json."""

    def change(checkpoint: Path, trace: Path) -> None:
        path = checkpoint / "run_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def text(name: str, content: str):
    return lambda checkpoint, trace: (checkpoint / name).write_text(content)


def tensors(name: str, change):
    def changed(checkpoint: Path, trace: Path) -> None:
        save_file(change(load_file(checkpoint / name)), checkpoint / name)

    return changed


def pickled(name: str):
    return lambda checkpoint, trace: (checkpoint / name).write_bytes(pickle.dumps(Exploit(trace)))


def without_first(found: dict) -> dict:
    return dict(list(found.items())[1:])


def of_other_shape(found: dict) -> dict:
    return found | {name: torch.zeros(3, 3) for name in list(found)[:1]}


CONTENTS = {
    "a step that is a text": state(step="4"),
    "a negative step": state(step=-4),
    "a step of another checkpoint": state(step=2),
    "a step that is not finite": state(step=float("nan")),
    "a step that is true": state(step=True),
    "a huge step": text("run_state.json", '{"step": 1e999, "prompt_cursor": 8}'),
    "a step of many digits": text("run_state.json", f'{{"step": {"4" * 5000}, "prompt_cursor": 8}}'),
    "a cursor that is a list": state(prompt_cursor=[8]),
    "a negative cursor": state(prompt_cursor=-1),
    "a position of no object": text("run_state.json", "[4, 8]"),
    "a position nested deeply": text("run_state.json", "[" * 100_000),
    "a position of many bytes": text("run_state.json", " " * 2**21),
    "a learner's step that is a text": text("learner_state.json", '{"step": "4", "entropy_bonus": 0.0}'),
    "an entropy bonus that is not finite": text("learner_state.json", '{"step": 4, "entropy_bonus": Infinity}'),
    "a pickled adapter": pickled("adapter_model.safetensors"),
    "a pickled adapter of PEFT's other name": pickled("adapter_model.bin"),
    "a pickled optimizer": pickled("learner_state.safetensors"),
    "a pickle beside all": pickled("learner_state.pt"),
    "a header of 2^60 bytes": lambda checkpoint, trace: (checkpoint / "adapter_model.safetensors").write_bytes(
        (2**60).to_bytes(8, "little") + b"{}"
    ),
    "an adapter without a module": tensors("adapter_model.safetensors", without_first),
    "an adapter of another shape": tensors("adapter_model.safetensors", of_other_shape),
    "an adapter with more": tensors("adapter_model.safetensors", lambda found: found | {"more": torch.zeros(1)}),
    "moments of another shape": tensors("learner_state.safetensors", of_other_shape),
    "moments of no parameter": tensors("learner_state.safetensors", lambda found: {"999.exp_avg": torch.zeros(1)}),
    "moments of another name": tensors("learner_state.safetensors", lambda found: {"__class__": torch.zeros(1)}),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_that_no_run_writes_are_one_line(stranger, outside, start, evaluated, what):
    """With the checksums that belong to them."""
    trace = outside.parent / "ran"
    CONTENTS[what](stranger / LAST, trace)
    seal(stranger / LAST)
    shutil.rmtree(stranger / "checkpoints" / "step-000002")
    status, err = start(stranger)
    assert (status, err.count("\n")) == (2, 1), err
    assert "Traceback" not in err and "checkpoint" in err
    assert contents(outside.parent) == {"secret.jsonl": SECRET.encode()}
    assert not trace.exists()


@pytest.mark.parametrize("what", [what for what in CONTENTS if "position" not in what and "step" not in what][:9])
def test_evaluating_a_strangers_checkpoint_writes_nothing(stranger, outside, evaluated, what):
    trace = outside.parent / "ran"
    CONTENTS[what](stranger / LAST, trace)
    seal(stranger / LAST)
    before = contents(stranger)
    status, _, err = evaluated(stranger / LAST)
    if "cursor" not in what:  # of the prompts: an evaluation does not read it
        assert (status, err.count("\n")) == (2, 1), err
        assert "checkpoint" in err
    assert contents(stranger) == before
    assert not trace.exists()


def test_an_evaluation_writes_nothing_wherever_its_run_was(stranger, outside, evaluated):
    rewrite(stranger, run={"dir": str(outside.parent), "resume": True})
    before = contents(stranger.parent.parent)
    status, out, err = evaluated(stranger / LAST)
    assert (status, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["step"] == 4
    assert contents(stranger.parent.parent) == before


HOSTILE_ADAPTER = {
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
    "base_model_name_or_path": "../../evil",
    "custom_module": "evil",
    "peft_type": "EVIL",
    "r": 10**30,
    "target_modules": {"x": [[[[]]]]},
}


@pytest.mark.parametrize(
    "content", [json.dumps(HOSTILE_ADAPTER), "[" * 100_000, '{"r": "many", "lora_alpha": NaN}', ""]
)
def test_pefts_own_configuration_is_not_read(stranger, start, content):
    """The run's config.toml has what the adapter is."""
    (stranger / LAST / "adapter_config.json").write_text(content)
    seal(stranger / LAST)
    assert start(stranger) == (0, "")
