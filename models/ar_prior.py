"""The autoregressive prior: a caption to the quantised PCA coordinates of an image embedding.

unCLIP (Ramesh et al. 2022), section 2.2. The sequence is

    63 outputs of a text encoder | text embedding | dot-product token | code 1 ... code k

and a causal transformer predicts each code from what is left of it. Codes are quantile buckets of PCA coordinates by
falling variance (models/codec.py), so that bucket j means the same at every position: the j-th quantile. One bucket
embedding and one output head therefore serve all positions, and position embeddings tell them apart. The text encoder
is bidirectional: its first 63 outputs have seen the whole caption. With ``text_encoder: frozen`` it reads the token
states of CLIP (models/frozen_text.py) in place of token embeddings.

``smooth_buckets``, ``ridge`` and ``text_noise`` are not the paper's. They are for few rows, which the
paper's model memorises sooner than it predicts others.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codec import Codec
from models.diffusion.guidance import guidance_rows
from models.frozen_text import CaptionPrior, CaptionRegression, FrozenCaption, required
from models.losses import Losses
from models.nn.transformer import Cache, CaptionEmbedding, Transformer, normal_linear
from models.prior_configs import ARPriorConfig, TextTower
from models.random_streams import RandomStreams


class ARPrior(CaptionPrior):
    """P(codes | caption, text embedding, dot-product token) for embeddings of ``embed_dim`` and ``codes`` positions."""

    def __init__(self, config: ARPriorConfig, embed_dim: int, codes: int, text_tower: TextTower | None = None):
        super().__init__()
        self.config = config
        self.embed_dim = embed_dim
        self.codes = codes
        self.text_tower = text_tower
        if config.text_encoder == "frozen":
            self.caption = FrozenCaption(required(text_tower), embed_dim, config.text_context, config.text_width)
        else:
            self.caption = CaptionEmbedding(config.vocabulary, config.text_context, config.text_width)
        self.text_encoder = Transformer(
            config.text_width, config.text_depth, config.text_heads, causal=False, dropout=config.dropout
        )
        self.text_in = normal_linear(config.text_width, config.width)
        self.embedding_in = normal_linear(embed_dim, config.width)
        self.null_embedding = nn.Parameter(torch.empty(config.width))
        buckets, width, functions = config.buckets, config.width, config.smooth_buckets
        smooth = functions > 0
        self.dot = SmoothEmbedding(buckets, functions, width) if smooth else nn.Embedding(buckets, width)
        self.code = SmoothEmbedding(buckets, functions, width) if smooth else nn.Embedding(buckets, width)
        self.position = nn.Parameter(torch.empty(config.prefix + 2 + codes, config.width))
        self.transformer = Transformer(config.width, config.depth, config.heads, causal=True, dropout=config.dropout)
        self.head = SmoothHead(width, buckets, functions) if smooth else normal_linear(width, buckets)
        if not smooth:
            for table in (self.dot.weight, self.code.weight):
                random_walk_(table, std=width**-0.5)
            random_walk_(self.head.weight, std=0.3 * width**-0.5)  # logits of about 0.3 at the start
        nn.init.normal_(self.null_embedding, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        self.line = CaptionRegression(required(text_tower).width, embed_dim) if config.ridge else None
        if config.ridge:
            self.coordinates = nn.Linear(embed_dim, codes)
            self.coordinate_in = nn.Parameter(torch.randn(width) * 0.1)

    @torch.no_grad()
    def start_from(self, codec: Codec) -> None:
        """Makes the coordinates of the regression's embeddings the codec's, of unit variance over images, at first."""
        # Only a start: the coordinates are trained with the rest.
        scaled = codec.components / codec.variance.sqrt()[:, None]
        self.coordinates.weight.copy_(scaled)
        self.coordinates.bias.copy_(-scaled @ codec.mean)

    def image_embedding(self, codes: Tensor, codec: Codec, tokens: Tensor, text_embedding: Tensor) -> Tensor:
        """Returns image embeddings, unit norm [b, d], of codes drawn for captions.

        Codes hold the coordinates along the codec's components. The rest of the embedding is the mean's, or that of
        the regression where there is one.
        """
        z = codec.decode(codes)
        line = self.regress(tokens, text_embedding, torch.ones(len(tokens), dtype=torch.bool, device=tokens.device))
        if line is not None:
            across = line.double() - codec.mean
            z = z + (across - across @ codec.components.T @ codec.components).float()
        return F.normalize(z, dim=-1)

    def prefix(self, tokens: Tensor, text_embedding: Tensor, dot_codes: Tensor, keep_text: Tensor) -> Tensor:
        """Returns the inputs before the codes, [b, prefix + 2, width].

        ``tokens`` int64 [b, 77], ``text_embedding`` unit norm [b, d], ``dot_codes`` int64 [b] in
        [0, buckets), ``keep_text`` bool [b]: False hides the caption and the text embedding. The dot-product token
        stays: it says how well the image fits its text, not what the text is.
        """
        # The text encoder is bidirectional, so the first outputs have seen the whole caption and the rest may go.
        text = self.text_encoder(self.caption(tokens, keep_text))[:, : self.config.prefix]
        unit_variance = text_embedding.to(self.null_embedding.dtype) * self.embed_dim**0.5
        embedding = torch.where(keep_text[:, None], self.embedding_in(unit_variance), self.null_embedding)
        return torch.cat([self.text_in(text), embedding[:, None], self.dot(dot_codes)[:, None]], dim=1)

    def forward(
        self, tokens: Tensor, text_embedding: Tensor, dot_codes: Tensor, codes: Tensor, keep_text: Tensor
    ) -> Tensor:
        """Returns logits of every code given those before it, fp32 [b, codes, buckets], for ``codes`` int64 [b, codes].

        The other arguments are those of ``prefix``.
        """
        prefix = self.prefix(tokens, text_embedding, dot_codes, keep_text)
        # Teacher forcing: a position's output predicts the next code, so the last code is not an input.
        sequence = torch.cat([prefix, self.code(codes[:, :-1])], dim=1)
        if (line := self.regress(tokens, text_embedding, keep_text)) is not None:
            # Code 1 is predicted at the last position of the prefix.
            sequence = sequence + F.pad(self.code_inputs(line), (0, 0, prefix.shape[1] - 1, 0))
        out = self.transformer(sequence + self.position[: sequence.shape[1]])
        return self.logits(out[:, prefix.shape[1] - 1 :])

    def code_inputs(self, line: Tensor) -> Tensor:
        """Returns inputs from regressed embeddings [b, d], added where each code is predicted: [b, codes, width]."""
        return self.coordinates(line.to(self.coordinates.weight.dtype))[..., None] * self.coordinate_in

    def logits(self, out: Tensor) -> Tensor:
        """Returns the head's output, in full precision also under autocast."""
        # bf16 has 8 bits for logits whose small differences decide between 1,024 buckets.
        with torch.autocast(out.device.type, enabled=False):
            return self.head(out.to(self.head.weight.dtype))


class SmoothEmbedding(nn.Linear):
    """Vectors of buckets, int64 [...] to [..., width], that are sums of smooth functions of a bucket's place."""

    functions: Tensor

    def __init__(self, buckets: int, functions: int, width: int):
        super().__init__(functions, width, bias=False)
        self.register_buffer("functions", smooth_functions(buckets, functions))
        nn.init.normal_(self.weight, std=(functions * width) ** -0.5)

    def forward(self, buckets: Tensor) -> Tensor:
        return super().forward(self.functions[buckets])


class SmoothHead(nn.Linear):
    """Logits of buckets, [..., width] to [..., buckets], that are sums of smooth functions of a bucket's place."""

    functions: Tensor

    def __init__(self, width: int, buckets: int, functions: int):
        super().__init__(width, functions)
        self.register_buffer("functions", smooth_functions(buckets, functions))
        nn.init.normal_(self.weight, std=0.3 * width**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.functions.T


def smooth_functions(buckets: int, functions: int) -> Tensor:
    """Returns functions of a bucket's place, fp32 [buckets, functions], each of mean square 1 or nearly.

    The first two are a normal score and its square, with which logits make any normal density of a coordinate that is
    normal itself; then come cosines of half a wave, a whole wave and so on.
    """
    place = (torch.arange(buckets, dtype=torch.float64) + 0.5) / buckets  # the middle of each quantile
    score = torch.special.ndtri(place)
    waves = torch.cos(torch.pi * place[:, None] * torch.arange(1, functions)) * 2**0.5
    scores = torch.stack([score, (score.square() - 1) / 2**0.5], dim=1)
    return torch.cat([scores, waves], dim=1)[:, :functions].float()


@torch.no_grad()
def random_walk_(table: Tensor, std: float) -> None:
    """Fills ``table`` [buckets, width] with a random walk over the buckets, of mean 0 and this standard deviation.

    Buckets are quantiles, in order: neighbours mean almost the same. In a walk they look almost the same before
    the first step; independent rows would have to learn it, which takes a small data set most of its training. The
    paper does not say what its tables start from.
    """
    walk = torch.randn_like(table).cumsum(0)
    walk -= walk.mean(0)
    table.copy_(walk * (std / walk.std()))


def log_likelihood(
    model: ARPrior, tokens: Tensor, text_embedding: Tensor, dot_codes: Tensor, codes: Tensor, keep_text: Tensor
) -> Tensor:
    """Returns the exact log probability of every code given those before it, in nats: [b, codes]."""
    logits = model(tokens, text_embedding, dot_codes, codes, keep_text)
    # One row a code: over the middle dimension of [b, buckets, codes] it takes three times as long on a CPU.
    nats = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
    return -nats.unflatten(0, codes.shape)


def ar_prior_loss(model: ARPrior, batch: dict[str, Tensor], rng: RandomStreams, codec: Codec) -> Losses:
    """Returns the mean cross-entropy of a row's codes, in nats, [b].

    In training mode a text embedding gets its ``text_noise``, and then the dot product is with what is left of it.
    ``batch`` has "tokens" int64 [b, 77], "text_embedding" and "image_embedding" [b, d] of unit norm. A uniform guess
    scores log(buckets). Text is hidden in training mode only: validation measures the model with it. Raises ValueError
    when ``codec`` is not the one the model was made for.
    """
    if (codec.buckets, codec.codes) != (model.config.buckets, model.codes):
        raise ValueError(
            f"the codec has {codec.codes} codes of {codec.buckets} buckets, the AR prior {model.codes} of "
            f"{model.config.buckets}: set the prior's buckets to the codec's and build it with the codec's codes"
        )
    image, text = batch["image_embedding"], batch["text_embedding"]
    if model.training and model.config.text_noise:
        text = text + noise_along(codec, rng, model.config.text_noise)
    codes = codec.encode(image)
    # Of the noisy text, so that the token says how far that text can be trusted; sampling asks for a high one.
    dot_codes = codec.encode_dot((image.double() * text.double()).sum(-1))
    keep = rng.keep("drop_text", model.config.drop_text if model.training else 0.0)
    return Losses(-log_likelihood(model, batch["tokens"], text, dot_codes, codes, keep).mean(-1), {})


def noise_along(codec: Codec, rng: RandomStreams, most: float) -> Tensor:
    """Returns noise of the covariance of image embeddings, [b, d], times a level a row: ``most`` u^2, u uniform."""
    # The square: most rows get little noise, and the model still learns the clean text.
    level = most * rng.uniform("text_noise_level", 1).square()
    noise = level * rng.normal("text_noise", codec.codes)
    return (noise * codec.variance.sqrt().float()) @ codec.components.float()


@torch.no_grad()
def sample(
    model: ARPrior,
    tokens: Tensor,
    text_embedding: Tensor,
    dot_codes: Tensor,
    rng: RandomStreams,
    temperature: float = 1.0,
    guidance: float = 0.0,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Returns codes drawn left to right, int64 [b, codes].

    Logits are (1 + guidance) conditional - guidance unconditional, over ``temperature``, which must be above 0. A row
    depends on its own stream of ``rng`` alone. ``callback`` hears the number of codes drawn after every one. Raises
    ValueError on a temperature of 0 or less.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: use a number above 0")
    rows = len(tokens)
    keep = guidance_rows(rows, guidance, tokens.device)
    branches = len(keep) // rows
    text = text_embedding.repeat(branches, 1)
    tokens = tokens.repeat(branches, 1)
    x = model.prefix(tokens, text, dot_codes.repeat(branches), keep)
    line = model.regress(tokens, text, keep)
    code_inputs = None if line is None else model.code_inputs(line)
    cache = Cache(x.shape[1] + model.codes)
    # Not torch.multinomial, whose one generator would make a row depend on the batch around it.
    uniform = rng.uniform("codes", model.codes)
    codes = []
    for i in range(model.codes):
        if code_inputs is not None:
            x[:, -1] += code_inputs[:, i]
        out = model.transformer(x + model.position[cache.length : cache.length + x.shape[1]], cache, last_only=True)
        logits = model.logits(out[:, -1])
        if guidance != 0:
            logits = (1 + guidance) * logits[:rows] - guidance * logits[rows:]
        codes.append(invert_cdf(logits / temperature, uniform[:, i]))
        x = model.code(codes[-1].repeat(branches))[:, None]
        if callback is not None:
            callback(i + 1)
    return torch.stack(codes, dim=1)


def invert_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Returns the bucket in whose share of [0, 1) ``uniform`` [b] falls, for ``logits`` [b, buckets]: int64 [b]."""
    # In fp64, as the codec: rounding in fp32 could move the bucket from one device to another.
    cdf = logits.double().softmax(-1).cumsum(-1)
    bucket = torch.searchsorted(cdf, uniform.double()[:, None], right=True)[:, 0]
    return bucket.clamp(max=logits.shape[-1] - 1)  # rounding may leave the last sum just below 1
