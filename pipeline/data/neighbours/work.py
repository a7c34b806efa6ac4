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


def comparisons(rows: float) -> float:
    """Returns with how many others, rows or centres of clusters, each row of a list is compared."""
    # Clusters of a row hold, of the last stretch, the rows before it and its own; once there are as many clusters as
    # there can be, they hold half as many of each stretch before it.
    compared = PROBES * max(2 * CLUSTER_ROWS, 2 / 3 * rows / MAX_CLUSTERS)
    clusters = min(MAX_CLUSTERS, rows / CLUSTER_ROWS)
    assigned = 2 * (1 + TOP_PROBES) * isqrt(int(clusters))  # in its own stretch, and as one that is found later
    return min(rows, compared + assigned)


# A change of these is a new version of the index. Lists are about as many as the root of the training rows, and more
# where each would have more than 8,192 of these: of 768 components a search then reads 27 MB, 1.4 times that at worst.
LISTS, LIST_ROWS = 1 << 16, 1 << 13
GROUP_PROBES = 32  # groups of centroids in which the list of a row is looked for
# At 768 dimensions, 2026-12-03: a row takes 15 us to find its list among 512, 20 among 1,024, 54 among 8,192 and 282
# among 65,536, that is 33 to 61 ns for each centroid with which it is compared; and 16 us besides.
INDEXED_SECONDS, CENTROID_SECONDS = 16e-6, 50e-9


def lists_of(rows: float) -> int:
    """Returns about how many lists an index of codes has for ``rows`` training rows: a power of two."""
    return min(LISTS, 1 << round(log2(max(1, rows**0.5, rows / LIST_ROWS))))


def groups_of(lists: int) -> int:
    """Returns the number of groups of the centroids of ``lists``: twice their root, so that few are compared."""
    return min(lists, isqrt(4 * lists))


def coding_seconds(rows: float) -> float:
    """Returns the seconds of a core in which one of ``rows`` rows finds its list and gets its code."""
    lists = lists_of(rows)
    groups = groups_of(lists)
    return INDEXED_SECONDS + CENTROID_SECONDS * (groups + lists * min(1.0, GROUP_PROBES / groups))
