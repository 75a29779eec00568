"""What DSSD's demo does with `config.json`, `calibration.json` and `aux_heads.pt`, written anew from its rules: JSON keys
become keyword arguments, and the state dict must fit the modules name by name."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


@dataclass(kw_only=True)
class Config:
    model_name: str
    num_heads: int
    head_layer_indices: list
    quantization: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    training_config: dict | None = None


@dataclass(kw_only=True)
class Calibration:
    model_config_path: str
    calibration_dataset: str
    calibration_samples: int
    uncertainty_metric: str
    accuracy_levels: list
    thresholds: dict = field(default_factory=dict)
    statistics: dict = field(default_factory=dict)

    def at(self, level: float) -> dict:
        return {int(head): value for head, value in self.thresholds[f"{level:.2f}"].items()}


class Head(nn.Module):
    def __init__(self, hidden_size: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.linear = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(hidden))


def load(folder: Path, eps: float) -> tuple[Config, Calibration, nn.ModuleList]:
    """Whatever does not fit raises. Keys of config.json that the loader does not name are ignored there, as the loader
    picks the ones it knows; those of calibration.json are not."""
    found = json.loads((folder / "config.json").read_text())
    known = {name: found[name] for name in Config.__dataclass_fields__ if name != "training_config"}
    config = Config(**known, training_config=found.get("training_config"))
    calibration = Calibration(**json.loads((folder / "calibration.json").read_text()))
    heads = nn.ModuleList(Head(config.hidden_size, config.vocab_size, eps) for _ in range(config.num_heads))
    heads.load_state_dict(torch.load(folder / "aux_heads.pt", map_location="cpu", weights_only=True), strict=True)
    return config, calibration, heads
