"""Settings and fixtures of the whole suite."""

import os

# Before any test imports a library that reads them: the tests need no network, and no library may try it. Nor is Ray to
# start by itself: a thread that outlives its test, and with it the stand-in of ray.get, would start one, and with the
# end of that Ray, a minute later, pytest's process would end.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_ENABLE_AUTO_CONNECT="0",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    VLLM_NO_USAGE_STATS="1",
)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """A backend of the head, its blocks made so small that a few hundred rows and a thousand tokens need several."""
    from learner.head import torch_backend, triton_backend

    monkeypatch.setattr(torch_backend, "ROWS", 64)
    monkeypatch.setattr(torch_backend, "TILE", 256)
    monkeypatch.setattr(triton_backend, "WORKSPACE_BYTES", 1)  # 128 rows
    monkeypatch.setattr(triton_backend, "BLOCK", 512)
    return request.param
