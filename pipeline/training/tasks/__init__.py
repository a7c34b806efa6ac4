"""One small class a model: its columns, its loss, its previews."""
