"""Data flows one way: a module imports only what stands before it. Changing the flow means changing this table."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "early_exit_cli"
OPEN_TO_ALL = {"errors", "config", ""}  # "" is the package itself, for its version
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "resolve": set(),
    "artifacts": set(),
    "kept_files": {"artifacts"},
    "palette": set(),
    "console": {"palette"},
    "html_page": {"palette"},
    "plots": {"artifacts"},
    "families": set(),
    "gguf": {"artifacts", "families"},
    "quantization": set(),
    "weight_cache": {"artifacts"},
    "attention": set(),
    "readout": {"attention"},
    "backbone": {"artifacts", "families", "readout"},
    "loading": {"backbone", "families", "gguf", "quantization", "weight_cache"},
    "data": {"backbone", "batched", "artifacts", "formats"},
    "batched": {"backbone", "blocks", "fused_blocks", "native_blocks", "padded_rows", "recorded_answers"},
    "lm_head": set(),
    "experts": set(),
    "blocks": {"backbone", "experts", "lm_head"},
    "cuda_graphs": {"blocks"},
    "fused_blocks": {"backbone", "blocks", "cuda_graphs"},
    "fused_kernels": {"blocks"},
    "padded_rows": {"fused_blocks"},
    "recorded_answers": {"cuda_graphs", "fused_blocks", "padded_rows"},
    "native_code": {"artifacts"},
    "native_blocks": {"attention", "backbone", "blocks", "fused_blocks", "lm_head", "native_code"},
    "cuda_code": {"artifacts"},
    "cuda_kernels": {"blocks", "cuda_code"},
    "reference_kernels": {"cuda_kernels"},
    "device_pass": {"cuda_kernels"},
    "cuda_blocks": {
        *("backbone", "blocks", "cuda_code", "cuda_kernels", "device_pass", "fused_blocks", "reference_kernels"),
    },
    "runners": {
        *(
            "backbone",
            "blocks",
            "cuda_blocks",
            "cuda_graphs",
            "fused_blocks",
            "fused_kernels",
            "native_blocks",
            "lm_head",
        ),
        *("artifacts", "formats"),
    },
    "heads": {"artifacts", "attention", "data", "readout", "states"},
    "gating": set(),
    "sampling": set(),
    "exit_reader": {"attention", "gating", "heads", "native_blocks", "native_code", "readout", "sampling"},
    "formats": {"artifacts"},
    "bundle": {"artifacts", "formats"},
    "hub_client": {"artifacts"},
    "dssd": {"artifacts", "bundle", "formats", "heads"},
    "pull": {"artifacts", "bundle", "dssd", "hub_client"},
    "states": {"backbone", "data", "native_blocks", "readout"},
    "eagle": {"artifacts", "attention", "heads", "readout", "states"},
    "speculators_export": {"artifacts", "backbone", "heads", "eagle"},
    "engine": {
        *("backbone", "blocks", "runners", "data", "heads", "eagle", "gating", "artifacts", "bundle", "pull"),
        *("cuda_eagle", "exit_reader", "formats", "loading", "readout", "states"),
    },
    "readings": {"data", "engine", "gating", "states"},
    "cache_shapes": set(),
    "cache": {"artifacts", "cache_shapes", "formats", "readout"},
    "extraction": {"backbone", "cache", "cache_shapes", "data", "readout", "states", "artifacts", "formats"},
    "cached_states": {"cache", "cache_shapes", "data", "states", "artifacts"},
    "distillation": {"engine", "readout", "states"},
    "pupils": {"bundle", "distillation", "engine", "heads", "eagle", "states"},
    "training": {"distillation", "engine", "pupils", "states", "artifacts", "formats"},
    "reliability": set(),
    "thresholds": {"reliability"},
    "calibration": {"engine", "data", "gating", "readings", "reliability", "thresholds", "artifacts"},
    "drafters": {"blocks", "engine", "exit_reader", "gating", "heads", "sampling"},
    "corpus": set(),
    "lookup": {"blocks", "corpus", "engine", "drafters", "sampling"},
    "eagle_runner": {"attention", "blocks", "gating", "lm_head", "eagle", "sampling"},
    "cuda_eagle": {"attention", "blocks", "cuda_code", "cuda_kernels", "eagle", "eagle_runner"},
    "native_eagle": {"cuda_eagle", "eagle", "eagle_runner", "native_blocks", "native_code", "sampling"},
    "eagle_drafter": {"blocks", "engine", "drafters", "eagle", "native_eagle", "sampling"},
    "policy": {
        "artifacts",
        "bundle",
        "data",
        "formats",
        "engine",
        "gating",
        "eagle_drafter",
        "lookup",
        "readout",
        "states",
        "thresholds",
    },
    "head_views": {"blocks", "drafters", "engine", "exit_reader", "gating", "heads"},
    "decoding": {"blocks", "engine", "drafters", "head_views", "sampling"},
    "together": {"blocks", "engine", "drafters", "decoding", "sampling"},
    "costs": {
        *("artifacts", "blocks", "runners", "engine", "drafters", "lookup", "eagle", "eagle_drafter", "policy"),
        *("corpus", "exit_reader", "formats", "gating", "native_eagle"),
    },
    "methods": {"blocks", "costs", "decoding", "drafters", "engine"},
    "library": {
        "artifacts",
        "decoding",
        "drafters",
        "engine",
        "loading",
        "methods",
        "resolve",
        "sampling",
        "together",
    },
    "bench_methods": {"gguf", "loading", "engine", "methods", "decoding", "sampling"},
    "bench": {"artifacts", "bench_methods", "decoding", "lookup"},
    "acceptance": {"readings", "thresholds"},
    "evaluation": {"acceptance", "engine", "readings", "decoding", "drafters", "data", "sampling", "artifacts"},
    "comprehensive": {"costs", "decoding", "drafters", "engine", "evaluation", "sampling"},
    "model_card": {"bundle", "formats"},
    "hub": {"artifacts", "bundle", "dssd", "formats", "engine", "heads", "hub_client", "model_card"},
}
NEVER_TORCH = (
    *(
        "errors",
        "config",
        "resolve",
        "artifacts",
        "kept_files",
        "palette",
        "console",
        "html_page",
        "plots",
        "families",
        "native_code",
    ),
    *("bundle", "formats", "hub_client", "model_card"),
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module] if node.module != "early_exit_cli" else [f"early_exit_cli.{a.name}" for a in node.names]
            )
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_the_table_names_every_module():
    assert {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_imports_only_what_stands_before_it(module):
    ours = {name.split(".")[1] for name in imports(PACKAGE / f"{module}.py") if name.startswith("early_exit_cli.")}
    ours.discard("__version__")
    assert ours <= MAY_IMPORT[module] | OPEN_TO_ALL


@pytest.mark.parametrize("module", NEVER_TORCH)
def test_light_modules_never_import_torch(module):
    roots = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")}
    assert not roots & {"torch", "transformers", "accelerate", "datasets", "bitsandbytes"}


def test_only_the_console_uses_rich():
    for path in PACKAGE.rglob("*.py"):
        if path.stem != "console":
            assert "rich" not in {name.split(".")[0] for name in imports(path)}, path
