"""The exported head is the same head to the package that serves it: equal logits, in an environment of its own."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from drafters import some_head
from safetensors.torch import load_file, save_file

from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.heads.export_speculators import export_eagle
from early_exit_cli.hidden_states.live import run_states


@pytest.mark.slow
@pytest.mark.network
def test_an_exported_head_has_equal_logits_in_speculators(speculators_python, tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    head = some_head(backbone, torch.arange(0, 320, 5))
    export_eagle(head, backbone, tmp_path / "head", 3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (24,), generator=generator)
    batch = pack([Document(ids.tolist(), "s")], 24, 0)[0]
    kept = {}
    hook = backbone.blocks[-1].register_forward_hook(
        lambda _module, _arguments, output: kept.update(last=output[0] if isinstance(output, tuple) else output)
    )
    states = run_states(backbone, batch, head.exit_layers)
    hook.remove()
    raw = torch.cat([*states.exits, kept["last"][0]], -1)  # that checkpoint norms the last state itself
    save_file({"states": raw, "ids": ids}, tmp_path / "inputs.safetensors")
    worker = Path(__file__).parents[1] / "support" / "speculators_worker.py"
    subprocess.run(
        [
            speculators_python,
            str(worker),
            tmp_path / "head",
            tmp_path / "inputs.safetensors",
            tmp_path / "outputs.safetensors",
        ],
        check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    theirs = load_file(tmp_path / "outputs.safetensors")
    with torch.inference_mode():
        ours = head(states, 3)
    for step, said in enumerate(ours):
        positions = said.positions - 1 - step
        assert torch.allclose(theirs[f"step{step}"][positions], said.logits, atol=1e-4), step
