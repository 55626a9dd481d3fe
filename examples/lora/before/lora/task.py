"""The model with its adapters, the text of one partition, and how they are trained and tested."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

WORDS, LENGTH = 32, 16


def get_model() -> PeftModel:
    """Return the frozen model with fresh adapters; the same one everywhere.

    A tiny Llama with random weights stands where ``AutoModelForCausalLM.from_pretrained`` would.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            initializer_range=0.2,
        )
        adapters = LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        )
        return get_peft_model(LlamaForCausalLM(config), adapters)


class Text(Dataset):
    """Rows of words in which each is followed by the one that is three further; another part for each partition."""

    def __init__(self, partition: int) -> None:
        first = torch.randint(WORDS, (64, 1), generator=torch.Generator().manual_seed(partition))
        self.rows = (first + 3 * torch.arange(LENGTH)) % WORDS

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a row, and what is to be predicted of it: itself."""
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(model: PeftModel, text: Text, lr: float, seed: int) -> float:
    """Train the adapters for one epoch, and return the mean loss."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            learning_rate=lr,
            lr_scheduler_type="constant",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=text).train().training_loss


def test(model: PeftModel, text: Text) -> float:
    """Return the loss."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=text.rows, labels=text.rows).loss.item()
