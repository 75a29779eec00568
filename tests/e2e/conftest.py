"""A bundle that the commands themselves made, in processes of their own."""

import json

import pytest
from commands import eexit_process


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"tell me about number {i} and {i * i}"}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, tiny_folder, prompts):
    """Trained and calibrated by the commands, on a tiny model's own answers; seed spelling of the flags."""
    folder = tmp_path_factory.mktemp("bundle") / "heads"
    backbone = ["--model_name", tiny_folder("llama"), "--quantization", "none"]
    code, out, err = eexit_process(
        "train", "--mode", "online", *backbone, "--num_heads", 2, "--rank", 32, "--draft_vocab", 128,
        "--dataset_name", prompts, "--on-policy", "--answer_tokens", 16, "--max_length", 64, "--holdout", 0.3,
        "--output_dir", folder, "--max_steps", 30, "--eval_every", 15, "--lr", 3e-3,
    )  # fmt: skip
    assert code == 0, err
    assert "agreement (best)" in out
    assert "step 15: held-out agreement" in err
    code, out, err = eexit_process("calibrate", "--config_path", folder / "config.json", "--num_samples", 50)
    assert code == 0, err
    assert "entropy threshold" in out
    return folder
