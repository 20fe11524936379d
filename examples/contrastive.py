"""Video and sound of a clip are to agree, as in CLIP: only a quarter of the tokens is looked at.

Clips differ in length; each modality is encoded by its own blocks (fusion = "separate").
python examples/contrastive.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from avmae_fast import MaskedEncoder
from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig

VISIBLE, WIDTH = 0.25, 48


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stack = StackConfig(width=WIDTH, layers=2, heads=3, mlp=96)
        video = VideoConfig(frames=8, height=32, width=32, tubelet=(2, 8, 8))
        audio = AudioConfig(frames=64, mel_bins=32, patch=(8, 8))
        self.encoder = MaskedEncoder(
            ModelConfig(encoder=stack, decoder=stack, video=video, audio=audio, fusion="separate")
        )
        self.project = nn.ModuleDict({m: nn.Linear(WIDTH, 32) for m in ("video", "audio")})
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, video: list[torch.Tensor], audio: list[torch.Tensor]) -> torch.Tensor:
        keep = {
            "video": [_draw(len(v) // 2 * 16) for v in video],
            "audio": [_draw(len(a) // 8 * 4) for a in audio],
        }
        features = self.encoder(video, audio, keep)
        means = {m: torch.stack([x.mean(0) for x in features.clips(m)]) for m in keep}
        v, a = (F.normalize(self.project[m](mean), dim=1) for m, mean in means.items())
        scores = self.log_scale.exp() * v @ a.T
        pairs = torch.arange(len(video))
        return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2


def _draw(tokens: int) -> torch.Tensor:
    return torch.randperm(tokens)[: int(tokens * VISIBLE)]


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    model = Contrastive()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # The darker a clip is, the louder.
    noise = [torch.randint(0, 256, (t, 32, 32, 3), dtype=torch.uint8) for t in (4, 8, 6, 8)]
    video = [clip // (b + 1) for b, clip in enumerate(noise)]
    audio = [b + torch.randn(rows, 32) for b, rows in enumerate((64, 32, 48, 40))]
    losses = []
    for _ in range(steps):
        loss = model(video, audio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
