"""Runs jobs on Ray clusters: of this machine, at an address, or of KubeRay."""
