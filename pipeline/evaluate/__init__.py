"""Whether the models have learnt, measured on rows that taught nothing."""
