"""Store, keys, graph, data stages and trainings. Knows models, does not know jobs."""

import os

# Threads of PyTorch that wait for one whose core decodes or writes a checkpoint spin for milliseconds, and keep it from
# going on elsewhere. Read when PyTorch is loaded. A tenth of a millisecond still bridges the gaps between operations.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
