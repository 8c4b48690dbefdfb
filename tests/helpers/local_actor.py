"""Stands in for a Ray actor in tests of interleavings."""


class Local:
    """An object whose methods are called by .remote(...), at once."""

    def __init__(self, target):
        self.target = target

    def __getattr__(self, name):
        method = getattr(self.target, name)
        return type("Method", (), {"remote": staticmethod(method)})
