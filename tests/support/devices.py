"""A guard over where a test runs: on the CPU, by name, unless the test is marked `gpu`.

It is the same with and without a GPU: asking for `auto` fails, whatever `auto` would find. Processes that a test starts see
no GPU. What a library takes by itself shows on a machine with one: CUDA is initialised then.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from early_exit_cli.backbone import load

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
INITIALIZED = pytest.StashKey[bool]()


@contextlib.contextmanager
def on_the_cpu(item: pytest.Item) -> Iterator[None]:
    """A test that is not marked `gpu` names its device, and its processes reach no GPU."""
    if item.get_closest_marker("gpu"):
        yield
        return
    pick_device = load.pick_device

    @functools.wraps(pick_device)
    def named(name: str) -> torch.device:
        if name == "auto":  # no `except Exception` on the way catches this
            pytest.fail('auto takes a GPU where there is one: device="cpu" here, or mark the test gpu')
        return pick_device(name)

    torch.cuda.is_available()  # what this process sees is settled before the variable is set
    item.stash[INITIALIZED] = torch.cuda.is_initialized()
    with mock.patch.object(load, "pick_device", named), mock.patch.dict(os.environ, HIDDEN):
        yield


def require_no_gpu(item: pytest.Item) -> None:
    """Fail a test that took a GPU without being marked for one."""
    assert item.stash.get(INITIALIZED, True) or not torch.cuda.is_initialized(), "it used a GPU and is not marked gpu"
