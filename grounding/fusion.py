"""How phrases, image and modality look at each other.

Dimension key: B images, V phrases, D model width, T prompt tokens, L image tokens, h w map size.
"""

import torch
from torch import nn
from torch.nn import functional as F


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with GELU between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class ModalityAdapter(nn.Module):
    """The image attends to the prompts of its modality, never to the phrases. Starts as the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Conv2d(width, width // 4, 1)
        self.key, self.value = nn.Linear(width, width // 4), nn.Linear(width, width // 4)
        self.out = nn.Conv2d(width // 4, width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w), (B, T, D) → (B, D, h, w)."""
        b, _, h, w = x.shape
        query = self.query(x).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, self.key(prompts), self.value(prompts))
        return x + self.out(F.gelu(mixed + query).transpose(1, 2).reshape(b, -1, h, w))


class PhraseFusion(nn.Module):
    """Each phrase looks at the image by itself: cross-attention without attention among phrases."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm_phrase, self.norm_image, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.feed = mlp(width, 2 * width, width)

    def forward(self, phrases: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """(B, V, D), (B, L, D) → (B, V, D)."""
        key, value = self.key_value(self.norm_image(image)).chunk(2, -1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(self.norm_phrase(phrases)), key, value)
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        phrases = phrases + self.out(seen)
        return phrases + self.feed(self.norm(phrases))


class TwoWayFusion(nn.Module):
    """Deep fusion as in GLIP (Li et al., CVPR 2022, eq. 4–6), what `PhraseFusion` is compared with: one table of
    similarities, read along the image for the phrases and along the phrases for the image. The image then holds the
    whole phrase list: the score of a phrase depends on which others are asked with it. Starts with the image as it is.
    """

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm_phrase, self.norm_image, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.phrase, self.image = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.out_phrase, self.out_image = nn.Linear(width, width), nn.Linear(width, width)
        self.feed = mlp(width, 2 * width, width)
        nn.init.zeros_(self.out_image.weight)
        nn.init.zeros_(self.out_image.bias)

    def forward(self, phrases: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, V, D), (B, L, D) → the same shapes. Without phrases the image stays as it is."""
        if not phrases.shape[1]:
            return phrases, image
        asked, said = self._heads(self.phrase(self.norm_phrase(phrases)))
        shown, seen = self._heads(self.image(self.norm_image(image)))
        for_phrases = F.scaled_dot_product_attention(asked, shown, seen).transpose(1, 2).flatten(2)
        for_image = F.scaled_dot_product_attention(shown, asked, said).transpose(1, 2).flatten(2)
        phrases = phrases + self.out_phrase(for_phrases)
        return phrases + self.feed(self.norm(phrases)), image + self.out_image(for_image)

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, n, 2 D) → what is compared and what is read, each (B, heads, n, D / heads)."""
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.chunk(2, -1))
