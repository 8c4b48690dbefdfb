"""Stand in for Ray actors in tests of interleavings."""

import pytest
import ray

from launch.runtime.crew import Crew
from launch.runtime.fleet import Fleet
from launch.runtime.recovery import Losses


class Local:
    """An object whose methods are called by .remote(...), at once."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        method = (lambda: None) if name == "__ray_ready__" else getattr(self.target, name)
        return type("Method", (), {"remote": staticmethod(method)})


class Lazy(Local):
    """A handle whose answers are made when they are asked for: a dead actor's `.remote` raises nothing."""

    def __getattr__(self, name):
        method = (lambda: None) if name == "__ray_ready__" else getattr(self.target, name)
        return type("Method", (), {"remote": staticmethod(lambda *arguments: lambda: method(*arguments))})


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let references be values."""
    monkeypatch.setattr(ray, "get", lambda references, timeout=None: references)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "kill", lambda actor: None)


def install_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let references be functions that make the answer. Who waits for one says how long: the other side may hang."""
    install(monkeypatch)

    def get(references, timeout):
        return [each() for each in references] if isinstance(references, list) else references()

    monkeypatch.setattr(ray, "get", get)


def fleet(*actors) -> Fleet:
    """A fleet of these handles."""
    return Fleet([lambda actor=actor: actor for actor in actors], Losses())


def crew(*ranks) -> Crew:
    """A crew of these handles."""
    return Crew([lambda rank=rank: rank for rank in ranks], Losses())
