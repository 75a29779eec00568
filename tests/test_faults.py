"""Faults as they come: killed processes, full disks, damaged files, interruptions. `docs/faults.md` names a test for each.

Each cause is the real one. Checked are the message, the exit code, and that nothing is lost.
"""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import LAUNCHER, ONE_THREAD, command_line, eexit, eexit_process, one_line, started
from dssd_files import Touch
from hub_server import Fault, HubServer
from safetensors.torch import load_file, save_file
from small_caches import content, make_cache

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.bundle.load import load_engine
from early_exit_cli.bundle.save import save_bundle
from early_exit_cli.config import BackboneConfig, BundleConfig
from early_exit_cli.errors import BackboneError, CacheError, UnsupportedBackboneError
from early_exit_cli.files.atomic import file_sha256
from early_exit_cli.heads.exit_heads import ExitHeads

DOCS = Path(__file__).parent.parent / "docs" / "faults.md"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"line {i}: {i * i} is the square of {i}."} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and a function that mounts it with a size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size: str) -> Path:
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(size)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def hear_ctrl_c() -> None:
    """In a process of its own: what a shell started in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def training(model: Path, text: Path, folder: Path, *more) -> list:
    return [
        "train", "--model-name", model, "--quantization", "none", "--dataset-name", text, "--max-length", 64,
        "--holdout", 0.3, "--num-heads", 2, "--output-dir", folder, *more,
    ]  # fmt: skip


def extraction(model: Path, text: Path, folder: Path, *more) -> list:
    return [
        "cache", "extract", "--model-name", model, "--quantization", "none", "--dataset-name", text, "--max-length", 64,
        "--num-heads", 2, "--shard-tokens", 256, "--cache-dir", folder, *more,
    ]  # fmt: skip


def wait_while_running(process: subprocess.Popen, condition, seconds: float = 100.0) -> None:
    """Until `condition` is true; a process that ends by itself was too quick, and what follows says so."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.001)


# The backbone


def test_a_gated_backbone_says_where_and_how_to_log_in(tmp_path):
    with HubServer() as hub:
        hub.make_repo("org/gated", {"config.json": b"{}"})
        hub.faults += [Fault(method, "/org/gated/resolve", "gated", times=50) for method in ("HEAD", "GET")]
        code, out, err = eexit_process(
            "infer", "--mode", "full", "--model-name", "org/gated", "--prompt", "a",
            HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1",
        )  # fmt: skip
        assert (code, out) == (1, "")
        assert one_line(err) == f"error: org/gated is gated or private at {hub.url}"
        assert "hf auth login" in err


@pytest.mark.parametrize(
    ("name", "size"), [("model.safetensors", 20_000), ("config.json", 40), ("tokenizer.json", 500), ("config.json", 0)]
)
def test_a_truncated_backbone_is_named(tiny_folder, tmp_path, name, size):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    os.truncate(folder / name, size)
    code, out, err = eexit("infer", "--mode", "full", "--model-name", folder, "--quantization", "none", "--prompt", "a")
    assert (code, out) == (1, "")
    assert str(folder) in one_line(err)


def test_code_that_a_backbone_brings_along_is_never_run(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model", "AutoTokenizer": "theirs.Tokens"}
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass Config: pass\n")
    for model_type, error in (("theirs", UnsupportedBackboneError), ("llama", None)):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": classes}))
        with pytest.raises(error, match="brings code of its own") if error else contextlib.nullcontext():
            load_backbone(BackboneConfig(model_name=str(folder), quantization="none", device="cpu"))
    assert not (tmp_path / "canary").exists()


def test_a_backbone_in_a_pickle_with_code_is_not_loaded(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(tmp_path / "canary")}, folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="could run code"):
        load_backbone(BackboneConfig(model_name=str(folder), quantization="none", device="cpu"))
    assert not (tmp_path / "canary").exists()


def test_four_bit_computes_in_bfloat16_and_never_by_default(tiny_folder):
    import bitsandbytes

    backbone = load_backbone(BackboneConfig(model_name=str(tiny_folder("llama")), quantization="4bit", device="cpu"))
    layers = [layer for layer in backbone.model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 6 * 7
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16} == {backbone.dtype}
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    assert backbone.config.quantization_config.bnb_4bit_use_double_quant


@pytest.fixture(scope="module")
def nan_model(tiny_folder, tmp_path_factory):
    """A model that knows no number for the letter z; the check at load does not meet it."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path_factory.mktemp("nan") / "model")
    z = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["z"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][z] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_token_without_a_number_stops_the_answer(nan_model):
    model = ["--model-name", nan_model, "--quantization", "none", "--mode", "full", "--max-tokens", 4]
    assert eexit("infer", *model, "--prompt", "abc")[0] == 0
    code, out, err = eexit("infer", *model, "--prompt", "abcz")
    assert (code, out) == (1, "")
    assert "the backbone's logits are NaN or infinite" in one_line(err)


def test_a_token_without_a_number_stops_the_extraction_and_is_placed(nan_model, tmp_path):
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"line {i} of a text" + (" with a z in it" if i == 3 else "")} for i in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = eexit(*extraction(nan_model, text, tmp_path / "cache"))
    assert (code, out) == (1, "")
    assert re.search(
        "NaN or infinite states after block 2 in sequences [0-9]+ to [0-9]+ of the train text", one_line(err)
    )
    assert not json.loads((tmp_path / "cache" / "manifest.json").read_text())["complete"]


# Text and settings


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no text"),
        ('{"text": "  "}\n', "holds no text"),
        ('{"text": "a"}\n{"body": "b"}\n', "row 2 has no column"),
    ],
)
def test_text_that_is_none_is_refused_before_anything_loads(tmp_path, content, words):
    path = tmp_path / "text.jsonl"
    path.write_text(content)
    code, out, err = eexit("train", "--dataset-name", path, "--model-name", "not/loaded")
    assert (code, out) == (2, "")
    assert words in one_line(err)


def test_a_prompt_of_broken_bytes_is_refused(tiny_folder):
    model = ["--model-name", str(tiny_folder("llama")), "--quantization", "none", "--mode", "full"]
    command = command_line("infer", *model)
    for encoding in ("utf-8:strict", "utf-8:surrogateescape"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        result = subprocess.run(command, input=b"caf\xe9", capture_output=True, env=environment, timeout=60)
        assert (result.returncode, result.stdout) == (2, b"")
        assert "not UTF-8" in one_line(result.stderr.decode())


def test_launchers_that_shard_the_model_are_refused_at_once(text, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, out, err = eexit(*training(Path("not/loaded"), text, Path("nowhere")))
    assert (code, out) == (2, "")
    assert "DDP only" in one_line(err)
    assert "ddp_config.yaml" in err


# Disks


def test_a_cache_too_large_for_the_disk_is_refused_with_both_numbers(tiny_folder, text, disk):
    folder = disk("150k") / "cache"
    code, out, err = eexit(*extraction(tiny_folder("llama"), text, folder))
    assert (code, out) == (1, "")
    assert re.search(r"the cache needs 0\.\d\d GB more, but .* has 0\.00 GB free", one_line(err))
    assert "--cache-gb" in err
    assert not folder.exists()


def test_a_full_disk_stops_training_and_leaves_the_bundle_that_was_there(tiny_folder, text, tmp_path, disk):
    model, folder = tiny_folder("llama"), disk("4m") / "run"
    quick = ["--head", "linear", "--max-steps", 2, "--save-every", 100]
    assert eexit(*training(model, text, folder, *quick))[0] == 0
    before = {name: data for name, data in content(folder).items() if name != "run.json"}
    used = shutil.disk_usage(folder).used
    disk(f"{used // 1024 + 60}k")
    code, out, err = eexit(*training(model, text, folder, *quick, "--lr", 0.01))
    assert (code, out) == (1, "")
    assert "No space left on device" in one_line(err)
    assert not list(folder.rglob("*.tmp"))
    after = {name: data for name, data in content(folder).items() if name != "run.json"}
    assert {name: after[name] for name in before} == before
    config = BackboneConfig(model_name=str(model), quantization="none", device="cpu")
    assert len(load_engine(config, BundleConfig(bundle=str(folder))).heads) == 2


def test_a_file_that_may_not_grow_is_one_line(tiny_folder, text, tmp_path):
    process = started(
        *training(tiny_folder("llama"), text, tmp_path / "run", "--head", "linear", "--max-steps", 2),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert "large" in one_line(err)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("eexit.json"))


# Caches and bundles


def test_a_cache_by_another_tokenizer_or_other_weights_is_refused(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    cache = make_cache(tmp_path / "cache", backbone)
    before = content(cache.folder)

    class OtherTokens:
        vocabulary = backbone.tokenizer.get_vocab() | {"<more>": 257}

        def get_vocab(self):
            return self.vocabulary

        def __getattr__(self, name):
            return getattr(backbone.tokenizer, name)

    other = dataclasses.replace(backbone, tokenizer=OtherTokens())
    with pytest.raises(CacheError, match=r"tokenizer: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"):
        make_cache(cache.folder, other)
    theirs = dataclasses.replace(tiny_backbone("linear-rope"), name=backbone.name)
    theirs.norm.weight.data.add_(1)
    try:
        with pytest.raises(CacheError, match="weights: "):
            make_cache(cache.folder, theirs)
    finally:
        theirs.norm.weight.data.sub_(1)
    assert content(cache.folder) == before


def test_a_failed_save_leaves_the_old_bundle(tiny_folder, tiny_model, tmp_path, disk):
    model, folder = tiny_model("llama"), disk("400k") / "heads"
    save_bundle(folder, model.backbone, model.heads, {}, {})
    (folder / "calibration.json").write_text('{"accuracy_levels": [], "thresholds": {}}')
    before = content(folder)
    large = ExitHeads(model.backbone, "adapter", [1, 3, 5], 2000, None)
    with pytest.raises(OSError, match="No space left on device"):
        save_bundle(folder, model.backbone, large, {}, {})
    assert content(folder) == before


# Kills and interruptions


def test_a_checkpoint_that_a_kill_cut_off_is_passed_over(tiny_folder, text, tmp_path):
    run = tmp_path / "run"
    more = ["--rank", 4096, "--max-steps", 40, "--save-every", 1, "--eval-every", 40]
    arguments = training(tiny_folder("llama"), text, run, *more)
    checkpoints = run / "checkpoints"
    for _ in range(5):  # the kill may come a moment late
        process = started(*arguments, "--resume")
        wait_while_running(process, lambda: len(list(checkpoints.glob("step-*"))) >= 2)
        wait_while_running(process, lambda: list(checkpoints.glob(".step-*")))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        if list(checkpoints.glob(".step-*")):
            break
    newest = max(int(folder.name[5:]) for folder in checkpoints.glob("step-*"))
    assert newest < 40
    (left,) = checkpoints.glob(".step-*")
    code, out, err = eexit(*arguments, "--resume")
    assert code == 0, err
    assert f"{left} was never finished; it is passed over" in err
    assert f"resuming at step {newest}" in err
    assert "40 steps" in out


def test_a_damaged_checkpoint_is_named_with_the_way_back(tiny_folder, text, tmp_path):
    arguments = training(tiny_folder("llama"), text, tmp_path / "run", "--max-steps", 4, "--save-every", 2)
    assert eexit(*arguments)[0] == 0
    first, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    os.truncate(next(newest.glob("*.safetensors")), 100)
    code, out, err = eexit(*arguments, "--resume")
    assert (code, out) == (1, "")
    assert f"the checkpoint {newest} is damaged" in one_line(err)
    assert f"rm -r {newest}" in err
    shutil.rmtree(newest)
    code, _, err = eexit(*arguments, "--resume")
    assert code == 0
    assert f"resuming at step {int(first.name[5:])}" in err


def test_a_killed_rank_ends_all_of_them(tiny_folder, text, tmp_path):
    arguments = training(
        tiny_folder("llama"), text, tmp_path / "run", "--max-steps", 1_000_000, "--eval-every", 5, "--save-every", 5
    )
    process = started(
        *arguments,
        launcher=LAUNCHER,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_while_running(process, lambda: list(checkpoints.glob("*/complete.json")))
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert process.wait(timeout=90) != 0
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert list(checkpoints.glob("*/complete.json"))


def test_ctrl_c_stops_an_extraction_which_goes_on_later(tiny_folder, tmp_path):
    text, cut, whole = tmp_path / "text.jsonl", tmp_path / "cut", tmp_path / "whole"
    rows = [{"text": f"line {i}: {i * i} is the square of {i}."} for i in range(900)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = started(*extraction(tiny_folder("llama"), text, cut))
    wait_while_running(process, lambda: len(list(cut.glob("shards/*.json"))) >= 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    finished = {path.stem: file_sha256(path.with_suffix(".safetensors")) for path in cut.glob("shards/*.json")}
    assert len(finished) >= 3
    assert eexit(*extraction(tiny_folder("llama"), text, cut))[0] == 0
    assert eexit(*extraction(tiny_folder("llama"), text, whole))[0] == 0
    assert content(cut) == content(whole)
    assert {name: content(cut)[f"{name}.safetensors"] for name in finished} == finished


def test_ctrl_c_stops_an_answer_with_130(tiny_folder):
    model = ["--model-name", tiny_folder("llama"), "--quantization", "none", "--mode", "full"]
    process = started("infer", *model, "--prompt", "a", "--max-tokens", 500)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


# The table


def test_every_fault_of_the_table_names_tests_that_exist():
    rows = [line for line in DOCS.read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(rows) > 30
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, len(rows) + 1))
    tests = Path(__file__).parent
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            assert re.search(rf"^def {name}\(", (tests / file).read_text(), re.MULTILINE), (file, name)
