"""Store, keys, graph, data stages and trainings. Knows models, does not know jobs."""
