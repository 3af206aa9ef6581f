"""The full model of time: queues, loads that take time, links, reports, and views as stale as those of a live system.

A discrete-event simulation over the classes that the live system runs on: a ``ModelCache`` per location, ``choose`` and
``RouterView`` in its router, one ``CoordinatorState``. Only what carries out their decisions is simulated:

- An execution takes ``exec_s`` in one of ``exec_slots`` places, first come, first served; a load takes ``load_s``, as
  many at a time as the cache allows. Both take exactly what the profile says, wherever they happen.
- A forwarded request is at its destination after half a round trip and the transfer of its payload, and its answer is
  back after another half. Inside a location nothing takes time.
- Workers report at every multiple of ``report_every_s``; half a period later all readers ask for a view, and have it
  after twice ``coordinator_delay_s``. So views are as old, on average, as with independent rhythms. The router and the
  worker of a location share one view.
- What would change nothing is not simulated: a worker with nothing new to report is silent, and counts as alive; views
  are fetched when they are used, as of the moment when they would have come.
- A round of placement runs in the coordinator every ``placement_every_s``, unless nothing was reported since one that
  changed nothing; its commands are where they should be after ``coordinator_delay_s``. What is to be unloaded goes if
  it is idle; what is to be loaded is a ``PreloadSuggested`` for its ``ModelCache``, which loads one model at a time.
- A load that a router orders for a request that it forwards waits for memory as a request does.
- There are no failures and no pinned models, and one worker per location. Deadlines only where ``request_time_s`` is
  given, which only parity tests do.
"""

from serve_app.simulator.discrete_event.results import DiscreteEventResults
from serve_app.simulator.discrete_event.settings import Coordination, DiscreteEventOptions, geographic_links
from serve_app.simulator.discrete_event.simulation import simulate_discrete_event

__all__ = [
    "Coordination",
    "DiscreteEventOptions",
    "DiscreteEventResults",
    "geographic_links",
    "simulate_discrete_event",
]
