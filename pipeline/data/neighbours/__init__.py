"""Near neighbours among image embeddings, and the search index."""
