"""Hugging Face's VideoMAE and Trainer; `accelerate` is the only line that is not theirs.

pip install transformers accelerate; python examples/huggingface_trainer.py
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, VideoMAEConfig, VideoMAEForPreTraining

from avmae_fast import accelerate

FRAMES, SIZE, TOKENS, MASKED = 4, 32, 32, 24


class Gradients(Dataset):
    """Pictures that get brighter to the right, with noise."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(number)
        masked = torch.randperm(TOKENS, generator=draw) < MASKED
        noise = torch.rand(FRAMES, 3, SIZE, SIZE, generator=draw)
        pixels = torch.linspace(0, 1, SIZE) + 0.01 * noise
        return {"pixel_values": pixels, "bool_masked_pos": masked}


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=8,
        num_frames=FRAMES,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        decoder_hidden_size=48,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=96,
    )
    model = VideoMAEForPreTraining(config)
    accelerate(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=Gradients())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
