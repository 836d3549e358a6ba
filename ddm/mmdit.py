"""ddm.mmdit"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import DiT, GELU, modulate



def rms_norm(x, weight):
    """x [...,d] by its root mean square, times weight [d]."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), 1e-6)      # of one dtype: the fused kernel wants it so


def rotary_2d(dim, side):
    """[side*side, dim/2]: the angles of rotary positions, of the row in one half, of the column in the other, both from the picture's centre."""
    freq = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)[:, None] * freq      # [side, dim/4]
    rows, cols = angle[:, None].expand(side, side, -1), angle[None].expand(side, side, -1)
    return torch.cat([rows, cols], dim=2).reshape(side * side, dim // 2).float()


def rotate(x, angle):
    """x [B,H,N,d] with the pairs (i, i + d/2) of its last dimension turned by angle [N,d/2]."""
    a, b = x.float().chunk(2, dim=3)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3).to(x.dtype)


class Stream(nn.Module):
    """The weights that a double-stream block has for its picture tokens, or for its text tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(dim // heads)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), GELU(), nn.Linear(4 * dim, dim))

    def heads_of(self, x, shift, scale):
        """[B,N,D] -> q, k, v [B,H,N,D/H]."""
        q, k, v = self.qkv(modulate(self.norm1(x), shift, scale)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return rms_norm(q, self.q_norm), rms_norm(k, self.k_norm), v

    def finish(self, x, out, gate1, shift2, scale2, gate2):
        """x [B,N,D] and what it attended to -> [B,N,D]."""
        x = x + gate1[:, None] * self.proj(out)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DoubleBlock(nn.Module):
    """Picture and text apart but for the attention, in which each token sees all of both (Esser et al. 2024)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.text, self.image = Stream(dim, heads), Stream(dim, heads)
        self.table = nn.Parameter(torch.zeros(2, 6, dim))       # added to the shared modulation, as in PixArt-alpha

    def forward(self, y, x, c, angle, mask):
        """y [B,M,D], x [B,N,D]; c [B,6,D]; angle [M+N,d/2]; mask [B,1,1,M+N] -> y, x."""
        mod_y, mod_x = ((c + table).unbind(1) for table in self.table)
        (qy, ky, vy), (qx, kx, vx) = self.text.heads_of(y, *mod_y[:2]), self.image.heads_of(x, *mod_x[:2])
        q, k, v = torch.cat([qy, qx], dim=2), torch.cat([ky, kx], dim=2), torch.cat([vy, vx], dim=2)        # [B,H,M+N,d]
        out = F.scaled_dot_product_attention(rotate(q, angle), rotate(k, angle), v, attn_mask=mask).transpose(1, 2).flatten(2)
        out_y, out_x = out.split([y.shape[1], x.shape[1]], dim=1)
        return self.text.finish(y, out_y, *mod_y[2:]), self.image.finish(x, out_x, *mod_x[2:])


class SingleBlock(nn.Module):
    """Picture and text as one sequence; attention and MLP side by side, in two matrices (Dehghani et al. 2023, FLUX)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear1 = nn.Linear(dim, 7 * dim)      # q, k, v and the MLP's hidden layer
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(dim // heads)) for _ in range(2))
        self.gelu = GELU()
        self.linear2 = nn.Linear(5 * dim, dim)
        self.table = nn.Parameter(torch.zeros(3, dim))

    def forward(self, z, c, angle, mask):
        """z [B,M+N,D]; c [B,6,D], of which the first three serve here; angle [M+N,d/2]; mask [B,1,1,M+N] -> z."""
        shift, scale, gate = (c[:, :3] + self.table).unbind(1)
        D = z.shape[2]
        qkv, hidden = self.linear1(modulate(self.norm(z), shift, scale)).split([3 * D, 4 * D], dim=2)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)                              # [B,H,M+N,d]
        q, k = rotate(rms_norm(q, self.q_norm), angle), rotate(rms_norm(k, self.k_norm), angle)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return z + gate[:, None] * self.linear2(torch.cat([out.transpose(1, 2).flatten(2), self.gelu(hidden)], dim=2))


class MMDiT(DiT):
    """A denoiser of two streams, text and picture, after FLUX: double-stream blocks, then single-stream ones. Rotary positions, normalised
    queries and keys, one modulation that all blocks share (each adds a learned table to it)."""

    def make_blocks(self, c):
        self.blocks = nn.ModuleList(DoubleBlock(c.dim, c.heads) if i < c.double else SingleBlock(c.dim, c.heads) for i in range(c.depth))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.final_table = nn.Parameter(torch.zeros(2, c.dim))

    def reset_positions(self, device=None, dtype=None):
        self.positions = rotary_2d(self.config.dim // self.config.heads, self.config.size // self.config.patch).to(device)     # fp32 always

    def joints(self):
        return [self.modulation[1]]

    def trunk(self, x_t, t, c):
        """-> [B,N,D]: the picture's tokens after the blocks, normalised and modulated."""
        x, emb = self.embed(x_t, t, c)                                          # [B,N,D], [B,D]
        if self.config.condition == "text":
            y, mask = self.embed_text(c)                                        # [B,M,D], [B,M]
            mask = F.pad(mask, (0, x.shape[1]), value=True)[:, None, None]      # [B,1,1,M+N]
        else:
            y, mask = self.text_norm(self.text_null).expand(len(x), -1, -1), None
        # both streams in one precision: under autocast a norm gives fp32 and the patches come in bf16, which the first
        # block's sums would make fp32. All other blocks would then be another graph than the first
        x = x.to(y.dtype)
        angle = F.pad(self.positions, (0, 0, y.shape[1], 0))                    # text is not turned
        mod = self.modulation(emb).unflatten(1, (6, -1))                        # [B,6,D]
        for block in self.blocks[:self.config.double]:
            y, x = block(y, x, mod, angle, mask)
        z = torch.cat([y, x], dim=1)                                            # [B,M+N,D]
        for block in self.blocks[self.config.double:]:
            z = block(z, mod, angle, mask)
        shift, scale = (emb[:, None] + self.final_table).unbind(1)
        return modulate(self.final_norm(z[:, y.shape[1]:]), shift, scale)

    def block_flops(self):
        D, T = self.config.dim, sum(self.tokens())
        return self.config.depth * (24 * T * D * D + 4 * T * T * D) + 12 * D * D        # both kinds of block cost the same
