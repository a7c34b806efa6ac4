"""Makes webdataset tars of checked images, and the index of their rows."""
