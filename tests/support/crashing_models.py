"""Factories whose code ends its process, or does what a publisher must survive."""

from __future__ import annotations

import ctypes
import logging
import os
import signal

import torch
from tiny_models import Tied
from torch import nn

from serve_app.models.publishing import module_files
from serve_app.store.safetensors_writer import BlobLayout


def segfault() -> nn.Module:
    ctypes.string_at(0)
    return Tied()


def abort() -> nn.Module:
    os.abort()


def leave_at_once() -> nn.Module:
    os._exit(4)


def out_of_memory() -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    return Tied()


class CrashesWhenRun(Tied):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        os.abort()


def tells() -> nn.Module:
    logging.getLogger("hospital.models").warning("weights of %d are old", 2019)
    return Tied()


def interrupted() -> nn.Module:
    """Interrupt the publisher, as Ctrl-C does, and go on for ever."""
    os.kill(int(os.environ["PUBLISHER"]), signal.SIGINT)
    while True:
        signal.pause()


def half_written() -> nn.Module:
    """Build a module whose file is half written when its process and the publisher are killed, if that is asked for."""

    def die(path: object, layout: BlobLayout, data: object) -> None:
        with open(str(path), "wb") as file:  # noqa: PTH123 (whatever kind of path)
            file.write(layout.header)
        os.kill(int(os.environ["DIE_HALF_WRITTEN"]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if "DIE_HALF_WRITTEN" in os.environ:
        module_files.write_blob = die
    return Tied()
