"""DiT, and the router on top of it: the networks that are trained. Needs torch alone.

    x_t [B,C,S,S], t [B], c  ->  DiT     [B,C,S,S]  velocity, x0 or eps (flow.py says which)
                             ->  Router  [B,K]      logits of p(k | x_t, t, c)

DiT's blocks are adaLN-Zero (Peebles & Xie 2023). Text enters by cross-attention to a sequence of
tokens, as in PixArt-alpha (Chen et al. 2023). ddm/mmdit.py has MMDiT, for experts of billions of
weights, and ddm/artifacts.py saves and loads all three.

The condition c is
    None                        without a condition
    class numbers [B]           classes is the number of "no class"
    word numbers [B,L]          of hashed words (ddm/text.py), 0 being "no word"
    token features [B,L,E]      of a pretrained encoder, a row of zeros being no token
A text of zeros alone is no condition.

In the shapes below B is images, C channels, S pixels or latent cells a side, p those of a patch,
n = S / p patches a side, N = n n of them in all; D is the width, of H heads with d = D / H; L words
or tokens of text, with E features, M = 1 + L of them with the learned null; K clusters.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

#                        dim  depth  heads  double
SIZES = {"DiT-S":       ( 384,   12,    6,     0),
         "DiT-B":       ( 768,   12,   12,     0),
         "DiT-L":       (1024,   24,   16,     0),
         "DiT-XL":      (1152,   28,   16,     0),
         # our reading of the paper's "hidden 2560, depth 30, 3B": 30 double blocks would be 7B
         "MMDiT-3B":    (2560,   30,   20,     8),
         # for a CPU
         "mini":        ( 192,    6,    4,     0),
         "tiny":        ( 128,    4,    4,     0),
         "MMDiT-tiny":  ( 128,    4,    4,     1)}


def make_presets():
    """{"DiT-B/2": its part of a ModelConfig, ...}: each size with patches of 2, 4 and 8 a side."""
    presets = {}
    for name, (dim, depth, heads, double) in SIZES.items():
        for patch in (2, 4, 8):
            presets[f"{name}/{patch}"] = dict(
                dim=dim, depth=depth, heads=heads, patch=patch, double=double)
    return presets


PRESETS = make_presets()


@dataclass
class ModelConfig:
    """All that a network is built from. ValueError for a shape that cannot be."""
    size: int                   # S, side of the input, in pixels or latent cells
    channels: int               # C, 3 for pixels
    dim: int                    # D
    depth: int                  # blocks
    heads: int                  # H
    patch: int                  # p
    condition: str = "none"     # none | class | text
    classes: int = 0            # condition = class
    vocab: int = 0              # condition = text: rows of the word table; 0: features come in
    text_dim: int = 0           # condition = text: E of the features; 0: word numbers come in
    length: int = 0             # condition = text: L, words or tokens of a caption, at most
    clusters: int = 0           # K of a router; 0: a denoiser
    double: int = 0             # double-stream blocks of an MMDiT, the others single; 0: a DiT

    def __post_init__(self):
        remedy = "change data.size or the model's patch"
        if self.size % self.patch:
            raise ValueError(
                f"size {self.size} is not a multiple of the patch {self.patch}: {remedy}")
        if self.size // self.patch > 512:
            raise ValueError(
                f"size {self.size} is more than 512 patches of {self.patch} a side: {remedy}")

        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of heads {self.heads} and of 4")

        if self.double:
            head = self.dim // self.heads
            if self.clusters or head % 4 or self.double > self.depth:
                raise ValueError(
                    f"double {self.double}: an MMDiT is a denoiser, its heads ({self.dim} / "
                    f"{self.heads} wide) a multiple of 4, at most all of its {self.depth} blocks "
                    f"double-stream")


def sincos_2d(dim, side):
    """[side*side, dim]: sines and cosines of the row in one half, of the column in the other."""
    freq = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * freq         # [side, dim/4]
    one = torch.cat([angle.sin(), angle.cos()], dim=1)                      # [side, dim/2]
    rows = one[:, None].expand(side, side, -1)                              # [side, side, dim/2]
    cols = one[None].expand(side, side, -1)                                 # [side, side, dim/2]
    return torch.cat([rows, cols], dim=2).reshape(side * side, dim).float()


def modulate(x, shift, scale):
    """x [B,N,D] by a shift and a scale [B,D] of each image."""
    return x * (1 + scale[:, None]) + shift[:, None]


class GELU(nn.Module):
    """GELU by the tanh approximation."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            # x sigmoid(2 u) = 0.5 x (1 + tanh u), where u = sqrt(2 / pi) x (1 + 0.044715 x^2):
            # half the time on a CPU, compiled into one kernel; eager, it would be several
            return x * torch.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        return F.gelu(x, approximate="tanh")


class Attention(nn.Module):
    """Multi-head attention from x [B,N,D] to itself, or to y [B,M,D] where mask [B,M] holds."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, z):
        """[B,N,D] -> [B,H,N,d]"""
        B, N, D = z.shape
        return z.view(B, N, self.heads, D // self.heads).transpose(1, 2)

    def forward(self, x, y=None, mask=None):
        B, N, D = x.shape
        if y is None:
            q, k, v = self.qkv(x).chunk(3, dim=2)                           # [B,N,D] each
        else:
            # the same layout of weights: queries from x, keys and values from y
            weight = self.qkv.weight
            bias = self.qkv.bias
            q = F.linear(x, weight[:D], bias[:D])                           # [B,N,D]
            k, v = F.linear(y, weight[D:], bias[D:]).chunk(2, dim=2)        # [B,M,D] each
        if mask is not None:
            mask = mask[:, None, None]                                      # [B,1,1,M]

        q = self.split_heads(q)                                             # [B,H,N,d]
        k = self.split_heads(k)                                             # [B,H,M,d]
        v = self.split_heads(v)                                             # [B,H,M,d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # [B,H,N,d]
        return self.proj(out.transpose(1, 2).reshape(B, N, D))              # [B,N,D]


class Block(nn.Module):
    """Attention, cross-attention to the text if there is one, MLP; adaLN-Zero modulates them."""

    def __init__(self, dim, heads, cross):
        super().__init__()
        # the norms have no weights of their own: adaLN shifts and scales what they give
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.cross = Attention(dim, heads) if cross else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), GELU(), nn.Linear(4 * dim, dim))
        self.adaLN = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, emb, y, mask):
        """x [B,N,D]; emb [B,D], time and class; y [B,M,D] and its mask [B,M], the text -> x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(emb).chunk(6, dim=1)

        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        if self.cross is not None:
            # neither norm nor gate, as in PixArt-alpha: its projection begins as zeros
            x = x + self.cross(x, y, mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Trunk(nn.Module):
    """What the networks have in common: image, time and condition are embedded, blocks follow.

    A subclass adds self.head and calls init_weights. One with other blocks (MMDiT) replaces
    make_blocks, zero_layers, reset_positions and features, and nothing else.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.dim

        self.patch_embed = nn.Conv2d(config.channels, D, config.patch, stride=config.patch)
        # a constant, and so not saved
        self.register_buffer("positions", None, persistent=False)
        self.reset_positions()

        self.time_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        if config.condition == "class":
            # the last row is "no class"
            self.class_embed = nn.Embedding(config.classes + 1, D)
        if config.condition == "text" or config.double:
            # always attended to: all that there is without a caption
            self.text_null = nn.Parameter(torch.zeros(1, 1, D))
            self.text_norm = nn.LayerNorm(D, eps=1e-6)
        if config.condition == "text" and config.text_dim:
            # as PixArt-alpha's; the encoder's tokens know their positions
            self.text_proj = nn.Sequential(
                nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, D),
                nn.GELU(approximate="tanh"), nn.Linear(D, D))
        elif config.condition == "text":
            self.word_embed = nn.Embedding(config.vocab, D)
            self.word_positions = nn.Parameter(torch.zeros(config.length, D))

        self.make_blocks()
        self.final_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)

    def make_blocks(self):
        """Makes the blocks, and what modulates the last norm."""
        c = self.config
        cross = c.condition == "text"
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, cross) for _ in range(c.depth))
        self.final_adaLN = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 2 * c.dim))

    def zero_layers(self):
        """The linear layers, besides the head, that begin as zeros."""
        layers = [self.final_adaLN[1]]
        for block in self.blocks:
            layers.append(block.adaLN[1])
            if block.cross is not None:
                layers.append(block.cross.proj)
        return layers

    def reset_positions(self, device=None, dtype=torch.float32):
        """Computes the positions [N,D] of the patches, again after weights were loaded."""
        side = self.config.size // self.config.patch
        self.positions = sincos_2d(self.config.dim, side).to(device, dtype)

    def init_weights(self):
        """As DiT's: Xavier for linear layers, N(0, 0.02^2) for embeddings and the MLP of time.

        Zeros wherever a branch joins (adaLN-Zero), and for the head: the untrained network
        predicts zeros, the untrained router that all clusters are equally likely.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

        # to embed a patch is a linear layer, too
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)

        # these were Xavier's in the loop above, as all linear layers were
        nn.init.normal_(self.time_mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_mlp[2].weight, std=0.02)
        if hasattr(self, "word_positions"):
            nn.init.normal_(self.word_positions, std=0.02)
        if hasattr(self, "text_null"):
            nn.init.normal_(self.text_null, std=0.02)

        for linear in [self.head, *self.zero_layers()]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def embed_time(self, t):
        """t [B] in [0,1] -> [B,D]: sines and cosines of 1000 t, then an MLP."""
        # wavelengths from 2 pi to nearly 10000 * 2 pi of 1000 t, in float32 whatever t is
        exponent = torch.arange(128, device=t.device, dtype=torch.float32) / 128
        freq = torch.exp(-math.log(10000) * exponent)                       # [128]
        angle = 1000 * t.float()[:, None] * freq                            # [B,128]
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)                # [B,256]
        return self.time_mlp(waves.to(self.time_mlp[0].weight.dtype))       # [B,D]

    def embed_text(self, c):
        """Word numbers [B,L] or token features [B,L,E] -> tokens [B,M,D], mask [B,M].

        The first token is the learned null, which is never masked.
        """
        if self.config.text_dim:
            y = self.text_proj(c.to(self.text_null.dtype))                  # [B,L,D]
            mask = c.any(dim=2)                                             # [B,L]
        else:
            y = self.word_embed(c) + self.word_positions                    # [B,L,D]
            mask = c != 0                                                   # [B,L]
        y = torch.cat([self.text_null.expand(len(c), -1, -1), y], dim=1)    # [B,M,D]
        return self.text_norm(y), F.pad(mask, (1, 0), value=True)

    def embed(self, x_t, t, c):
        """-> the patches as tokens [B,N,D]; time, and class if there is one, as a vector [B,D]."""
        x = self.patch_embed(x_t).flatten(2).transpose(1, 2)                # [B,N,D]
        emb = self.embed_time(t)                                            # [B,D]
        if self.config.condition == "class":
            emb = emb + self.class_embed(c)                                 # [B,D]
        # contiguous: every sum x + ..., down to the last block, would take over the transposed
        # layout of its first operand
        return x.contiguous(), emb

    def features(self, x_t, t, c, cls_token=None):
        """-> [B,N,D] after the blocks, normalised. cls_token [1,1,D]: goes before the patches."""
        x, emb = self.embed(x_t, t, c)                                      # [B,N,D], [B,D]
        x = x + self.positions                                              # [B,N,D]
        if cls_token is not None:
            x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)     # [B,1+N,D]

        y = None
        mask = None
        if self.config.condition == "text":
            y, mask = self.embed_text(c)                                    # [B,M,D], [B,M]

        for block in self.blocks:
            x = block(x, emb, y, mask)                                      # [B,N,D]

        shift, scale = self.final_adaLN(emb).chunk(2, dim=1)                # [B,D], [B,D]
        return modulate(self.final_norm(x), shift, scale)                   # [B,N,D]


class DiT(Trunk):
    """The denoiser, whose prediction has the shape of its input."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.dim, config.patch ** 2 * config.channels)
        self.init_weights()

    def forward(self, x_t, t, c=None):
        """x_t [B,C,S,S], t [B] in [0,1], c the condition -> [B,C,S,S]."""
        C = self.config.channels
        p = self.config.patch
        n = self.config.size // p

        x = self.features(x_t, t, c)                                           # [B,N,D]
        x = self.head(x)                                                    # [B,N,p*p*C]

        # each token is a patch: put it back in its place
        x = x.view(-1, n, n, p, p, C)                                       # [B,n,n,p,p,C]
        x = x.permute(0, 5, 1, 3, 2, 4)                                     # [B,C,n,p,n,p]
        return x.reshape(-1, C, n * p, n * p)                               # [B,C,S,S]


class Router(Trunk):
    """p(k | x_t, t, c) (eq. 5): a learned CLS token, and a linear head over the clusters on it."""

    def __init__(self, config):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.head = nn.Linear(config.dim, config.clusters)
        self.init_weights()
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x_t, t, c=None):
        """x_t [B,C,S,S], t [B] in [0,1], c the condition -> logits [B,K], float32 always."""
        x = self.features(x_t, t, c, self.cls_token)                           # [B,1+N,D]
        x = x[:, 0]                                                         # [B,D]
        # one product of [D,K]: bf16 would round the logits, so that p is off by some percent and
        # clusters tie
        with torch.autocast(x.device.type, enabled=False):
            weight = self.head.weight.float()                               # [K,D]
            return F.linear(x.float(), weight, self.head.bias.float())      # [B,K]


def null_condition(config, c):
    """The condition that stands for none, shaped like c: guidance's second branch sees it."""
    if c is None:
        return None
    return torch.full_like(c, config.classes if config.condition == "class" else 0)


def drop_condition(config, c, drop):
    """c, made unconditional for the samples where drop [B] holds."""
    if c is None:
        return None
    drop = drop.view(-1, *[1] * (c.ndim - 1))                               # [B,1,..]
    return torch.where(drop, null_condition(config, c), c)
