"""Networks without a task: transformer, U-Net, text encoder."""
