"""CLIP embeddings of images and captions."""
