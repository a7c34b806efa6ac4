"""Says what near-duplicates and the index take of a core, for plans, and for lists longer than anyone has measured."""

from __future__ import annotations

from math import isqrt, log2

# A change of any of the first three is a new version of curation.
CLUSTER_ROWS = 256  # of the rows before a stretch, in one of its clusters
MAX_CLUSTERS = 1 << 14
PROBES = 8  # clusters in which a row is searched
TOP_PROBES = 16  # groups of clusters that are searched where there are more clusters
# At 768 dimensions: of 50,000 rows, 2026-12-02 (lab/billion.json, "wide 50000"). The comparisons of their first stretch
# are left out of ROW_SECONDS, those in clusters are not, some 40 us.
ROW_SECONDS = 175.8e-6
PAIR_SECONDS = 16.36e-9

# Lists of an index of codes, at most. There are about as many as the root of the training rows: comparing a query with
# them takes as long as with the rows of one. A change is a new version of the index.
LISTS = 8192
# At 768 dimensions, 2026-12-03: a row takes 30 us of a core with 1,024 lists, 71 with 4,096, and 127 with 8,192.
INDEXED_SECONDS, LIST_SECONDS = 16e-6, 13.6e-9


def comparisons(rows: float) -> float:
    """Returns with how many others, rows or centres of clusters, each row of a list is compared."""
    # Clusters of a row hold, of the last stretch, the rows before it and its own; once there are as many clusters as
    # there can be, they hold half as many of each stretch before it.
    compared = PROBES * max(2 * CLUSTER_ROWS, 2 / 3 * rows / MAX_CLUSTERS)
    clusters = min(MAX_CLUSTERS, rows / CLUSTER_ROWS)
    assigned = 2 * (1 + TOP_PROBES) * isqrt(int(clusters))  # in its own stretch, and as one that is found later
    return min(rows, compared + assigned)


def lists_of(rows: float) -> int:
    """Returns the number of lists for ``rows`` training rows: a power of two near their root, LISTS at most."""
    return min(LISTS, 1 << round(log2(max(1.0, rows)) / 2))
