"""``foveal doctor``: what this machine has, and which backend each kernel would use on it and why."""

from __future__ import annotations

import json


def show(as_json: bool) -> None:
    """Print versions, devices and kernel backends."""
    from foveal.core.environment import describe

    print(json.dumps(describe(), indent=2))
