"""Store, graph, data stages, trainings, and what operates them. Knows the models, does not know the commands."""
