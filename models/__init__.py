"""The unCLIP models and diffusion mathematics: plain PyTorch. No Ray, no store, no YAML."""
