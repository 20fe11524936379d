"""A timm ViT trained by Lightning; `accelerate` is the only line that is not theirs.

pip install timm lightning; python examples/lightning_module.py
"""

import lightning
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from avmae_fast import accelerate


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4
        )
        accelerate(self.vit)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.vit(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int = 20) -> list[float]:
    lightning.seed_everything(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    model = Classifier()
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=8))
    return model.losses


if __name__ == "__main__":
    print(main())
