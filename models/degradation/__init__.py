"""How small images are damaged so that upsamplers learn to repair them."""
