"""The codec of the AR prior, fitted to image embeddings."""
