"""MMDiT, after FLUX: for experts of billions of weights.

    x_t [B,C,S,S], t [B], c  ->  MMDiT  [B,C,S,S]  velocity, x0 or eps (flow.py says which)

Text is a second stream of tokens. In the first blocks it has weights of its own (double-stream), in
the others the same ones as the image (single-stream). Positions are rotary, queries and keys
normalised, and all blocks share one modulation, to which each adds a learned table.

Embeddings, head and initialisation are model.py's; here stand the blocks and what goes through
them. Shapes as there: M tokens of text, the learned null among them, and N of the image.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GELU, DiT, modulate


def rms_norm(x, weight):
    """x [...,d] by its root mean square, times weight [d]."""
    # of one dtype, as the fused kernel wants it
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), 1e-6)


def rotary_2d(dim, side):
    """[side*side, dim/2]: angles of the row in one half, of the column in the other.

    Both count from the image's centre.
    """
    freq = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    place = torch.arange(side, dtype=torch.float64) - (side - 1) / 2        # [side]
    angle = place[:, None] * freq                                           # [side, dim/4]
    rows = angle[:, None].expand(side, side, -1)                            # [side, side, dim/4]
    cols = angle[None].expand(side, side, -1)                               # [side, side, dim/4]
    return torch.cat([rows, cols], dim=2).reshape(side * side, dim // 2).float()


def rotate(x, angle):
    """x [B,H,N,d] with the pairs (i, i + d/2) of its last dimension turned by angle [N,d/2]."""
    a, b = x.float().chunk(2, dim=3)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3).to(x.dtype)


class Stream(nn.Module):
    """The weights that a double-stream block has for the image's tokens, or for the text's."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), GELU(), nn.Linear(4 * dim, dim))

    def before(self, x, shift, scale):
        """What enters attention: [B,N,D] -> q, k, v [B,H,N,d]."""
        qkv = self.qkv(modulate(self.norm1(x), shift, scale))               # [B,N,3*D]
        qkv = qkv.unflatten(2, (3, self.heads, -1))                         # [B,N,3,H,d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # [B,H,N,d] each
        return rms_norm(q, self.q_norm), rms_norm(k, self.k_norm), v

    def after(self, x, out, gate1, shift2, scale2, gate2):
        """x [B,N,D] and what attention gave for it [B,N,D] -> [B,N,D]."""
        x = x + gate1[:, None] * self.proj(out)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DoubleBlock(nn.Module):
    """Image and text apart, but for the attention of all to all (Esser et al. 2024)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.text = Stream(dim, heads)
        self.image = Stream(dim, heads)
        # added to the shared modulation, as in PixArt-alpha
        self.table = nn.Parameter(torch.zeros(2, 6, dim))

    def forward(self, y, x, mod, angle, mask):
        """y [B,M,D], x [B,N,D]; mod [B,6,D]; angle [M+N,d/2]; mask [B,1,1,M+N] -> y, x."""
        # shift1, scale1, gate1, shift2, scale2, gate2 of each stream
        table_y, table_x = self.table
        mod_y = (mod + table_y).unbind(1)                                   # 6 of [B,D]
        mod_x = (mod + table_x).unbind(1)                                   # 6 of [B,D]

        # one attention over both, the text first
        q_y, k_y, v_y = self.text.before(y, *mod_y[:2])                     # [B,H,M,d] each
        q_x, k_x, v_x = self.image.before(x, *mod_x[:2])                    # [B,H,N,d] each
        q = rotate(torch.cat([q_y, q_x], dim=2), angle)                     # [B,H,M+N,d]
        k = rotate(torch.cat([k_y, k_x], dim=2), angle)                     # [B,H,M+N,d]
        v = torch.cat([v_y, v_x], dim=2)                                    # [B,H,M+N,d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # [B,H,M+N,d]
        out = out.transpose(1, 2).flatten(2)                                # [B,M+N,D]

        out_y, out_x = out.split([y.shape[1], x.shape[1]], dim=1)           # [B,M,D], [B,N,D]
        return self.text.after(y, out_y, *mod_y[2:]), self.image.after(x, out_x, *mod_x[2:])


class SingleBlock(nn.Module):
    """Image and text as one sequence; attention and MLP side by side, in two matrices.

    Dehghani et al. 2023, FLUX.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        # q, k, v and the MLP's hidden layer
        self.linear1 = nn.Linear(dim, 7 * dim)
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))
        self.gelu = GELU()
        self.linear2 = nn.Linear(5 * dim, dim)
        self.table = nn.Parameter(torch.zeros(3, dim))

    def forward(self, z, mod, angle, mask):
        """z [B,M+N,D]; mod [B,6,D], of which three serve; angle and mask as above -> z."""
        D = z.shape[2]
        shift, scale, gate = (mod[:, :3] + self.table).unbind(1)            # [B,D] each

        # all that the block computes from z in one product, and all that it adds to z in another
        both = self.linear1(modulate(self.norm(z), shift, scale))           # [B,M+N,7*D]
        qkv, hidden = both.split([3 * D, 4 * D], dim=2)                     # [..,3*D], [..,4*D]
        qkv = qkv.unflatten(2, (3, self.heads, -1))                         # [B,M+N,3,H,d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # [B,H,M+N,d] each
        q = rotate(rms_norm(q, self.q_norm), angle)                         # [B,H,M+N,d]
        k = rotate(rms_norm(k, self.k_norm), angle)                         # [B,H,M+N,d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # [B,H,M+N,d]
        out = out.transpose(1, 2).flatten(2)                                # [B,M+N,D]

        out = torch.cat([out, self.gelu(hidden)], dim=2)                    # [B,M+N,5*D]
        return z + gate[:, None] * self.linear2(out)                        # [B,M+N,D]


class MMDiT(DiT):
    """The denoiser of two streams, text and image."""

    # these four in the place of Trunk's

    def make_blocks(self):
        c = self.config
        double = [DoubleBlock(c.dim, c.heads) for _ in range(c.double)]
        single = [SingleBlock(c.dim, c.heads) for _ in range(c.depth - c.double)]
        self.blocks = nn.ModuleList(double + single)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.final_table = nn.Parameter(torch.zeros(2, c.dim))

    def zero_layers(self):
        return [self.modulation[1]]

    def reset_positions(self, device=None, dtype=None):
        """Computes the angles [N,d/2] of the patches, in fp32 whatever the weights' dtype is."""
        side = self.config.size // self.config.patch
        self.positions = rotary_2d(self.config.dim // self.config.heads, side).to(device)

    def features(self, x_t, t, c):
        """-> [B,N,D]: the image's tokens after the blocks, normalised."""
        x, emb = self.embed(x_t, t, c)                                      # [B,N,D], [B,D]
        if self.config.condition == "text":
            y, mask = self.embed_text(c)                                    # [B,M,D], [B,M]
            mask = F.pad(mask, (0, x.shape[1]), value=True)                 # [B,M+N]
            mask = mask[:, None, None]                                      # [B,1,1,M+N]
        else:
            y = self.text_norm(self.text_null).expand(len(x), -1, -1)       # [B,1,D]
            mask = None

        # both streams in one precision: under autocast a norm gives fp32 and the patches come in
        # bf16, which the first block's sums would make fp32. All other blocks would then be another
        # graph than the first
        x = x.to(y.dtype)                                                   # [B,N,D]
        # text is not turned
        angle = F.pad(self.positions, (0, 0, y.shape[1], 0))                # [M+N,d/2]
        mod = self.modulation(emb).unflatten(1, (6, -1))                    # [B,6,D]

        for block in self.blocks[:self.config.double]:
            y, x = block(y, x, mod, angle, mask)                            # [B,M,D], [B,N,D]

        # from here on one sequence; the text is dropped at the end
        z = torch.cat([y, x], dim=1)                                        # [B,M+N,D]
        for block in self.blocks[self.config.double:]:
            z = block(z, mod, angle, mask)                                  # [B,M+N,D]

        x = z[:, y.shape[1]:]                                               # [B,N,D]
        shift, scale = (emb[:, None] + self.final_table).unbind(1)          # [B,D], [B,D]
        return modulate(self.final_norm(x), shift, scale)                   # [B,N,D]
