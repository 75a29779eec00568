"""The cache's commands as a person runs them: the seed's four steps, kills, damage, several processes."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from commands import eexit, eexit_process, started, two_processes
from small_caches import content

SETTINGS = ["--quantization", "none", "--num_heads", 2, "--max_length", 64, "--holdout", 0.2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"line {i}: {i * i} is the square of {i}."}) + "\n" for i in range(900))
    )
    return path


def extract(folder, model, text, *more):
    return [
        "cache", "extract", "--model_name", model, *SETTINGS, "--dataset_name", text, "--cache_dir", folder,
        "--shard-tokens", 256, *more,
    ]  # fmt: skip


def test_the_seeds_commands_run_as_written(tiny_folder, text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), model)
    named = ["--model_name", model, *SETTINGS, "--dataset_name", text]
    code, out, err = eexit("train", "--mode", "online", *named, "--output_dir", tmp_path / "online", "--max_steps", 4)
    assert code == 0, err
    cache = tmp_path / "cache"
    code, out, err = eexit(
        "train", "--mode", "offline", *named, "--cache_dir", cache, "--cache_steps", 5, "--max_steps", 0,
        "--output_dir", tmp_path / "none",
    )  # fmt: skip
    assert code == 0, err
    assert not (tmp_path / "none").exists()  # extracted, and no heads saved
    assert json.loads((cache / "manifest.json").read_text())["complete"]
    model.rename(tmp_path / "gone")  # neither backbone nor tokenizer is needed any more
    code, out, err = eexit(
        "train",
        "--mode",
        "offline",
        "--cache_dir",
        cache,
        "--output_dir",
        tmp_path / "offline",
        "--max_steps",
        4,
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["exit_layers"] == [3, 5]
    (tmp_path / "gone").rename(model)
    code, out, err = eexit("calibrate", "--config_path", tmp_path / "offline" / "config.json", "--num_samples", 50)
    assert code == 0, err
    assert (tmp_path / "offline" / "calibration.json").exists()


def test_a_fitting_cache_is_found_and_another_is_refused(tiny_folder, text, tmp_path):
    home = {"EEXIT_HOME": str(tmp_path / "home")}
    named = ["--model_name", tiny_folder("llama"), *SETTINGS, "--dataset_name", text, "--cache_tokens", 2000]
    code, out, err = eexit("cache", "extract", *named, "--json", **home)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["tokens"] >= 1900
    train = ["train", "--mode", "offline", *named, "--output_dir", tmp_path / "run", "--max_steps", 2]
    code, out, err = eexit(*train, **home)
    assert code == 0, err
    assert f"using the cache in {facts['folder']}" in err
    code, out, err = eexit(*train, "--cache_dir", facts["folder"], "--answer_tokens", 7, **home)
    assert code == 1
    assert "data.answer_tokens: 128 there, 7 asked for" in err
    code, out, err = eexit("train", "--mode", "offline", "--cache_dir", facts["folder"], "--model_name", "other/model")
    assert code == 1
    assert "'other/model' asked for" in err


def test_a_killed_extraction_goes_on_to_the_same_bytes(tiny_folder, text, tmp_path):
    model = tiny_folder("llama")
    code, _, err = eexit(*extract(tmp_path / "whole", model, text))
    assert code == 0, err
    cut = tmp_path / "cut"
    process = started(*extract(cut, model, text), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while len(list(cut.glob("shards/*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    finished = {path.stem: path.stat().st_mtime_ns for path in cut.glob("shards/*.json")}
    assert 3 <= len(finished) < len(list((tmp_path / "whole" / "shards").iterdir()))
    times = {name: (cut / "shards" / f"{name}.safetensors").stat().st_mtime_ns for name in finished}
    code, _, err = eexit("train", "--mode", "offline", "--cache_dir", cut)
    assert code == 1
    assert "not complete" in err
    code, _, err = eexit(*extract(cut, model, text))
    assert code == 0, err
    assert {name: (cut / "shards" / f"{name}.safetensors").stat().st_mtime_ns for name in finished} == times
    assert {n: h for n, h in content(cut).items() if not n.endswith(".tmp")} == content(tmp_path / "whole")


def test_damage_is_named_repaired_and_gone(tiny_folder, text, tmp_path):
    cache = tmp_path / "cache"
    code, _, err = eexit(*extract(cache, tiny_folder("llama"), text))
    assert code == 0, err
    before = content(cache)
    shard = cache / "shards" / "train-00002.safetensors"
    os.truncate(shard, 1000)
    shutil.copy(cache / "shards" / "train-00003.safetensors", cache / "shards" / "mine.safetensors")
    code, out, err = eexit("cache", "verify", "--cache-dir", cache)
    assert code == 1
    assert "train-00002.safetensors: 1000 bytes, written were" in err
    assert "mine.safetensors is not part of this cache" in err
    code, out, err = eexit("train", "--mode", "offline", "--cache_dir", cache, "--output_dir", tmp_path / "run")
    assert code == 1
    assert "train-00002.safetensors is damaged" in err
    code, out, err = eexit_process("cache", "repair", "--cache-dir", cache)  # it takes no device
    assert code == 0, err
    assert "repaired shards/train-00002.safetensors" in err
    (cache / "shards" / "mine.safetensors").unlink()
    assert content(cache) == before
    code, out, err = eexit("cache", "verify", "--cache-dir", cache, "--json")
    assert code == 0
    assert json.loads(out) == {"damaged": [], "foreign": [], "shards": len(before) - 2}


def test_two_processes_write_one_cache_and_train_from_it(tiny_folder, text, tmp_path):
    model = tiny_folder("llama")
    code, _, err = eexit_process(*extract(tmp_path / "one", model, text), OMP_NUM_THREADS="1")
    assert code == 0, err
    code, _, err = two_processes(*extract(tmp_path / "two", model, text))
    assert code == 0, err[-3000:]
    assert err.count("missing") == 1  # one plan, shared: no shard is computed twice
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one == two
    code, out, err = two_processes(
        "train", "--mode", "offline", "--cache_dir", tmp_path / "two", "--output_dir", tmp_path / "run", "--max_steps", 6,
        "--json",
    )  # fmt: skip
    assert code == 0, err[-3000:]
    assert json.loads(out[out.index("{") :])["steps"] == 6
    code, _, err = eexit(
        "train", "--mode", "offline", "--cache_dir", tmp_path / "two", "--output_dir", tmp_path / "run", "--max_steps", 6,
        "--resume",
    )  # fmt: skip
    assert code == 1
    assert "world_size: 2 then, 1 now" in err


def test_one_failing_process_ends_all(tiny_folder, text, tmp_path):
    code, _, err = eexit(*extract(tmp_path / "cache", tiny_folder("llama"), text))
    assert code == 0, err
    shutil.rmtree(tmp_path / "cache" / "shards")
    began = time.monotonic()
    code, _, err = two_processes(
        "train", "--mode", "offline", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"
    )
    assert code != 0
    assert "is damaged" in err
    assert time.monotonic() - began < 90


def test_a_sweep_trains_a_set_of_heads_for_each_value(tiny_folder, text, tmp_path):
    code, out, err = eexit(
        "train", "--mode", "offline", "--model_name", tiny_folder("llama"), *SETTINGS, "--dataset_name", text,
        "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run", "--max_steps", 3,
        "--set", "heads.rank=[8, 16]", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads(out)["variants"]) == 2
    ranks = [
        json.loads((tmp_path / "run" / f"variant-{n}" / "eexit.json").read_text())["heads"]["rank"] for n in (0, 1)
    ]
    assert ranks == [8, 16]


def test_offline_training_says_what_it_lacks(tmp_path):
    code, _, err = eexit("train", "--mode", "offline")
    assert code == 2
    assert "neither a cache nor text" in err
    code, _, err = eexit("cache", "info", "--cache-dir", tmp_path)
    assert code == 1
    assert "no cache in" in err
    code, _, err = eexit("cache", "extract")
    assert code == 2
