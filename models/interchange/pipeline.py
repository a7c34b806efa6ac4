# mypy: ignore-errors
"""The generator as a pipeline of diffusers; a copy of this file and of the code it needs lies in every export.

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
pipe("a red heart", generator=torch.Generator().manual_seed(0)).images[0]
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image
from torch import Tensor, nn

MOST = 2**53  # of a seed, so that JSON holds it exactly


class Generator(ModelMixin):
    """Holds all models of an unCLIP cascade, so that a pipeline moves them together. They compute in fp32."""

    def __init__(self, unclip: Any):
        super().__init__()
        self.unclip = unclip
        self.models = nn.ModuleDict(
            {name: value for name, value in vars(unclip).items() if isinstance(value, nn.Module)}
        )

    @classmethod
    def from_pretrained(cls, path: str, **_: object) -> "Generator":
        """Opens the export whose part ``path`` is, with the code that lies in it."""
        # By default torch computes convolutions in TF32, also of fp32 tensors.
        torch.backends.cudnn.allow_tf32 = False
        code = sys.modules.get("unclip_models")
        if code is not None and Path(path).resolve() not in Path(code.__path__[0]).resolve().parents:
            for name in [name for name in sys.modules if name.partition(".")[0] == "unclip_models"]:
                del sys.modules[name]  # the code of another export, whose models keep theirs
        sys.path.insert(0, str(path))
        try:
            made = cls(importlib.import_module("unclip_models.interchange").import_unclip(Path(path).parent))
        finally:
            sys.path.remove(str(path))
        made.folder = Path(path).parent
        return made

    def to(self, *args: Any, **kwargs: Any) -> "Generator":
        """Moves the models. They stay in fp32: the option ``precision="bf16"`` of a call computes in bf16."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return self if device is None else super().to(device)

    def save_pretrained(self, path: str, **_: object) -> None:
        """Raises ValueError: the code that reads an export belongs to it."""
        raise ValueError(f"{self.folder} cannot be saved again: copy or upload the folder")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Generator":
        """Moves the codec, too, which is not a module."""
        if (codec := self.unclip.codec) is not None:
            self.unclip = replace(self.unclip, codec=codec.to(fn(codec.mean).device))
        return super()._apply(fn, recurse)


class UnCLIPRayPipeline(DiffusionPipeline):
    """Draws images of captions: a prior, a decoder and up to two upsamplers."""

    def __init__(self, unclip):  # without a type: diffusers loads this file twice, so its Generator is another class
        super().__init__()
        self.register_modules(unclip=unclip)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        output_type: str = "pil",
        **options: object,
    ) -> ImagePipelineOutput:
        """Draws images.

        Args:
            prompt: Caption, or several.
            num_images_per_prompt: Images of each caption.
            generator: Generator that draws a seed for each image.
            seeds: Seeds of the images, in place of ``generator``; they give what ``unclip sample --seed`` draws.
            output_type: "pil", or "np" for uint8 [images, side, side, 3].
            options: Replace sampling defaults, such as ``size=256`` or ``decoder_steps=50``.

        Returns:
            Its ``images`` are those of the first caption, then of the second, and so on.
        """
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        captions = [caption for caption in captions for _ in range(num_images_per_prompt)]
        if seeds is None:
            device = None if generator is None else generator.device
            seeds = torch.randint(MOST, (len(captions),), generator=generator, device=device).tolist()
        steps, shown = self.progress_bar(total=1), ""

        def advance(stage: str, done: int, total: int, *_: object) -> None:
            nonlocal shown
            if stage != shown:
                shown = stage
                steps.set_description(stage, refresh=False)
                steps.reset(total)
            steps.update(done - steps.n)

        with steps:
            pixels = self.unclip.unclip.generate(captions, seeds, advance, **options).image.numpy()
        return ImagePipelineOutput(
            images=[Image.fromarray(image) for image in pixels] if output_type == "pil" else pixels
        )
