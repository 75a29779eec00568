"""`eexit env`: all that a report needs, in a blink, whatever state the machine is in."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from commands import eexit

from early_exit_cli.cli import env

GPU = "NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, 570.86.15"


def facts():
    code, out, err = eexit("env", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_text_has_a_fact_a_line_and_nothing_else_is_written():
    code, out, err = eexit("env")
    assert (code, err) == (0, "")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert f"torch {version('torch')}" in lines["versions"]
    assert {"system", "processor name", "gpus", "compiler", "passes runner", "cache folder", "cache size"} <= set(lines)
    assert "unknown" not in out


def test_the_home_folder_is_not_written_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "kept"))
    found = facts()
    assert found["cache"]["folder"] == "~/kept"
    assert found["cache"]["from"] == "EEXIT_HOME"
    assert found["variables"]["EEXIT_HOME"] == "~/kept"
    assert str(tmp_path) not in json.dumps(found)
    assert not (tmp_path / "kept").exists()


def test_the_cache_has_its_size_by_kind(monkeypatch, tmp_path):
    (tmp_path / "states" / "a").mkdir(parents=True)
    (tmp_path / "states" / "a" / "shard").write_bytes(bytes(2_500_000))
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    assert facts()["cache"]["kinds"] == {"states": 2_500_000}
    assert "cache kinds: states 2.5 MB" in eexit("env")[1]


def test_what_cannot_be_told_is_unknown_with_its_reason(monkeypatch):
    def broken(*_):
        raise OSError("no such program")

    monkeypatch.setattr(env, "output_of", broken)
    monkeypatch.setattr(env.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(env, "processor_name", broken)
    found = facts()
    assert found["gpus"] == found["compiler"] == found["processor"] == "unknown: no such program"
    assert "passes: unknown: no such program" in eexit("env")[1]
    assert found["versions"]["torch"]


@pytest.mark.parametrize(
    ("built_for", "reason"),
    [(None, "this torch is built without CUDA"), ("13.0", "torch, built for CUDA 13.0, sees none")],
)
def test_a_gpu_that_is_not_used_says_why(monkeypatch, built_for, reason):
    import torch

    monkeypatch.setattr(env.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(env, "output_of", lambda *words: GPU if "nvidia-smi" in words else "cc 12.2\n(more)")
    monkeypatch.setattr(env, "torch_built_for", lambda: built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = facts()
    assert found["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "memory": "81559 MiB", "driver": "570.86.15"}
    ]
    assert (found["passes"]["device"], found["passes"]["why_no_gpu"]) == ("cpu", reason)
    assert found["compiler"].startswith("cc 12.2 (")


def test_a_gpu_too_old_for_our_kernels_says_so(monkeypatch):
    import torch

    monkeypatch.setattr(env, "gpus", lambda: [{"name": "an old card"}])
    monkeypatch.setattr(env, "torch_built_for", lambda: "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = env.passes()
    assert (found["device"], found["runner"]) == ("cuda", "fused (PyTorch)")
    assert found["why_not_native"] == "compute capability 7.5 is older than 8.0"


def test_without_a_compiler_passes_are_pytorchs(monkeypatch, tmp_path):
    from early_exit_cli.files import instruction_sets
    from early_exit_cli.runtime import native_code

    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    monkeypatch.setattr(instruction_sets, "lacks", lambda: None)
    monkeypatch.setattr(instruction_sets, "find_compiler", lambda: None)
    assert env.runner_of_cpu() == {"runner": "fused (PyTorch)", "why_not_native": "no C compiler was found"}
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / f"{native_code.code_key()}.so").touch()
    found = env.runner_of_cpu()
    assert (found["runner"], found["compiled_already"]) == ("native (compiled code)", True)


def test_elsewhere_than_on_linux_a_library_knows_the_processor(monkeypatch):
    import cpuinfo

    monkeypatch.setattr(env, "processor_flags", lambda: None)
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"brand_raw": "Apple M3", "flags": ["asimd", "fp"]})
    found = env.told_processor()
    assert (found["name"], found["instruction_sets"]) == ("Apple M3", ["asimd"])


def test_the_name_of_the_processor_is_that_of_the_library():
    """What we read ourselves, to start a second sooner, is what the library reads."""
    import cpuinfo.cpuinfo as library

    from early_exit_cli.files.environment import processor_flags, processor_name

    known = library._get_cpu_info_from_proc_cpuinfo()
    if not known.get("brand_raw"):
        pytest.skip("no /proc/cpuinfo of an x86 processor here")
    assert processor_name().startswith(known["brand_raw"])
    assert processor_flags() == set(known["flags"])


def test_it_starts_without_torch():
    """On a machine without a GPU; where there is one, torch is asked about it."""
    script = """
import sys
from early_exit_cli.cli import app, env
env.gpus = list
sys.argv = ["eexit", "env"]
try:
    app.main()
finally:
    print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "False", result.stderr
    assert "passes device: cpu" in result.stdout
