"""Runs in an environment of its own, with the package `speculators`: writes a checkpoint with random weights by the package
itself, and its logits over given states.

usage: speculators_maker.py CHECKPOINT OPTIONS INPUTS OUTPUTS (OPTIONS: JSON of the configuration and of its block;
safetensors files: states [seq, layers * hidden], ids [seq])
"""

import json
import sys

import torch
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from speculators_logits import write_logits
from transformers import AutoConfig

checkpoint, options, inputs, outputs = sys.argv[1:]
asked = json.loads(options)
block = AutoConfig.for_model(**asked.pop("block"))
block._attn_implementation = "eager"
config = Eagle3SpeculatorConfig(
    transformer_layer_config=block,
    speculators_config=SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path="org/verifier", architectures=["LlamaForCausalLM"]),
    ),
    **asked,
)
torch.manual_seed(0)
model = Eagle3DraftModel(config).eval()
for name, parameter in model.named_parameters():
    spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
    parameter.data = torch.randn_like(parameter) * spread + (parameter.ndim == 1)
    if name == "lm_head.weight":
        parameter.data *= 3
if config.draft_vocab_size != block.vocab_size:
    chosen = torch.randperm(block.vocab_size)[: config.draft_vocab_size].sort().values
    t2d = torch.zeros(block.vocab_size, dtype=torch.bool)
    t2d[chosen] = True
    model.load_vocab_mappings(t2d, chosen - torch.arange(chosen.numel()))
model.save_pretrained(checkpoint)
write_logits(model, inputs, outputs, steps=4)
