"""The text tower of a run's CLIP inside the models that read captions: a frozen copy.

Karlo's prior and decoder and Kandinsky's prior read the token states of a trained CLIP (after its final norm, one for
each position) in place of a text encoder of their own. The copy is among a model's weights, so that a model's folder
opens by itself. It has no gradient, no moments of the optimiser and no moving average.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nn.text_encoder import ClipTextEncoder, EncodedText
from models.nn.transformer import normal_linear, quick_gelu
from models.prior_configs import TextTower
from models.tokens import text_ends

OPEN_CLIPS = {
    "ln_1": "norm_attention",
    "attn.in_proj": "qkv",
    "attn.out_proj": "attention_out",
    "ln_2": "norm_mlp",
    "mlp.c_fc": "mlp_in",
    "mlp.c_proj": "mlp_out",
}
"""Parts of a layer by open_clip's names and by ours."""


class FrozenTower(NamedTuple):
    """The text tower of a CLIP: its sizes, and its weights by the names of ``ClipTextEncoder``."""

    sizes: TextTower
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model_config: dict, weights: Mapping[str, Tensor]) -> "FrozenTower":
        """Returns the text tower of a CLIP, from open_clip's configuration and weights.

        Raises ValueError for a text tower of another kind than CLIP's own.
        """
        sizes = TextTower.of(model_config)
        # A CLIP with "custom_text" holds its text tower under that name.
        theirs = {name.removeprefix("text."): tensor for name, tensor in weights.items()}
        ours = {
            "token.weight": theirs["token_embedding.weight"],
            "position": theirs["positional_embedding"],
            "transformer.norm.weight": theirs["ln_final.weight"],
            "transformer.norm.bias": theirs["ln_final.bias"],
            "projection.weight": theirs["text_projection"].T,
        }
        for layer in range(sizes.depth):
            for other, own in OPEN_CLIPS.items():
                for kind in ("weight", "bias"):
                    joint = "_" if other == "attn.in_proj" else "."
                    name = f"transformer.resblocks.{layer}.{other}{joint}{kind}"
                    ours[f"transformer.blocks.{layer}.{own}.{kind}"] = theirs[name]
        return cls(sizes, {name: tensor.detach().float().contiguous() for name, tensor in ours.items()})

    def put_into(self, model: nn.Module) -> None:
        """Copies these weights into every frozen tower in ``model``, as many positions as it reads."""
        for module in model.modules():
            if isinstance(module, FrozenText):
                module.load_state_dict(self.weights | {"position": self.weights["position"][: module.context]})


def required(tower: TextTower | None) -> TextTower:
    """Returns the tower, for a model that reads a frozen one. Raises ValueError for None."""
    if tower is None:
        raise ValueError("text_encoder 'frozen' reads a CLIP's text tower: pass its sizes as text_tower")
    return tower


class FrozenText(ClipTextEncoder):
    """A CLIP's text tower that reads ``context`` tokens, or as many as CLIP does, and is not trained.

    Its weights are random until ``FrozenTower.put_into`` or a model's folder brings them. A longer caption ends as
    CLIP ends it: its last token is replaced by the end token.
    """

    def __init__(self, sizes: TextTower, embed_dim: int, context: int):
        activation = quick_gelu if sizes.quick_gelu else F.gelu
        shape = (sizes.vocabulary, min(context, sizes.context), sizes.width, sizes.depth, sizes.heads)
        super().__init__(*shape, embed_dim, activation)
        self.requires_grad_(False)

    def words(self, tokens: Tensor) -> Tensor:
        """Returns bags of words of captions [b, 77]: sums of their distinct tokens' vectors, unit norm, [b, width]."""
        # CLIP's own text embedding drops words that its loss can do without. Here every word counts once and alike, so
        # a new sentence of known words lies near the sentences of training.
        place = torch.arange(tokens.shape[1], device=tokens.device)
        between = (place > 0) & (place < text_ends(tokens, self.end)[:, None] - 1)
        between &= ~(tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(-1)  # not a word that came before
        return (F.normalize(self.token(tokens), dim=-1) * between[..., None]).sum(1)

    def read(self, tokens: Tensor) -> EncodedText:
        """Returns the encoded text of tokens [b, context].

        In training on a CPU, positions after a batch's longest caption are not computed, and their states are zeros.
        """
        length = self.context
        # The tower is causal and padding is hidden, so those positions change nothing but rounding. That would make an
        # image depend on its batch, hence in training only. On a GPU the length would synchronise, and a fake tensor
        # has none. On two cores this takes a tenth off a step of the preset tiny.
        if self.training and tokens.is_cpu and type(tokens) is Tensor:
            length = int(text_ends(tokens, self.end).max())
        text, missing = super().read(tokens[:, :length]), self.context - length
        assert text.shown is not None
        return EncodedText(F.pad(text.states, (0, 0, 0, missing)), text.pooled, F.pad(text.shown, (0, missing)))


class CaptionRegression(nn.Module):
    """Predicts image embeddings [b, d] of captions by a linear regression on their text embeddings and their words.

    It has no gradient, is zero until ``start_from``, and predicts the mean image embedding for a hidden caption. It is
    for few rows, where a linear map generalises and a network memorises.
    """

    weight: Tensor
    mean: Tensor
    image_mean: Tensor

    def __init__(self, words_width: int, embed_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(embed_dim, embed_dim + words_width))
        self.register_buffer("mean", torch.zeros(embed_dim + words_width))
        self.register_buffer("image_mean", torch.zeros(embed_dim))

    @torch.no_grad()
    def start_from(self, weight: Tensor, mean: Tensor, image_mean: Tensor) -> None:
        """Sets the regression to image_mean + weight (x - mean), with x from ``inputs``."""
        self.weight.copy_(weight)
        self.mean.copy_(mean)
        self.image_mean.copy_(image_mean)

    def inputs(self, text: FrozenText, tokens: Tensor, text_embedding: Tensor) -> Tensor:
        """Returns the regressors, [b, d + words_width]: text embeddings at unit variance, and ``FrozenText.words``."""
        unit_variance = text_embedding.to(self.weight.dtype) * text_embedding.shape[1] ** 0.5
        return torch.cat([unit_variance, text.words(tokens)], dim=1)

    def forward(self, text: FrozenText, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor) -> Tensor:
        """Returns image embeddings of no certain norm; ``keep_text`` bool [b] is False to hide a caption."""
        with torch.autocast(tokens.device.type, enabled=False):
            centred = (self.inputs(text, tokens, text_embedding) - self.mean) * keep_text[:, None]
            return self.image_mean + centred @ self.weight.T


class FrozenCaption(nn.Module):
    """BPE tokens [b, 77] to vectors [b, context, width]: CLIP's token states through one linear layer, plus position.

    It takes the place of ``CaptionEmbedding``. As there, positions of padding and of dropped captions hold learned
    vectors; so do positions that CLIP's own context lacks.
    """

    def __init__(self, sizes: TextTower, embed_dim: int, context: int, width: int):
        super().__init__()
        self.text = FrozenText(sizes, embed_dim, context)
        self.missing = context - self.text.context
        self.states_in = normal_linear(sizes.width, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.padding = nn.Parameter(torch.empty(context, width))
        nn.init.normal_(self.position, std=0.01)
        nn.init.normal_(self.padding, std=0.02)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Returns vectors of ``tokens``; ``keep``, bool [b], is False to drop a caption. Raises as ``FrozenText``."""
        text = self.text(tokens, torch.ones_like(keep))
        states = F.pad(self.states_in(text.states), (0, 0, 0, self.missing))
        assert text.shown is not None
        shown = F.pad(text.shown & keep[:, None], (0, self.missing))
        return torch.where(shown[..., None], states + self.position, self.padding)


class CaptionPrior(nn.Module):
    """A prior that may add what it has learned to a regression on its captions.

    Attributes:
        caption: Module that embeds captions; a ``FrozenCaption`` where there is a regression.
        line: The regression, or None.
    """

    caption: nn.Module
    line: CaptionRegression | None

    def regress(self, tokens: Tensor, text_embedding: Tensor, keep_text: Tensor) -> Tensor | None:
        """Returns image embeddings [b, d] by the regression, None without one.

        ``tokens`` int64 [b, 77], ``text_embedding`` unit norm [b, d], ``keep_text`` bool [b]: False hides a caption.
        """
        if self.line is None:
            return None
        assert isinstance(self.caption, FrozenCaption)
        return self.line(self.caption.text, tokens, text_embedding, keep_text)
