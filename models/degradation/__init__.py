"""How small pictures are damaged so that upsamplers learn to repair them."""
