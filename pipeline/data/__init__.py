"""Data stages: source, pairs, embeddings, curation, codec."""
