"""Says what near-duplicates take of a core, for plans and for simulations of longer lists than anyone has measured."""

from __future__ import annotations

from math import isqrt

# A change of any of the first three is a new version of curation.
CLUSTER_ROWS = 256  # of the rows before a stretch, in one of its clusters
MAX_CLUSTERS = 1 << 14
PROBES = 8  # clusters in which a row is searched
TOP_PROBES = 16  # groups of clusters that are searched where there are more clusters
# At 768 dimensions: of 50,000 rows, 2026-12-02 (lab/billion.json, "wide 50000"). The comparisons of their first stretch
# are left out of ROW_SECONDS, those in clusters are not, some 40 us.
ROW_SECONDS = 175.8e-6
PAIR_SECONDS = 16.36e-9


def comparisons(rows: float) -> float:
    """Returns with how many others, rows or centres of clusters, each row of a list is compared."""
    # Clusters of a row hold, of the last stretch, the rows before it and its own; once there are as many clusters as
    # there can be, they hold half as many of each stretch before it.
    compared = PROBES * max(2 * CLUSTER_ROWS, 2 / 3 * rows / MAX_CLUSTERS)
    clusters = min(MAX_CLUSTERS, rows / CLUSTER_ROWS)
    assigned = 2 * (1 + TOP_PROBES) * isqrt(int(clusters))  # in its own stretch, and as one that is found later
    return min(rows, compared + assigned)
