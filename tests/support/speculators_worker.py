"""Runs in an environment of its own, with the package `speculators`: an exported head's logits over given states.

usage: speculators_worker.py CHECKPOINT INPUTS OUTPUTS (safetensors files: states [seq, 3 * hidden], ids [seq])
"""

import sys

import torch
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators_logits import write_logits

checkpoint, inputs, outputs = sys.argv[1:]
config = Eagle3SpeculatorConfig.from_pretrained(checkpoint)
config.transformer_layer_config._attn_implementation = "eager"
model = Eagle3DraftModel.from_pretrained(checkpoint, config=config, torch_dtype=torch.float32).eval()
write_logits(model, inputs, outputs, steps=3)
