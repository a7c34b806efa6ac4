"""Converts models to and from diffusers' layout, in which Karlo's weights are published, without diffusers itself.

Every function takes the pipeline's folder, whose subfolders are named as in Karlo's: prior, decoder, text_proj,
text_encoder, super_res_first, super_res_last and the schedulers.
"""

from models.interchange.cascade import export_unclip, import_unclip
from models.interchange.decoder import export_decoder, import_decoder
from models.interchange.prior import export_prior, import_prior, prior_inputs
from models.interchange.upsampler import export_upsampler, import_upsampler

__all__ = [
    "export_decoder",
    "export_prior",
    "export_unclip",
    "export_upsampler",
    "import_decoder",
    "import_prior",
    "import_unclip",
    "import_upsampler",
    "prior_inputs",
]
