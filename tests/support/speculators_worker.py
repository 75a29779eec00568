"""Runs in an environment of its own, with the package `speculators`: an exported head's logits over given states.

usage: speculators_worker.py CHECKPOINT INPUTS OUTPUTS (safetensors files: states [seq, 3 * hidden], ids [seq])
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

checkpoint, inputs, outputs = sys.argv[1:]
config = Eagle3SpeculatorConfig.from_pretrained(checkpoint)
config.transformer_layer_config._attn_implementation = "eager"
model = Eagle3DraftModel.from_pretrained(checkpoint, config=config, torch_dtype=torch.float32).eval()
found = load_file(inputs)
logits = []
model.lm_head.register_forward_hook(lambda _module, _arguments, output: logits.append(output[0].float()))
with torch.inference_mode():
    model(
        hidden_states=found["states"][None],
        input_ids=found["ids"].roll(-1)[None],
        document_ids=torch.zeros(1, found["ids"].numel(), dtype=torch.int64),
        ttt_steps=3,
    )
save_file({f"step{step}": value.contiguous() for step, value in enumerate(logits)}, outputs)
