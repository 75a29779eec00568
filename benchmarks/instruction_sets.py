"""Plain decoding and `auto` on the passes of one instruction set, or on PyTorch's as a processor with AVX2 has them.

    EEXIT_ISA=avx2 python benchmarks/instruction_sets.py prompts.jsonl --limit 6
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/instruction_sets.py prompts.jsonl --limit 6 --pytorch

Tokens a second over whole answers, prefill included, greedy, both methods in turns; and whether `auto` gave the same tokens and
bits. With --pytorch bitsandbytes packs nothing for AVX512-BF16, as on processors that have none.
"""

import argparse
import time
from pathlib import Path

import bitsandbytes.nn.modules
import torch

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import SHIPPED_BUNDLE, BackboneConfig, BundleConfig, InferenceConfig
from early_exit_cli.data.rows import read_prompts
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.choose import make_drafter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--pytorch", action="store_true")
    options = parser.parse_args()
    if options.pytorch:
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    backbone = BackboneConfig(device="cpu", runner="fused" if options.pytorch else "native")
    engine = load_engine(backbone, BundleConfig(bundle=SHIPPED_BUNDLE))
    rows = read_prompts(options.prompts)
    prompts = [engine.backbone.encode_prompt(row["prompt"]) for row in rows[:: max(1, len(rows) // options.limit)]]
    methods = {name: make_drafter(engine, InferenceConfig(), name) for name in ("none", "auto")}
    seconds, tokens, same = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0), [0, 0]
    for prompt in prompts[: options.limit]:
        found = {}
        for name, (drafter, width) in methods.items():
            started = time.perf_counter()
            request = Request(prompt, options.max_tokens)
            found[name] = generate(engine, request, drafter, mode=name, width=width, keep_states=True)
            seconds[name] += time.perf_counter() - started
            tokens[name] += len(found[name].token_ids)
        plain, drafted = found.values()
        same[0] += plain.token_ids == drafted.token_ids
        same[1] += plain.token_ids == drafted.token_ids and torch.equal(plain.states, drafted.states)
    speeds = ", ".join(f"{name} {tokens[name] / seconds[name]:.1f} tokens/s" for name in methods)
    print(f"{engine.blocks.name}, {torch.get_num_threads()} threads: {speeds}")
    print(f"of {len(prompts[: options.limit])} prompts {same[0]} have the same tokens, {same[1]} the same bits")


if __name__ == "__main__":
    main()
