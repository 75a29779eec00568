"""What an NVIDIA GPU does with this program, in at most eight minutes: products and passes by width, and answers by method.

    python benchmarks/gpu.py [--body 8b|smollm2] [--prompts spec_bench.jsonl --limit 10] [--output gpu.json]

Every figure is compared within the run: products with bitsandbytes' and with dense bfloat16, answers with `full`, token for token
and bit for bit, and with `transformers.generate`. First answers of a drafter (its first on this machine, whatever must be measured
included) stand apart from steady ones. The 8B body is SmolLM2 carried into the shape of Llama-3-8B (`large_body.py`): a benchmark
of cost, not of quality. Runs on a CPU too (`--body smollm2`), without products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from large_body import large_backbone, large_eagle, large_exits
from on_policy_answers import answers_per_second
from torch import Tensor

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import BackboneConfig, BenchConfig, BundleConfig, InferenceConfig
from early_exit_cli.data.rows import read_prompts
from early_exit_cli.decoding.answer import Generation, generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.choose import make_drafter
from early_exit_cli.drafting.costs import cost_table
from early_exit_cli.engine import Engine
from early_exit_cli.evaluation.bench import select_prompts
from early_exit_cli.files.environment import environment
from early_exit_cli.numerics import synchronize
from early_exit_cli.runtime.select import make_blocks

PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Explain step by step how to solve 2x + 6 = 14, then check the answer.",
    "Translate to French, then repeat the English: The weather is nice today and we will go to the park.",
    "Summarise in three points why people sleep.",
    "Write a Python function that returns the Fibonacci numbers below n.",
)
METHODS = {"full": "none", "lookup": "lookup", "eagle": "eagle", "adaptive": "exit", "auto": "auto"}
WIDTHS = (1, 2, 4, 8, 16)
SHAPES = {"q, k, v": (6144, 4096), "output": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}


def microseconds(steps: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Of one of the steps, run one after another as a replayed CUDA graph: the median of some repeats."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            for step in steps:
                step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for step in steps:
            step()
    times = []
    for turn in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end) * 1000 / len(steps))
    return statistics.median(times)


def products(kernels: Any) -> list[dict[str, Any]]:
    """The four products of a layer of Llama-3-8B by width, over rotating copies that no cache holds."""
    rows = []
    for name, (outputs, inputs) in SHAPES.items():
        rows += product(kernels, name, outputs, inputs)
        torch.cuda.empty_cache()
    return rows


def product(kernels: Any, name: str, outputs: int, inputs: int) -> list[dict[str, Any]]:
    """One of them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from early_exit_cli.runtime.cuda_kernels import NF4Weight

    copies = max(2, int(2e8 / (outputs * inputs / 2)))
    weights, dense, ours = [], [], []
    for _ in range(copies):
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        weights.append((packed, state))
        dense.append(dequantize_4bit(packed, state))
        ours.append(NF4Weight(packed.view(outputs, -1), state.absmax.view(outputs, -1), None, outputs, inputs))
    whole = torch.randn(LARGEST, inputs, device="cuda", generator=seeded()).to(torch.bfloat16)
    exact = whole.double() @ ours[0].dense().double().T
    expected = torch.empty(LARGEST, outputs, device="cuda", dtype=torch.bfloat16)
    kernels.product(ours[0], whole, expected)()
    rows = []
    for width in WIDTHS:
        x = whole[:width].contiguous()
        out = torch.empty(width, outputs, device="cuda", dtype=torch.bfloat16)
        kernels.product(ours[0], x, out)()
        steps = [timed_product(kernels, name, weight, x) for weight in ours]
        rows.append(
            {
                "product": name,
                "width": width,
                "ours": microseconds(steps),
                "bitsandbytes": microseconds([partial(bnb, x, *weight) for weight in weights]),
                "dense": microseconds([partial(F.linear, x, weight) for weight in dense]),
                "same_bits": torch.equal(out, expected[:width]),
                "error": relative_error(out, exact[:width]),
            }
        )
    return rows


LARGEST = 16


def seeded() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def bnb(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def timed_product(kernels: Any, name: str, weight: Any, x: Tensor) -> Callable[[], Any]:
    """A product as a pass makes it: norm folded in, gated, or added to the residual."""
    from early_exit_cli.runtime.cuda_kernels import Normed

    width = x.shape[0]

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ones(shape, device="cuda", dtype=dtype)

    if name in ("output", "down"):
        parts = new(width, weight.outputs // 16, dtype=torch.float32)
        scaled = Normed(new(width, weight.outputs), parts, 1e-5)
        residual, out = new(width, weight.outputs), new(width, weight.outputs)
        return kernels.added(weight, x, residual, out, new(weight.outputs), scaled)
    given = Normed(x, new(width, weight.inputs // 16, dtype=torch.float32), 1e-5)
    if name == "gate, up":
        return kernels.gated(weight, given, new(width, weight.outputs // 2))
    return kernels.product(weight, given, new(width, weight.outputs))


def passes(engine: Engine, context: int = 256) -> list[dict[str, Any]]:
    """Whole passes by width over `context` keys: milliseconds of the blocks, and of norm, LM head and choice."""
    blocks, rows = engine.blocks, []
    cache = blocks.new_cache(context + LARGEST)
    with torch.inference_mode():
        for width in blocks.widths:
            tokens, depth = [1] * width, [blocks.num_blocks]
            hidden = blocks.run_tokens(tokens, cache, context, depth)[-1]
            found = {"width": width}
            calls = {
                "blocks": lambda tokens=tokens, depth=depth: blocks.run_tokens(tokens, cache, context, depth),
                "finish": lambda hidden=hidden: blocks.finish(hidden),
            }
            for name, call in calls.items():
                times = []
                for _ in range(12):
                    synchronize(engine.backbone.device)
                    started = time.perf_counter()
                    call()
                    synchronize(engine.backbone.device)
                    times.append((time.perf_counter() - started) * 1000)
                found[name] = statistics.median(times)
            rows.append(found)
    return rows


def answers(
    engine: Engine, prompts: list[list[int]], methods: dict[str, str], tokens: int, repeats: int
) -> dict[str, Any]:
    """Every method over all prompts: the first round apart, then `repeats` rounds in turns, compared with `full`."""
    settings = InferenceConfig()
    rounds: dict[str, list[list[Generation]]] = {name: [] for name in methods}
    known: list[Generation] = []
    same: dict[str, list[tuple[bool, bool]]] = {name: [] for name in methods}
    for _ in range(1 + repeats):
        for name, kind in methods.items():
            found = []
            for place, ids in enumerate(prompts):
                drafter, width = make_drafter(engine, settings, kind)
                answer = generate(engine, Request(ids, tokens), drafter, mode=name, width=width, keep_states=True)
                if len(known) <= place:
                    known.append(answer)
                words = answer.token_ids == known[place].token_ids
                same[name].append((words, words and torch.equal(answer.states, known[place].states)))
                found.append(answer)
            rounds[name].append(found)
    summary = {}
    for name, (first, *steady) in rounds.items():
        summary[name] = {
            "first_tokens_per_second": rate(first),
            "first_answer_tokens_per_second": first[0].stats.tokens_per_second,
            "tokens_per_second": statistics.median(rate(found) for found in steady or [first]),
            "accept_length": statistics.mean(answer.stats.accept_length for answer in first),
            "time_to_first_token_ms": 1000 * statistics.median(a.stats.time_to_first_token_seconds for a in first),
            "same_words": sum(words for words, _ in same[name]),
            "same_bits": sum(bits for _, bits in same[name]),
            "answers": len(same[name]),
        }
        ratios = [
            answer.stats.tokens_per_second / plain.stats.tokens_per_second
            for answer, plain in zip((steady or [first])[-1], rounds["full"][-1], strict=True)
        ]
        summary[name]["over_full_by_answer"] = [round(ratio, 3) for ratio in ratios]
        summary[name]["over_full_mean"] = statistics.mean(ratios)
        summary[name]["over_full_worst"] = min(ratios)
    return summary


def rate(found: list[Generation]) -> float:
    """Tokens per second of whole answers."""
    return sum(a.stats.total_tokens_generated for a in found) / sum(a.stats.total_time_seconds for a in found)


def first_tokens(engine: Engine, lengths: list[int]) -> list[dict[str, float]]:
    """Milliseconds to the first token behind a prompt of some lengths: ours, and `transformers.generate`'s; medians of five."""
    text = engine.backbone.encode_prompt(" ".join(PROMPTS))
    rows = []
    for length in lengths:
        ids = (text * length)[:length]
        inputs = torch.tensor([ids], device=engine.backbone.device)
        drafter, width = make_drafter(engine, InferenceConfig(), "none")
        calls = {
            "ours": partial(generate, engine, Request(ids, 1), drafter, mode="full", width=width),
            "transformers": partial(
                *(engine.backbone.model.generate, inputs),
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=1,
                do_sample=False,
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(6):
            for name, call in calls.items():
                synchronize(engine.backbone.device)
                started = time.perf_counter()
                with torch.inference_mode():
                    call()
                synchronize(engine.backbone.device)
                if turn:
                    times[name].append((time.perf_counter() - started) * 1000)
        rows.append({"prompt_tokens": length, **{name: statistics.median(found) for name, found in times.items()}})
    return rows


def by_library(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """`transformers.generate` on the same weights."""
    library, counts, seconds, firsts = engine.backbone.model, 0, 0.0, []
    for ids in [prompts[0], *prompts]:
        inputs = torch.tensor([ids], device=engine.backbone.device)
        with torch.inference_mode():
            for most in (1, tokens):
                synchronize(engine.backbone.device)
                started = time.perf_counter()
                found = library.generate(
                    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=most, do_sample=False
                )
                synchronize(engine.backbone.device)
                spent = time.perf_counter() - started
                if most == 1:
                    firsts.append(spent * 1000)
        counts, seconds = counts + found.shape[1] - len(ids), seconds + spent
    return {"tokens_per_second": counts / seconds, "time_to_first_token_ms": statistics.median(firsts[1:])}


def kernel_tests() -> str:
    """What the tests on a card say of the kernels, in a process of their own: their last line."""
    tests = ("tests/runtime/test_cuda_kernels.py", "tests/runtime/test_cuda_passes.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["they did not run"])[-1]


def load(body: str, device: str) -> tuple[Engine, dict[str, float]]:
    """SmolLM2 with the shipped heads, or carried into a large body with them; and the seconds that it took."""
    started = time.perf_counter()
    engine = load_engine(BackboneConfig(device=device), BundleConfig())
    seconds = {"smollm2": time.perf_counter() - started}
    if body == "8b":
        small, started = engine.backbone, time.perf_counter()
        large = large_backbone(small)
        seconds["carried"] = time.perf_counter() - started
        started = time.perf_counter()
        blocks = make_blocks(large)
        seconds["runner"] = time.perf_counter() - started
        heads = large_exits(engine.heads, small, large)
        eagle = large_eagle(engine.eagle, small, large)
        engine = Engine(large, blocks, heads, engine.thresholds, eagle, record=engine.record)
    return engine, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", choices=("8b", "smollm2"), default="8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=Path, help="JSONL with `prompt`, or Spec-Bench's `turns`, a line")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each category")
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="of these, with commas between; `full` must be first"
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--library-prompts", type=int, default=3)
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[100, 500, 1500], help="for the first token")
    parser.add_argument("--answers", type=int, default=0, help="texts answered together, as for training; 1024, say")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave the kernels' own tests out")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    model, seconds = load(arguments.body, arguments.device)
    on_gpu = model.backbone.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    record: dict[str, Any] = {
        "device": device,
        "environment": environment(model.backbone.device_name),
        "body": arguments.body,
        "runner": model.blocks.name,
        "without_kernels": model.blocks.without_kernels,
        "seconds_to_load": seconds,
        "widths": list(model.blocks.widths),
        "is_invariant": model.blocks.is_invariant,
    }
    print(f"{device}, {arguments.body}, {model.blocks.name}; loaded in {seconds}", flush=True)
    texts = list(PROMPTS)
    if arguments.prompts:
        rows = select_prompts(read_prompts(arguments.prompts), BenchConfig(limit=arguments.limit))
        texts = [row["prompt"] for row in rows]
    prompts = [model.backbone.encode_prompt(text) for text in texts]
    if on_gpu and arguments.tests:
        record["kernel_tests"] = kernel_tests()
        print(f"kernel tests: {record['kernel_tests']}", flush=True)
    if on_gpu and hasattr(model.blocks, "kernels"):
        record["products"] = products(model.blocks.kernels)
        for row in record["products"]:
            print(
                "  ".join(
                    f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()
                )
            )
    record["passes"] = passes(model)
    for row in record["passes"]:
        print(f"pass of {row['width']:2}: blocks {row['blocks']:.3f} ms, finish {row['finish']:.3f} ms", flush=True)
    begun = time.perf_counter()
    costs = cost_table(model, refresh=True)
    record["costs"] = {
        "seconds": time.perf_counter() - begun,
        "read": costs.eagle_read,
        "step": costs.eagle_step,
    }
    print(f"eagle: read {costs.eagle_read:.3f} ms, step {costs.eagle_step:.3f} ms", flush=True)
    record["first_tokens"] = first_tokens(model, arguments.prompt_lengths)
    for row in record["first_tokens"]:
        print("first token", {key: round(value, 1) for key, value in row.items()}, flush=True)
    methods = {name: METHODS[name] for name in arguments.methods.split(",")}
    record["answers"] = answers(model, prompts, methods, arguments.tokens, arguments.repeats)
    for name, row in record["answers"].items():
        print(name, {key: round(value, 2) for key, value in row.items() if not isinstance(value, list)}, flush=True)
    if arguments.library_prompts:
        record["transformers"] = by_library(model, prompts[: arguments.library_prompts], arguments.tokens)
        print("transformers", record["transformers"])
    if arguments.answers:
        many = (prompts * arguments.answers)[: arguments.answers]
        record["training_answers_per_second"] = answers_per_second(model.backbone, many, arguments.tokens)
        print(f"training answers: {record['training_answers_per_second']:.0f} new tokens/s", flush=True)
    if on_gpu:
        record["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    record["seconds"] = time.perf_counter() - started
    arguments.output.write_text(json.dumps(record, indent=1))
    print(f"{record['seconds']:.0f} s in all; written to {arguments.output}")


if __name__ == "__main__":
    main()
