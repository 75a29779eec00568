"""Of the two scripts that run in an environment with the package `speculators`: what its EAGLE-3 heads say."""

import torch
from safetensors.torch import load_file, save_file


def write_logits(model, inputs, outputs, steps):
    """A head's logits at each draft step, the text's own tokens in between, as step0, step1, ...

    Args:
        inputs, outputs: safetensors files; inputs holds states [seq, layers * hidden] and ids [seq].
    """
    found = load_file(inputs)
    logits = []
    model.lm_head.register_forward_hook(lambda _module, _arguments, output: logits.append(output[0].float()))
    with torch.inference_mode():
        model(
            hidden_states=found["states"][None],
            input_ids=found["ids"].roll(-1)[None],
            document_ids=torch.zeros(1, found["ids"].numel(), dtype=torch.int64),
            ttt_steps=steps,
        )
    save_file({f"step{step}": value.contiguous() for step, value in enumerate(logits)}, outputs)
