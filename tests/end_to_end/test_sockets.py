"""Where a run listens: on loopback alone; and what answers there without Ray's token."""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import letters
import pytest
import ray
import resources
from ray._raylet import AuthenticationTokenLoader
from small_model import save_model

from launch import run
from launch.recording.recorder import Recorder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
CALLS = [  # one of each of Ray's servers
    NODES,
    *("/ray.rpc.NodeManagerService/GetNodeStats", "/ray.rpc.ObjectManagerService/Pull"),
    *("/ray.rpc.CoreWorkerService/GetCoreWorkerStats", "/ray.rpc.ReporterService/HealthCheck"),
    "/ray.rpc.RayletDriver/ClusterInfo",
]
UNIMPLEMENTED, UNAUTHENTICATED = grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED
TOKEN, METRICS = "token", "metrics"
SERVERS = ("gcs_server", "raylet/raylet", "ray.util.client.server", "ray::RuntimeEnvAgent", "ray::DashboardAgent")
OPEN = ("ray::DashboardAgent", "dashboard/dashboard.py", "autoscaler/_private/monitor.py")  # serve their counters, too


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What listens after a step of a run with two learner ranks and two actors, and how it answers."""
    folder = tmp_path_factory.mktemp("sockets")
    save_model(folder / "model")
    seen: dict[str, Any] = {}
    step = Recorder.step

    def look(self: Recorder, *arguments: Any, **options: Any) -> None:
        step(self, *arguments, **options)
        seen["sockets"] = set(resources.listening())
        ours = ("ray::Learner", "ray::Actor")  # which take a stranger's bytes for a peer's
        others = [each for each in seen["sockets"] if not any(name in each[0] for name in ours)]
        seen["answers"] = [(title, answer(port)) for title, _, port in others]
        gcs = ray.get_runtime_context().gcs_address
        tokens = {"none": None, "another": "b" * 64, "right": AuthenticationTokenLoader.instance().get_raw_token()}
        seen["nodes"] = {kind: ask(gcs, NODES, token) for kind, token in tokens.items()}

    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(letters.__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))  # of the workers
        patch.setenv("RAY_ADDRESS", "local")
        patch.setattr(Recorder, "step", look)
        options = [
            *("--model.path", str(folder / "model"), "--model.dtype", "float32", "--task.name", "letters"),
            *("--task.num_train", "8", "--task.num_eval", "2", "--run.steps", "1", "--run.prompts_per_step", "2"),
            *("--run.evaluate_every", "0", "--run.sample_every", "0", "--actor.group_size", "2"),
            *("--actor.max_tokens", "8", "--actor.part_prompts", "1", "--run.dir", str(folder / "run")),
            *("--learner.num_ranks", "2", "--actor.num_actors", "2"),
        ]
        assert run.main(options) == 0
    return seen


def answer(port: int) -> Any:
    """What a socket answers without a token: TOKEN if it asks for one, METRICS, or anything else."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as page:
            return METRICS if page.read().startswith(b"# HELP") else page.status
    except urllib.error.HTTPError as error:
        return TOKEN if error.code == 401 else error.code
    except http.client.HTTPException:  # it speaks gRPC
        answers = {ask(f"127.0.0.1:{port}", call, None) for call in CALLS}
        return TOKEN if answers == {UNIMPLEMENTED, UNAUTHENTICATED} else answers


def ask(address: str, call: str, token: str | None) -> Any:
    """The length of the answer to an empty gRPC message, or the status of an error."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            return len(channel.unary_unary(call)(b"", timeout=5, metadata=metadata))
        except grpc.RpcError as error:
            return error.code()


def test_every_socket_is_on_loopback(seen: dict[str, Any]) -> None:
    assert [each for each in seen["sockets"] if not resources.is_loopback(each[1])] == []
    titles = [title for title, _, _ in seen["sockets"]]
    assert [name for name in (*SERVERS, "ray::Actor") if not any(name in title for title in titles)] == []
    # Each rank has Ray's socket and gloo's; rank 0 has the store's.
    assert sum("ray::Learner" in title for title in titles) == 5


def test_only_a_client_with_the_token_is_answered(seen: dict[str, Any]) -> None:
    nodes = seen["nodes"]
    assert nodes["none"] == nodes["another"] == UNAUTHENTICATED
    assert nodes["right"] > 0


def test_without_the_token_ray_tells_nothing_but_counters(seen: dict[str, Any]) -> None:
    for title, told in seen["answers"]:
        assert told == TOKEN or (told == METRICS and any(name in title for name in OPEN)), title
    guarded = [title for title, told in seen["answers"] if told == TOKEN]
    assert [name for name in SERVERS if not any(name in title for title in guarded)] == []
