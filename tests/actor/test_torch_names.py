"""Checks names of torch that run on a GPU only against the installed wheel."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import varlen

from learner.batch import Ends

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actor", "common", "launch", "learner")


def calls(path: str, function: str) -> list[ast.Call]:
    """The calls of `function` in one of our files."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    found = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    assert found, f"{function} is not called in {path}"
    return found


def keywords(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg}


def test_torchs_attention_of_many_lengths_takes_our_call() -> None:
    [call] = calls("learner/policy/attention.py", "varlen.varlen_attn")
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert {"scale", "window_size"} <= keywords(call)
    assert keywords(call) <= set(parameters)
    assert [ast.unparse(argument) for argument in call.args][3:] == ["*ends"]
    # The parameters correspond, in this order, to the fields of Ends.
    assert [*parameters][: 3 + len(Ends._fields)] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_torchs_matmul_of_halves_has_a_float32_result() -> None:
    """torch.mm(out_dtype=...) runs on CUDA only."""
    overloads = [getattr(torch.ops.aten.mm, name)._schema for name in torch.ops.aten.mm.overloads()]
    known = {argument.name for schema in overloads for argument in schema.arguments}
    used = set().union(*map(keywords, calls("learner/head/triton_backend.py", "torch.mm")))
    assert "out_dtype" in used
    assert used <= known


def test_torch_has_every_name_that_we_use() -> None:
    """Including those of torch.cuda, which CPU tests do not reach."""
    spelled = set()
    for path in [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes if "torch" in imported else ():
            if isinstance(node, ast.Attribute) and re.fullmatch(r"torch(\.\w+)+", ast.unparse(node)):
                spelled.add(ast.unparse(node))
    assert {"torch.cuda.max_memory_allocated", "torch.cuda.get_device_properties"} <= spelled
    for name in sorted(spelled):
        found: Any = torch
        for part in name.split(".")[1:]:
            assert hasattr(found, part), name
            found = getattr(found, part)
