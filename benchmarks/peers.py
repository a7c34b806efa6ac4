"""Puts diffusers' networks under our losses: the same weights in the classes that others use."""

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from models.decoder import Decoder
from models.diffusion_prior import DiffusionPrior
from models.interchange import export_decoder, export_prior, export_upsampler, prior_inputs
from models.nn.unet import UNet
from models.upsampler import Upsampler

LOADING = {"low_cpu_mem_usage": False}  # the other way needs another package


class PeerPrior(nn.Module):
    """A diffusion prior whose network is PriorTransformer; the captions' embedding, which that has not, is ours."""

    def __init__(self, prior: DiffusionPrior):
        super().__init__()
        self.config, self.embed_dim, self.scale = prior.config, prior.embed_dim, prior.scale
        self.caption = deepcopy(prior.caption)
        with TemporaryDirectory() as folder:
            export_prior(prior, folder)
            self.network = PriorTransformer.from_pretrained(Path(folder) / "prior", **LOADING)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor) -> Tensor:
        """Does the same as ``DiffusionPrior.forward``."""
        inputs = prior_inputs(self, tokens, text_embedding, keep_text)  # type: ignore[arg-type]
        return self.network(x_t, t, **inputs).predicted_image_embedding


class PeerUNet(nn.Module):
    """A UNet2DConditionModel or UNet2DModel, called as our U-Net is."""

    def __init__(self, network: nn.Module, ours: UNet):
        super().__init__()
        self.network, self.multiple = network, ours.multiple

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        added: Tensor | None = None,
        context: Tensor | None = None,
        shown: Tensor | None = None,
        layout: None = None,
    ) -> Tensor:
        """Does the same as ``UNet.forward``; it has no layout."""
        if context is None:
            return self.network(x, t).sample
        return self.network(x, t, encoder_hidden_states=context, class_labels=added, attention_mask=shown).sample


def with_peer_unet(model: Decoder | Upsampler) -> Decoder | Upsampler:
    """Returns a copy of the model with diffusers' U-Net of the same weights in the place of ours."""
    copy = deepcopy(model)
    with TemporaryDirectory() as folder:
        if isinstance(model, Decoder):
            export_decoder(model, folder)
            network = UNet2DConditionModel.from_pretrained(Path(folder) / "decoder", **LOADING)
        else:
            export_upsampler(model, folder)
            network = UNet2DModel.from_pretrained(Path(folder) / "super_res_first", **LOADING)
    copy.unet = PeerUNet(network, model.unet)  # type: ignore[assignment]
    return copy
