"""A masked autoencoder for video in plain PyTorch: clips of 4 to 8 frames, nothing is padded
in the encoder. python examples/pytorch_mae.py
"""

import torch
from torch import nn

from avmae_fast import MaskedEncoder, accelerate
from avmae_fast.config import ModelConfig, StackConfig, VideoConfig
from avmae_kernels.patches import normalise_pixels, patchify

TUBELET, SIZE, WIDTH, RATIO = (2, 8, 8), 32, 48, 0.75


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        video = VideoConfig(frames=8, height=SIZE, width=SIZE, tubelet=TUBELET)
        stack = StackConfig(width=WIDTH, layers=2, heads=3, mlp=96)
        self.encoder = MaskedEncoder(
            ModelConfig(encoder=stack, decoder=stack, video=video, audio=None, fusion="early")
        )
        layer = nn.TransformerEncoderLayer(
            WIDTH, 3, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.places = nn.Parameter(0.02 * torch.randn(video.tokens, WIDTH))
        self.head = nn.Linear(WIDTH, video.patch_dim)

    def forward(self, clips: list[torch.Tensor]) -> torch.Tensor:
        pixels = [normalise_pixels(clip[None], torch.float32) for clip in clips]
        targets = [patchify(clip, TUBELET)[0] for clip in pixels]
        # Drawn anew for each clip: numbers of tokens differ with its length.
        orders = [torch.randperm(len(target)) for target in targets]
        keep = [order[: int(len(order) * (1 - RATIO))] for order in orders]
        features = self.encoder(clips, keep=keep)
        losses = []
        for clip, shown, target in zip(features.clips(), keep, targets, strict=True):
            tokens = self.places[: len(target)].index_add(0, shown, clip)
            predicted = self.head(self.decoder(tokens[None]))[0]
            masked = torch.ones(len(target), dtype=torch.bool).index_fill(0, shown, False)
            losses.append((predicted - target)[masked].square().mean())
        return torch.stack(losses).mean()


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    model = Autoencoder()
    accelerate(model.decoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clips = [torch.randint(0, 256, (t, SIZE, SIZE, 3), dtype=torch.uint8) for t in (4, 8, 6)]
    losses = []
    for _ in range(steps):
        loss = model(clips)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
