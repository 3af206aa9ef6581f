"""Several real hosts on one Linux machine, to try a cluster on: ``python -m loadtests.testbed --help``.

A host is a network namespace with an address of its own, and in it processes of their own: its own ``/tmp``,
``/dev/shm``, ``/run``, hostname, home and sshd. It shares the machine's kernel, clock and file system.
"""

from loadtests.testbed.disk import USER
from loadtests.testbed.host import Host
from loadtests.testbed.machine import TestbedError, missing
from loadtests.testbed.testbed import MACHINE, Testbed

__all__ = ["MACHINE", "USER", "Host", "Testbed", "TestbedError", "missing"]
