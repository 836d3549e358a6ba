"""DiT, the router on top of it, and MMDiT for experts of billions of weights. Self-contained: torch and safetensors alone.

    x_t [B,C,S,S], t [B], c  ->  DiT, MMDiT: [B,C,S,S]  velocity, x0 or eps (flow.py says which)
                             ->  Router:     [B,K]      logits of p(k | x_t, t, c)

DiT's blocks are adaLN-Zero (Peebles & Xie 2023); text enters by cross-attention to a sequence of tokens, as in PixArt-alpha. In MMDiT,
after FLUX, text is a second stream of tokens, with weights of its own in the first blocks, the same ones later.
The condition c is None (condition = none), class numbers [B] (class), or for text word numbers [B,L] (see hash_words) or the token
features [B,L,E] of a pretrained encoder. In a text, a row of zeros is no token; a text of none is no condition.
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
         "MMDiT-3B":    (2560,   30,   20,     8),      # our reading of the paper's "hidden 2560, depth 30, 3B": 30 double-stream blocks would be 7B
         "mini":        ( 192,    6,    4,     0),      # for a CPU
         "tiny":        ( 128,    4,    4,     0),
         "MMDiT-tiny":  ( 128,    4,    4,     1)}
PRESETS = {f"{name}/{patch}": dict(dim=dim, depth=depth, heads=heads, patch=patch, double=double)
           for name, (dim, depth, heads, double) in SIZES.items() for patch in (2, 4, 8)}


@dataclass
class ModelConfig:
    size: int                   # side of the input, in pixels or latent cells
    channels: int               # 3 for pixels
    dim: int
    depth: int
    heads: int
    patch: int
    condition: str = "none"     # none | class | text
    classes: int = 0            # condition = class
    vocab: int = 0              # condition = text: rows of the word table, number 0 being "no word"; 0: token features come in
    text_dim: int = 0           # condition = text: width E of the token features; 0: word numbers come in
    length: int = 0             # condition = text: words or tokens a caption, at most
    clusters: int = 0           # K for a router, 0 for a denoiser
    double: int = 0             # so many of the blocks are double-stream, the rest single-stream: an MMDiT; 0: a DiT

    def __post_init__(self):
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not a multiple of the patch {self.patch}: change data.size or the model's patch")
        if self.size // self.patch > 512:
            raise ValueError(f"size {self.size} is more than 512 patches of {self.patch} a side: change data.size or the model's patch")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of heads {self.heads} and of 4")
        if self.double and (self.dim // self.heads % 4 or self.double > self.depth or self.clusters):
            raise ValueError(f"double {self.double}: an MMDiT is a denoiser, its heads ({self.dim} / {self.heads} wide) a multiple of 4, "
                             f"at most all of its {self.depth} blocks double-stream")


def sincos_2d(dim, side):
    """[side*side, dim]: sines and cosines of the row in one half, of the column in the other."""
    freq = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * freq                # [side, dim/4]
    one = torch.cat([angle.sin(), angle.cos()], dim=1)                             # [side, dim/2]
    rows, cols = one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)
    return torch.cat([rows, cols], dim=2).reshape(side * side, dim).float()


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class GELU(nn.Module):
    """By the tanh approximation. Compiled, x sigmoid(2 u) is the same as 0.5 x (1 + tanh u) and takes half the time on a CPU; eager, it would be more kernels."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            return x * torch.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))       # 2 sqrt(2 / pi)
        return F.gelu(x, approximate="tanh")


class Attention(nn.Module):
    """Multi-head attention from x [B,N,D] to itself, or to y [B,M,D] where mask [B,M] holds."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y=None, mask=None):
        B, N, D = x.shape
        if y is None:
            q, k, v = self.qkv(x).chunk(3, dim=2)
        else:       # the same weights' layout, queries from x, keys and values from y
            q = F.linear(x, self.qkv.weight[:D], self.qkv.bias[:D])
            k, v = F.linear(y, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=2)
        q, k, v = (z.view(B, -1, self.heads, D // self.heads).transpose(1, 2) for z in (q, k, v))   # [B,H,N,D/H]
        mask = None if mask is None else mask[:, None, None]                                        # [B,1,1,M]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    def __init__(self, dim, heads, cross):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.cross = Attention(dim, heads) if cross else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), GELU(), nn.Linear(4 * dim, dim))
        self.adaLN = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, y, mask):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        if self.cross is not None:
            x = x + self.cross(x, y, mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Trunk(nn.Module):
    """Patches, time and condition as tokens and vectors, and the blocks: what all the models have in common."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.patch_embed = nn.Conv2d(c.channels, c.dim, c.patch, stride=c.patch)
        self.register_buffer("positions", None, persistent=False)       # a constant: not saved
        self.reset_positions()
        self.time_mlp = nn.Sequential(nn.Linear(256, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        if c.condition == "class":
            self.class_embed = nn.Embedding(c.classes + 1, c.dim)       # the last row: no class
        if c.condition == "text" or c.double:
            self.text_null = nn.Parameter(torch.zeros(1, 1, c.dim))     # always attended: all there is without a caption
            self.text_norm = nn.LayerNorm(c.dim, eps=1e-6)
        if c.condition == "text":
            if c.text_dim:      # as PixArt-alpha's; the encoder's tokens know their positions
                self.text_proj = nn.Sequential(nn.LayerNorm(c.text_dim), nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"),
                                               nn.Linear(c.dim, c.dim))
            else:
                self.word_embed = nn.Embedding(c.vocab, c.dim)
                self.word_positions = nn.Parameter(torch.zeros(c.length, c.dim))
        self.make_blocks(c)
        self.final_norm = nn.LayerNorm(c.dim, eps=1e-6, elementwise_affine=False)

    def make_blocks(self, c):
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.condition == "text") for _ in range(c.depth))
        self.final_adaLN = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 2 * c.dim))

    def reset_positions(self, device=None, dtype=torch.float32):
        """Computes the constants that are not saved."""
        self.positions = sincos_2d(self.config.dim, self.config.size // self.config.patch).to(device, dtype)     # [N,D]

    def init_weights(self):
        """As DiT: Xavier for linear layers, N(0, 0.02^2) for embeddings, zeros wherever a branch joins or leaves (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))     # a patch is a linear layer, too
        nn.init.zeros_(self.patch_embed.bias)
        for linear in (self.time_mlp[0], self.time_mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        if hasattr(self, "word_positions"):
            nn.init.normal_(self.word_positions, std=0.02)
        if hasattr(self, "text_null"):
            nn.init.normal_(self.text_null, std=0.02)
        for linear in [self.head, *self.joints()]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def joints(self):
        """The linear layers, besides the head, that begin as zeros."""
        return [self.final_adaLN[1]] + [b.adaLN[1] for b in self.blocks] + [b.cross.proj for b in self.blocks if b.cross]

    def embed_time(self, t):
        """t [B] in [0,1] -> [B,D]: sines and cosines of 1000 t, then an MLP."""
        freq = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = 1000 * t.float()[:, None] * freq                                # [B,128]
        return self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.time_mlp[0].weight.dtype))

    def embed_text(self, c):
        """Word numbers [B,L] or token features [B,L,E] -> tokens [B,1+L,D], mask [B,1+L]. The first is the learned null, never masked."""
        if self.config.text_dim:
            y, mask = self.text_proj(c.to(self.text_null.dtype)), c.any(dim=2)
        else:
            y, mask = self.word_embed(c) + self.word_positions, c != 0
        y = torch.cat([self.text_null.expand(len(c), -1, -1), y], dim=1)
        return self.text_norm(y), F.pad(mask, (1, 0), value=True)

    def embed(self, x_t, t, c):
        """-> the patches as tokens [B,N,D]; time, and class if there is one, as a vector [B,D]."""
        emb = self.embed_time(t)
        if self.config.condition == "class":
            emb = emb + self.class_embed(c)
        # contiguous: every sum x + y down to the last block would take over the transposed layout of its first operand
        return self.patch_embed(x_t).flatten(2).transpose(1, 2).contiguous(), emb

    def trunk(self, x_t, t, c, first=None):
        """-> [B,N,D] after the blocks, normalised and modulated. `first` [1,1,D]: a token set before the patches."""
        x, emb = self.embed(x_t, t, c)                                          # [B,N,D], [B,D]
        x, y, mask = x + self.positions, None, None
        if first is not None:
            x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)             # [B,1+N,D]
        if self.config.condition == "text":
            y, mask = self.embed_text(c)                                        # [B,1+L,D], [B,1+L]
        for block in self.blocks:
            x = block(x, emb, y, mask)                                          # [B,N,D]
        shift, scale = self.final_adaLN(emb).chunk(2, dim=1)
        return modulate(self.final_norm(x), shift, scale)

    def tokens(self):
        """Tokens of an image: of the picture (with the router's own), and of its text (the learned null among them)."""
        c = self.config
        return (c.size // c.patch) ** 2 + (c.clusters > 0), 1 + c.length if c.condition == "text" or c.double else 0

    def flops(self):
        """Forward FLOPs of one image (a multiply-add is two); a training step costs three times as many."""
        c, D = self.config, self.config.dim
        patch = 2 * c.patch ** 2 * c.channels * D * (c.size // c.patch) ** 2
        text = 2 * c.length * (c.text_dim * D + D * D) if c.text_dim else 0
        return patch + 2 * (256 * D + D * D) + text + self.block_flops() + (2 * D * c.clusters if c.clusters else patch)

    def block_flops(self):
        """Of all blocks, with what modulates them and the last norm."""
        D, (N, L) = self.config.dim, self.tokens()
        block = 24 * N * D * D + 4 * N * N * D + 12 * D * D             # qkv, proj, mlp; attention; adaLN
        if self.config.condition == "text":
            block += 4 * N * D * D + 4 * L * D * D + 4 * N * L * D      # q and proj; k and v; attention
        return self.config.depth * block + 4 * D * D


class DiT(Trunk):
    """The denoiser: [B,C,S,S] -> [B,C,S,S]."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.dim, config.patch ** 2 * config.channels)
        self.init_weights()

    def forward(self, x_t, t, c=None):
        """x_t [B,C,S,S], t [B] in [0,1], c the condition -> [B,C,S,S]."""
        p, n, C = self.config.patch, self.config.size // self.config.patch, self.config.channels
        x = self.head(self.trunk(x_t, t, c))                                    # [B,n*n,p*p*C]
        x = x.view(-1, n, n, p, p, C).permute(0, 5, 1, 3, 2, 4)                 # [B,C,n,p,n,p]
        return x.reshape(-1, C, n * p, n * p)


class Router(Trunk):
    """p(k | x_t, t, c) (eq. 5): the DiT trunk with a learned CLS token and a linear head over the clusters."""

    def __init__(self, config):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.head = nn.Linear(config.dim, config.clusters)
        self.init_weights()
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x_t, t, c=None):
        """x_t [B,C,S,S], t [B] in [0,1], c the condition -> logits [B,K], float32 whatever the weights' precision."""
        x = self.trunk(x_t, t, c, self.cls_token)[:, 0]                         # [B,D]
        # one product of [D,K]: in bf16 it would round the logits, so that p is off by some percent and clusters tie
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.head.weight.float(), self.head.bias.float())


def null_condition(config, c):
    """The condition that stands for none, shaped like c: what a dropped sample and guidance's second branch see."""
    return None if c is None else torch.full_like(c, config.classes if config.condition == "class" else 0)


def drop_condition(config, c, drop):
    """c with the samples where drop [B] holds made unconditional."""
    return None if c is None else torch.where(drop.view(-1, *[1] * (c.ndim - 1)), null_condition(config, c), c)
