"""A method from a module outside the repository, and the error for a name that is not a method."""

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


def test_a_users_own_method_needs_no_change_in_the_repository(tmp_path, monkeypatch):
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
    targets = made.update([tiny.group(1, [2, 3, 1], [4.0, 0.0, 1.5])]).tokens
    assert [s.advantage for s in targets] == [1.0, -1.0, 0.0]
    for target in targets:
        np.testing.assert_allclose(target.weights, 1 / np.arange(1, len(target.weights) + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method.name nowhere.method", "and it is not a module with a METHOD"),
        ("--method.name json", "and it is not a module with a METHOD"),
        (
            "--method.advantage own",
            "unknown method.advantage=own; choose one of group_std, group_mean, leave_one_out, asymmetric, or",
        ),
        ("--method.token_weight json.nothing", "json.nothing: no such function"),
    ],
)
def test_an_unknown_method_or_function_is_rejected(options, words, tmp_path):
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(UserError, match=re.escape(words)):
        load(options.split(), tmp_path / "empty.toml")
