"""Models in torch: builders, publishing, the loader, and profiling."""

import os

# Read by OpenMP when torch loads it. Threads that wait for each other would otherwise keep their cores meanwhile: where
# anything else runs on the machine an execution in two threads then takes five times as long as in one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
