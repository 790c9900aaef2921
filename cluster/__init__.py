"""What everything stands on: settings, errors, database, Ray session, registry, jobs, command line."""

import os

# OpenMP's threads wait for each other by spinning. Where other processes want the same cores, that made
# torch fifty times slower than one thread (measured: 222 s against 4 s). It must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
