"""Order, feed, loop, checkpoints and launch of every training."""

import os

# Read by OpenMP when torch is loaded, which is after this. Its threads would otherwise spin while they wait for each
# other; on cores that other processes use too, a step of a small model then takes 15 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
