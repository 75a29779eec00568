"""Training runs of seconds: a text over eight tokens, two heads, a dozen steps."""

import torch

from early_exit_cli.config import DataConfig, HeadsConfig, TrainingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.heads.exit_heads import exit_layers_of
from early_exit_cli.hidden_states.live import BackboneStates
from early_exit_cli.training.trainer import Lessons, Trainer

DATA = DataConfig(dataset_name="x", max_length=32)


def documents(seed, count=24):
    """Texts over eight tokens, so that what is learnt on some holds for others."""
    generator = torch.Generator().manual_seed(seed)
    return [Document((torch.randint(8, (30,), generator=generator) * 30).tolist(), "s") for _ in range(count)]


def make_trainer(backbone, heads, config, train=None, held_out=4):
    exit_layers = exit_layers_of(heads, backbone.num_blocks)
    train = documents(0) if train is None else train
    source = BackboneStates(backbone, exit_layers, train, documents(1, held_out), DATA, config)
    return Trainer(Lessons(source), heads, config, DATA, {})


def trainer(backbone, folder, draft_vocab=64, held_out=4, **changes):
    """Two adapters; `changes` are settings of the training."""
    settings = dict(output_dir=folder, max_steps=12, batch_size=2, lr=3e-3, eval_every=6, save_every=6) | changes
    heads = HeadsConfig(head_layer_indices=[1, 4], rank=32, draft_vocab=draft_vocab)
    return make_trainer(backbone, heads, TrainingConfig(**settings), held_out=held_out)
