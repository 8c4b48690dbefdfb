"""A method from outside the repository, and what is said of a name that means none."""

import re

import numpy as np
import pytest
import tiny

from common.command_line import load
from common.types import UserError
from learner.learner import Learner

OWN = """
import torch
from common.methods import Method

METHOD = Method(
    paper="mine", equation="-", advantage="own_method.ranks", token_weight="own_method.early", normaliser="step"
)


def ranks(rewards_PG):
    return rewards_PG.argsort(dim=-1).argsort(dim=-1) - (rewards_PG.shape[-1] - 1) / 2


def early(entropy_BT, mask_BT, advantages_B):
    return 1.0 / torch.arange(1, mask_BT.shape[1] + 1, dtype=torch.float64).expand_as(entropy_BT)
"""


def test_a_users_own_method_needs_no_change_here(tmp_path, monkeypatch):
    """A module outside the repository, named by its path on the command line: README.md, "Add a method"."""
    (tmp_path / "own_method.py").write_text(OWN)
    (tmp_path / "empty.toml").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    config = load(["--method.name", "own_method", "--method.kl", "none"], tmp_path / "empty.toml")
    made = Learner(
        tiny.save_model(tmp_path / "model"),
        tiny.config(method=config.method.model_dump() | {"importance": "none"}),
        np.arange(12),
    )
    streams = made.update([tiny.group(1, [2, 3, 1], [4.0, 0.0, 1.5])]).tokens
    assert [s.advantage for s in streams] == [1.0, -1.0, 0.0]
    for stream in streams:
        np.testing.assert_allclose(stream.weights, 1 / np.arange(1, len(stream.weights) + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method.name nowhere.method", "nor is it a module with a METHOD"),
        ("--method.name json", "nor is it a module with a METHOD"),
        (
            "--method.advantage own",
            "method.advantage=own is none of group_std, group_mean, leave_one_out, asymmetric, nor",
        ),
        ("--method.token_weight json.nothing", "json.nothing: no such function"),
    ],
)
def test_what_is_no_method_of_anybodys(options, words, tmp_path):
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(UserError, match=re.escape(words)):
        load(options.split(), tmp_path / "empty.toml")
