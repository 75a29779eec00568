"""Caches of hidden states of a few kilobytes, and what a folder holds."""

import torch
from accelerate import PartialState

from early_exit_cli.config import CacheConfig, DataConfig, TrainingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.files.atomic import file_sha256
from early_exit_cli.hidden_states.extract import extract

EXIT_LAYERS = [2, 5]
DATA = DataConfig(dataset_name="x", max_length=32)
SMALL = CacheConfig(shard_tokens=128, held_out_rows=3)  # four sequences a shard


def documents(seed, count=40):
    generator = torch.Generator().manual_seed(seed)
    return [
        Document((torch.randint(8, (9 + index % 30,), generator=generator) * 30).tolist(), "s", index % 7)
        for index in range(count)
    ]


def make_cache(folder, backbone, config=SMALL, train=None, processes=None, **request):
    """Extract, or go on extracting, the states of a small text."""
    asked = {
        "backbone.model_name": backbone.name,
        "backbone.quantization": "none",
        "backbone.revision": None,
        "cache.store": config.store,
        "cache.shard_tokens": config.shard_tokens,
        "cache.held_out_rows": config.held_out_rows,
        **request,
    }
    return extract(
        folder,
        asked,
        backbone,
        EXIT_LAYERS,
        documents(0) if train is None else train,
        documents(1, 8),
        DATA,
        config,
        TrainingConfig(batch_size=2),
        processes or PartialState(cpu=True),
    )


def content(folder):
    """File name -> hash, of everything in a folder."""
    return {path.name: file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
