"""Whole commands, as a person runs them: what comes on the two streams, the exit code, what is left on the disk."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from commands import eexit, eexit_process, one_line, started, two_processes
from safetensors.torch import load_file, save_file


def test_training_leaves_a_complete_bundle(bundle, tiny_folder):
    config = json.loads((bundle / "config.json").read_text())
    assert config["num_heads"] == 2
    assert config["head_layer_indices"] == [2, 4]
    assert config["model_name"] == str(tiny_folder("llama"))
    run = json.loads((bundle / "run.json").read_text())
    assert run["settings"]["training.max_steps"] == {"value": 30, "origin": "--max-steps"}
    calibration = json.loads((bundle / "calibration.json").read_text())
    assert set(calibration["thresholds"]["0.95"]) == {"0", "1"}
    record = json.loads((bundle / "eexit.json").read_text())
    assert record["heads"] == {"kind": "adapter", "rank": 32, "draft_vocab": 128}
    assert record["calibration"]["heads"][0]["samples"] > 0


def test_infer_streams_the_answer_to_stdout_and_statistics_to_stderr(bundle):
    code, out, err = eexit_process(
        "infer", "--bundle", bundle, "--prompt", "hello there", "--max-tokens", 20, "--accuracy-level", 0.6
    )
    assert code == 0, err
    _, plain, _ = eexit("infer", "--bundle", bundle, "--prompt", "hello there", "--max-tokens", 20, "--mode", "full")
    assert out == plain
    assert out.strip()
    assert "tokens/s" in err
    assert "tokens/s" not in out


def test_infer_json_has_the_names_that_others_call(bundle):
    code, out, _ = eexit(
        "infer", "--bundle", bundle, "--mode", "adaptive", "--max-tokens", 12, "--json", stdin="from stdin\n"
    )
    assert code == 0
    record = json.loads(out)["adaptive_early_exit"]
    assert len(record["token_ids"]) == record["stats"]["total_tokens_generated"] <= 12
    assert {
        "mode", "total_tokens_generated", "total_time_seconds", "tokens_per_second", "draft_attempts", "tokens_drafted",
        "tokens_accepted", "acceptance_rate", "average_draft_length", "exit_distribution", "average_exit_layer",
    } <= set(record["stats"])  # fmt: skip
    assert set(record["stats"]["exit_distribution"]) == {"0", "1", "full"}


def test_compare_is_identical_bit_exact_and_gives_a_speedup(bundle):
    arguments = [
        "--bundle",
        bundle,
        "--mode",
        "compare",
        "--drafter",
        "exit",
        "--prompt",
        "abc",
        "--max-tokens",
        16,
        "--accuracy-level",
        0.6,
    ]
    code, out, _ = eexit("infer", *arguments, "--json")
    record = json.loads(out)
    assert code == 0
    assert record["identical"] is True
    assert record["bit_exact"] is True
    assert record["speedup"] > 0
    assert record["full"]["token_ids"] == record["adaptive_early_exit"]["token_ids"]
    code, out, err = eexit("infer", *arguments)
    assert code == 0
    assert out.strip() == record["full"]["text"].strip()
    assert "identical, bit-exact" in err


def test_many_prompts_give_a_record_each(bundle, tmp_path):
    path = tmp_path / "bench.jsonl"
    rows = [
        {"question_id": 7, "category": "qa", "turns": ["first", "second"]},
        {"prompt": "third"},
        {"prompt": "fourth"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = eexit(
        "infer",
        "--bundle",
        bundle,
        "--prompts",
        path,
        "--limit",
        2,
        "--mode",
        "compare",
        "--repeats",
        1,
        "--max-tokens",
        6,
        "--json",
    )
    records = json.loads(out)["records"]
    assert code == 0
    assert [record.get("question_id") for record in records] == [7, None]
    assert all(record["identical"] and record["bit_exact"] for record in records)


def test_the_trace_is_written(bundle, tmp_path):
    path = tmp_path / "trace.json"
    code, _, err = eexit("infer", "--bundle", bundle, "--prompt", "abc", "--max-tokens", 8, "--trace", path)
    assert code == 0, err
    records = json.loads(path.read_text())
    assert next(record["position"] for record in records) == 3
    assert all(len(record["heads"]) == 2 for record in records)


def test_evaluate_writes_the_record_of_formats(bundle, tmp_path):
    path = tmp_path / "evaluation.json"
    code, out, err = eexit_process(
        "evaluate", "--config_path", bundle / "config.json", "--num_samples", 5, "--output_path", path
    )
    assert code == 0, err
    assert "agreement" in out
    record = json.loads(path.read_text())
    assert set(record) == {
        "model_name", "num_samples", "total_tokens", "main_head", "auxiliary_heads", "agreement_by", "acceptance",
        "dataset", "bundle",
    }  # fmt: skip
    assert set(record["auxiliary_heads"][0]) == {
        "head_idx", "layer_idx", "correct", "total", "accuracy", "top5_accuracy", "accuracy_vs_lm_head",
        "top5_accuracy_vs_lm_head",
    }  # fmt: skip
    code, out, _ = eexit("evaluate", "--bundle", bundle, "--num-samples", 5, "--json")
    assert json.loads(out) == record


def test_show_config_names_every_origin_and_runs_nothing(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  lr: 0.5\n")
    code, out, _ = eexit(
        "train", "--config", path, "--max_steps", 3, "--set", "training.seed=9", "--show-config", "--json"
    )
    shown = json.loads(out)
    assert code == 0
    assert shown["training.lr"] == {"value": 0.5, "origin": str(path)}
    assert shown["training.max_steps"] == {"value": 3, "origin": "--max-steps"}
    assert shown["training.seed"] == {"value": 9, "origin": "--set training.seed"}
    assert shown["training.batch_size"]["origin"] == "default"
    assert not (tmp_path / "runs").exists()


def test_a_resumed_command_goes_on(bundle, tiny_folder, prompts, tmp_path):
    arguments = [
        "train", "--model-name", tiny_folder("llama"), "--quantization", "none", "--num-heads", 1, "--dataset-name", prompts,
        "--max-length", 64, "--max-steps", 4, "--save-every", 2, "--output-dir", tmp_path / "run", "--holdout", 0.3,
    ]  # fmt: skip
    assert eexit(*arguments)[0] == 0
    code, _, err = eexit(*arguments, "--resume")
    assert code == 0
    assert "resuming at step 4" in err


def broken(bundle, tmp_path, change):
    """A copy of the bundle with something broken."""
    folder = tmp_path / "broken"
    shutil.copytree(bundle, folder)
    change(folder)
    return folder


def other_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))


def other_fingerprint(folder):
    record = json.loads((folder / "eexit.json").read_text())
    record["fingerprint"]["weights"] = "0123456789abcdef"
    (folder / "eexit.json").write_text(json.dumps(record))


def nan_heads(folder):
    tensors = load_file(folder / "heads.safetensors")
    tensors["0.up.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "heads.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_heads, "hidden_size: heads 128, backbone 64"),
        (other_fingerprint, "weights: heads '0123456789abcdef'"),
        (nan_heads, "0.up.weight holds NaN"),
        (lambda f: (f / "heads.safetensors").write_bytes(b"x" * 50), "is damaged"),
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
        (lambda f: (f / "config.json").unlink(), "no file"),
        (lambda f: (f / "eexit.json").unlink(), "no file"),
        (lambda f: (f / "calibration.json").write_text("{}"), "no 'accuracy_levels'"),
        (lambda f: (f / "calibration.json").unlink(), "not calibrated"),
    ],
)
def test_a_broken_bundle_is_one_clear_line_and_code_1(bundle, tmp_path, change, words):
    folder = broken(bundle, tmp_path, change)
    code, out, err = eexit("infer", "--mode", "adaptive", "--bundle", folder, "--prompt", "abc", "--max-tokens", 4)
    assert code == 1
    assert out == ""
    assert words in err
    assert one_line(err)


def test_heads_of_another_size_are_refused_before_a_weight_is_read(bundle, tiny_folder, tmp_path):
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_folder("llama"), backbone, ignore=shutil.ignore_patterns("*.safetensors"))
    folder = broken(bundle, tmp_path, other_heads)
    code, _, err = eexit("infer", "--bundle", folder, "--model-name", backbone, "--quantization", "none", "abc")
    assert code == 1
    assert "hidden_size: heads 128, backbone 64" in one_line(err)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["infer", "--prompt", "  "], 2, "the prompt is empty"),
        (["infer", "--prompt", "a", "--prompt-file", "b"], 2, "several prompts"),
        (["infer", "--prompt", "a" * 600], 2, "exceed the context of 512"),
        (["infer", "--prompt", "a", "--accuracy-level", "0.77"], 2, "0.77 was not calibrated"),
        (["infer", "a", "--accuracy-level", "0.77", "--drafter", "lookup"], 2, "0.77 was not calibrated"),
        (["infer", "a", "--accuracy-level", "0.77", "--mode", "compare"], 2, "0.77 was not calibrated"),
        (["infer", "a", "--prompt", "b"], 2, "'a' is given beside --prompt 'b'"),
        (["infer", "a", "--system", "b", "--raw"], 2, "--system goes into the chat template"),
        (["infer", "a", "--stop", ""], 2, "inference.stop"),
        (["infer", "a", "--threads", "0"], 2, "--threads"),
        (["infer", "a", "--output", "nowhere/answers.jsonl"], 2, "cannot write to nowhere/answers.jsonl"),
        (["infer", "--prompt", "a", "--width", "40"], 2, "inference.width"),
        (
            ["infer", "--prompt", "a", "--set", "inference.max_token=3"],
            2,
            "did you mean 'inference.max_tokens'",
        ),
        (["infer", "--prompt", "a", "--max-tokens", "0"], 2, "--max-tokens"),
        (["infer", "--prompts", "none.jsonl"], 2, "none.jsonl"),
        (
            ["infer", "--prompt", "a", "--quantization", "4bit"],
            1,
            "quantization: heads 'none', backbone '4bit'",
        ),
        (["evaluate", "--dataset-name", "none.jsonl"], 2, "no file none.jsonl"),
    ],
)
def test_bad_input_is_one_clear_line_and_the_right_code(bundle, arguments, code, words):
    command, *rest = arguments
    found, out, err = eexit(command, "--bundle", bundle, *rest)
    assert found == code, err
    assert words in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["infer", "--bundle", "nowhere", "--prompt", "a"], 1, "no bundle at nowhere"),
        (["infer", "--bundle", "smollm2-135n", "a"], 1, "did you mean 'smollm2-135m'?"),
        (
            ["infer", "--mode", "full", "--model-name", "no/such-model", "--prompt", "a"],
            1,
            "cannot find the backbone",
        ),
        (["train", "--model-name", "x.gguf", "--dataset-name", "{prompts}"], 1, "no GGUF file"),
        (["train", "--dataset-name", "{prompts}", "--head-layer-indices", "3,2"], 2, "ascending"),
        (["train"], 2, "no text to work on"),
        (["train", "--config", "none.yaml"], 2, "no configuration file"),
        (["train", "--quantization", "3bit"], 2, "backbone.quantization = '3bit'"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_faults_without_a_bundle(prompts, arguments, code, words):
    found, out, err = eexit(*(argument.format(prompts=prompts) for argument in arguments))
    assert found == code, err
    assert words in err
    assert out == ""
    assert "Traceback" not in err


def test_an_unknown_family_is_refused_by_name_before_weights_load(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "codegen", "architectures": ["CodeGenForCausalLM"]})
    )
    code, _, err = eexit("infer", "--mode", "full", "--model-name", tmp_path, "--prompt", "a")
    assert code == 2
    assert "family 'codegen'" in err


def test_a_model_with_nan_weights_is_refused(tmp_path, tiny_folder):
    folder = tmp_path / "nan"
    shutil.copytree(tiny_folder("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = eexit("infer", "--mode", "full", "--model-name", folder, "--quantization", "none", "--prompt", "a")
    assert code == 1
    assert "NaN or infinite logits" in err


def test_head_layers_beyond_the_depth_are_refused_with_the_range(tiny_folder, prompts):
    code, _, err = eexit(
        "train",
        "--model-name",
        tiny_folder("llama"),
        "--quantization",
        "none",
        "--dataset-name",
        prompts,
        "--head-layer-indices",
        "1,5",
    )
    assert code == 2
    assert "blocks 0 to 4" in err


def test_help_needs_neither_torch_nor_transformers():
    program = (
        "import sys, resource; sys.argv = ['eexit', '--help']\n"
        "from early_exit_cli.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print('HEAVY', sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "HEAVY []" in result.stdout
    assert "infer" in result.stdout


def test_bench_measures_each_method_in_its_own_process(bundle, prompts, tmp_path):
    code, out, err = eexit_process(
        "bench", "--bundle", bundle, "--prompts", prompts, "--limit", 2, "--max-tokens", 12, "--repeats", 2,
        "--methods", "full,adaptive@0.60,transformers,transformers-lookup", "--output-dir", tmp_path / "bench", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert set(report) == {"methods", "categories", "repeats", "environment"}
    adaptive = report["methods"]["adaptive@0.60"]
    assert {"tokens_per_second", "speedup_over_full", "accept_length", "identical_prompts", "prompts", "ttft_s"} <= set(
        adaptive
    )
    assert adaptive["identical_prompts"] == adaptive["bit_exact_prompts"] == adaptive["prompts"] == 2
    assert report["methods"]["transformers"]["identical_prompts"] == 2  # float32: the library says the same
    assert report["methods"]["full"]["speedup_over_full"] == 1.0
    records = [json.loads(line) for line in (tmp_path / "bench" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 2 * 4
    assert all(r["identical"] and r["first_difference"] is None for r in records)
    assert (tmp_path / "bench" / "bench.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = eexit("bench", "--bundle", bundle, "--prompts", prompts, "--methods", "full,quick")
    assert code == 2
    assert "unknown method 'quick'" in err


def test_lookup_needs_no_heads_and_changes_no_word(tiny_folder):
    model = [
        "--model-name",
        tiny_folder("qwen3"),
        "--quantization",
        "none",
        "--prompt",
        "one two three one two three one",
    ]
    code, out, err = eexit("infer", *model, "--mode", "compare", "--drafter", "lookup", "--max-tokens", 40, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["identical"]
    assert set(result) >= {"full", "lookup", "speedup", "bit_exact"}
    assert result["lookup"]["stats"]["tokens_drafted"] > 0
    code, out, err = eexit("infer", *model, "--drafter", "lookup", "--max-tokens", 12)
    assert code == 0, err
    assert "lookup" in err
    assert "no heads" not in err  # nobody asked for any
    code, out, err = eexit("infer", *model, "--max-tokens", 24, "--json")
    assert code == 0, err
    assert err.count("no heads for") == 1
    assert json.loads(out)["auto"]["stats"]["tokens_drafted"] > 0


def test_bench_without_heads_runs_what_needs_none(tiny_folder, prompts, tmp_path):
    code, out, err = eexit(
        "bench", "--model-name", tiny_folder("qwen3"), "--quantization", "none", "--prompts", prompts, "--limit", 1,
        "--methods", "full,adaptive@0.9,eagle", "--max-tokens", 4, "--repeats", 1, "--output-dir", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert [*report["methods"]] == ["full"]
    assert report["environment"]["bundle"] is None
    assert re.search(r"adaptive@0.9 reads exit heads, and there are none for .*: eexit train", err)
    assert re.search(r"eagle reads an EAGLE head, and there are none", err)


def test_bench_costs_shows_and_keeps_the_cost_table(bundle, tmp_path):
    home = {"EEXIT_HOME": str(tmp_path)}
    code, out, err = eexit("bench", "--bundle", bundle, "--costs", **home)
    assert code == 0, err
    assert "one block" in out
    code, out, err = eexit("bench", "--bundle", bundle, "--costs", "--json", **home)
    assert code == 0, err
    costs = json.loads(out)["costs"]
    (kept,) = (tmp_path / "costs").iterdir()
    assert json.loads(kept.read_text())["costs"] == costs
    assert costs["per_block"]["1"] > 0


def test_ctrl_c_saves_a_checkpoint_and_ends_with_130(tiny_folder, prompts, tmp_path):
    arguments = [
        "train", "--model-name", tiny_folder("llama"), "--quantization", "none", "--num-heads", 1, "--dataset-name", prompts,
        "--max-length", 64, "--max-steps", 1_000_000, "--output-dir", tmp_path / "run", "--holdout", 0.3, "--eval-every", 5,
    ]  # fmt: skip
    process = started(*arguments)
    for line in process.stderr:
        if line.startswith("step 5:"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / "complete.json").exists()
    assert f"kept at step {int(checkpoint.name[5:])}: the same command with --resume goes on from there" in err


def test_a_closed_pipe_ends_quietly(bundle):
    process = started("infer", "--bundle", bundle, "--prompt", "a", "--max-tokens", 200)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=60) == 1


def test_two_processes_train_one_set_of_heads(tiny_folder, prompts, tmp_path):
    code, out, err = two_processes(
        "train", "--model-name", tiny_folder("llama"), "--quantization", "none", "--num-heads", 2, "--dataset-name", prompts,
        "--on-policy", "--answer-tokens", 8, "--max-length", 64, "--max-steps", 4, "--holdout", 0.3,
        "--output-dir", tmp_path / "run", "--json", EEXIT_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert code == 0, err[-3000:]
    report = json.loads(out[out.index("{") :])
    assert report["steps"] == 4
    (answers,) = (tmp_path / "home" / "answers").iterdir()
    assert len(answers.read_text().splitlines()) == 1 + 60  # what they were made from, and an answer a prompt
    marker = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/complete.json")).read_text())
    assert marker["identity"]["world_size"] == 2


def test_a_tracker_that_is_not_installed_is_named(prompts):
    code, _, err = eexit("train", "--dataset-name", prompts, "--report-to", "trackio")
    assert code == 2
    assert "pip install trackio" in err


def test_the_libraries_give_no_advice_where_no_backbone_is_loaded(monkeypatch):
    """bitsandbytes advises when it is imported, and accelerate imports it for training from a cache."""
    advice = logging.getLogger("bitsandbytes")
    monkeypatch.setattr(advice, "level", logging.NOTSET)
    eexit("--version")
    assert not advice.isEnabledFor(logging.WARNING)
    assert advice.isEnabledFor(logging.ERROR)
