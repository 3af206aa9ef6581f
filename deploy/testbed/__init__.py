"""Several real hosts on one Linux machine, to try a cluster on: ``python -m deploy.testbed --help``.

A host is a network namespace with an address of its own, and in it processes of their own: its own ``/tmp``,
``/dev/shm``, ``/run``, hostname, home and sshd. It shares the machine's kernel, clock and file system.
"""

from deploy.testbed.disk import USER
from deploy.testbed.host import Host
from deploy.testbed.machine import TestbedError, missing
from deploy.testbed.testbed import MACHINE, Testbed

__all__ = ["MACHINE", "USER", "Host", "Testbed", "TestbedError", "missing"]
