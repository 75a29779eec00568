"""Side-by-side speed: raw records first, a report made from them second.

Every method has its own process and answers in turns, prompt by prompt; the order rotates from turn to turn. Times are
whole answers (prompt and new tokens); per prompt and method the median over repeats counts. A method's tokens/s is all
its tokens over all those medians; a speed-up is the ratio of two such figures of one run.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from early_exit_cli.config import BenchConfig
from early_exit_cli.decoding.text import accepted_length
from early_exit_cli.drafting.suffix_automaton import SuffixAutomaton
from early_exit_cli.errors import ConfigError, DataError
from early_exit_cli.evaluation.bench_methods import PEERS, Setup, Worker, check_methods
from early_exit_cli.files.atomic import write_lines
from early_exit_cli.files.environment import environment

MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
BASELINE = "full"
REPEAT = 16
"""Tokens of a verbatim repeat that counts as one."""
PLAIN_OF = {"transformers-lookup": "transformers", "transformers-early-exit": "transformers"}


def category_of(row: dict[str, Any]) -> str:
    """Spec-Bench's six categories: MT-bench's eight count as one."""
    name = str(row.get("category", "prompts"))
    return "mt_bench" if name in MT_BENCH else name


def select_prompts(rows: list[dict[str, Any]], config: BenchConfig) -> list[dict[str, Any]]:
    """At most `limit` prompts of each category, evenly spread over the file; one of each category after another, so that
    a machine that drifts, or a run cut short, treats all categories alike.

    Raises:
        DataError: a category that the file does not hold.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[category_of(row)].append(row)
    wanted = config.categories or list(groups)
    missing = [name for name in wanted if name not in groups]
    if missing:
        raise DataError(f"no prompts of category {', '.join(missing)}; there are {', '.join(groups)}")
    columns = []
    for name in wanted:
        group = groups[name]
        count = min(config.limit or len(group), len(group))
        columns.append([group[index * len(group) // count] for index in range(count)])
    return [row for rows in itertools.zip_longest(*columns) for row in rows if row is not None]


def run_bench(
    config: BenchConfig,
    setup: Setup,
    prompts: list[dict[str, Any]],
    encode: Callable[[str], list[int]],
    on_progress: Callable[[int, str], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Measure. Records are written to `output_dir/records.jsonl` as they come, and again at the end with their
    differences from `full`.

    Args:
        on_progress: called with the number of answers there are and what has made the last one; 0 while methods load.

    Returns:
        (a record per prompt, method and repeat; load and warm-up seconds per method).

    Raises:
        ConfigError: unknown methods, or the baseline missing among them.
    """
    check_methods(config.methods, setup.sampling)
    if BASELINE not in config.methods:
        raise ConfigError(f"methods must hold {BASELINE!r}, the baseline: {', '.join(config.methods)}")
    workers: dict[str, Worker] = {}
    costs: dict[str, dict[str, float]] = {}
    records = []
    config.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        for name in config.methods:  # one after another, so that loading does not disturb a warm-up
            if on_progress:
                on_progress(0, f"loading {name}")
            workers[name] = Worker(name, setup)
            costs[name] = workers[name].ready()
        if on_progress:
            on_progress(0, "")
        with open(config.output_dir / "records.jsonl", "w", encoding="utf-8") as file:
            for repeat in range(config.repeats):
                for number, prompt in enumerate(prompts):
                    ids = encode(prompt["prompt"])
                    turn = (number + repeat) % len(config.methods)
                    for name in config.methods[turn:] + config.methods[:turn]:
                        answer = workers[name].answer(ids, config.max_tokens)
                        record = {
                            "prompt": number,
                            "question_id": prompt.get("question_id"),
                            "category": category_of(prompt),
                            "prompt_tokens": len(ids),
                            "method": name,
                            "repeat": repeat,
                            **asdict(answer),
                        }
                        records.append(record)
                        file.write(json.dumps(record) + "\n")
                        file.flush()
                        if on_progress:
                            on_progress(len(records), name)
        encoded = [encode(prompt["prompt"]) for prompt in prompts]
        compare_with_baseline(records, lambda p, tokens: workers[BASELINE].top2_gap(encoded[p] + tokens))
        write_lines(config.output_dir / "records.jsonl", records)
    finally:
        for worker in workers.values():
            worker.dismiss()
        for worker in workers.values():
            worker.close()
    return records, costs


def compare_with_baseline(records: list[dict[str, Any]], top2_gap: Callable[[int, list[int]], float]) -> None:
    """Add to each record whether its tokens are those of `full`, and else where they first differ and how near the
    backbone's two best logits are there.

    Args:
        top2_gap: (prompt, answer so far) -> gap.
    """
    plain: dict[int, list[int]] = {}
    for record in records:
        if record["method"] == BASELINE:
            plain.setdefault(record["prompt"], record["token_ids"])
    gaps: dict[tuple[int, int], float] = {}
    for record in records:
        ours, theirs = plain[record["prompt"]], record["token_ids"]
        record["identical"] = ours == theirs
        record["first_difference"] = record["top2_gap"] = None
        if ours != theirs:
            at = accepted_length(ours, theirs)
            key = (record["prompt"], at)
            gaps[key] = gaps[key] if key in gaps else top2_gap(record["prompt"], ours[:at])
            record["first_difference"], record["top2_gap"] = at, gaps[key]


def summarize(
    records: list[dict[str, Any]],
    start_up: dict[str, dict[str, float]],
    config: BenchConfig,
    setup: Setup,
) -> dict[str, Any]:
    """The report: methods, categories, environment."""
    categories = list(dict.fromkeys(record["category"] for record in records))
    return {
        "methods": _figures(records, config),
        "categories": {
            name: _figures([record for record in records if record["category"] == name], config) for name in categories
        },
        "repeats": _repeats(records, config),
        "environment": {
            **environment(),
            "model": setup.backbone.model_name,
            "quantization": setup.backbone.quantization,
            "sampling": setup.sampling.model_dump(),
            "max_tokens": config.max_tokens,
            "repeats": config.repeats,
            "start_up": start_up,
        },
    }


def repeated_tokens(tokens: list[int]) -> int:
    """Tokens of an answer that stand in a verbatim repeat, REPEAT tokens or longer, of what it said before."""
    automaton = SuffixAutomaton()
    repeated = end = 0
    for place, token in enumerate(tokens, start=1):
        automaton.extend([token])
        if automaton.match_length >= REPEAT:
            repeated += place - max(end, place - automaton.match_length)
            end = place
    return repeated


def _repeats(records: list[dict[str, Any]], config: BenchConfig) -> dict[str, Any]:
    """How much of the baseline's answers repeats itself, which flatters lookup; and the speed-ups on the others."""
    plain = {record["prompt"]: record["token_ids"] for record in records if record["method"] == BASELINE}
    repeated = {prompt: repeated_tokens(tokens) for prompt, tokens in plain.items()}
    others = [record for record in records if not repeated[record["prompt"]]]
    return {
        "length": REPEAT,
        "share": sum(repeated.values()) / max(1, sum(map(len, plain.values()))),
        "prompts_with": sum(count > 0 for count in repeated.values()),
        "speedup_without": {name: found["speedup_over_full"] for name, found in _figures(others, config).items()}
        if others
        else {},
    }


def _figures(records: list[dict[str, Any]], config: BenchConfig) -> dict[str, dict[str, Any]]:
    runs: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        runs[record["method"]][record["prompt"]].append(record)
    rates = {name: _tokens_per_second(prompts) for name, prompts in runs.items()}
    figures = {}
    for name, prompts in runs.items():
        firsts = [run["first_token_seconds"] for rows in prompts.values() for run in rows if run["first_token_seconds"]]
        by_repeat = [
            _tokens_per_second({p: [row for row in rows if row["repeat"] == repeat] for p, rows in prompts.items()})
            for repeat in range(config.repeats)
        ]
        accepts = [run["accept_length"] for rows in prompts.values() for run in rows[:1] if run["accept_length"]]
        plain = runs.get(PLAIN_OF.get(name, name), {})
        figures[name] = {
            "tokens_per_second": rates[name],
            "quartiles": statistics.quantiles(by_repeat, n=4, method="inclusive")
            if len(by_repeat) > 1
            else by_repeat * 3,
            "speedup_over_full": rates[name] / rates[BASELINE],
            "accept_length": statistics.fmean(accepts) if accepts else None,
            "identical_prompts": _identical(prompts, runs[BASELINE]),
            "identical_to_own_plain": _identical(prompts, plain) if name in PLAIN_OF and plain else None,
            "bit_exact_prompts": _bit_exact(prompts, runs[BASELINE]) if name not in PEERS else None,
            "prompts": len(prompts),
            **_stage_rates(prompts),
            "ttft_s": statistics.median(firsts) if firsts else None,
            "partly_rejected_drafts": sum(rows[0]["partly_rejected"] or 0 for rows in prompts.values()),
            "drafted": sum(rows[0]["drafted"] or 0 for rows in prompts.values()),
            "accepted": sum(rows[0]["accepted"] or 0 for rows in prompts.values()),
        }
    return figures


def _stage_rates(prompts: dict[int, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Tokens of the prompts over the time to the first new ones, and tokens after those over the time after them."""
    rows = [row for repeats in prompts.values() for row in repeats]
    if not all(row["first_token_seconds"] for row in rows):
        return {"prefill_tokens_per_second": None, "decode_tokens_per_second": None}
    first = sum(row["first_token_seconds"] for row in rows)
    later = sum(len(row["token_ids"]) - row["first_tokens"] for row in rows)
    return {
        "prefill_tokens_per_second": sum(row["prompt_tokens"] for row in rows) / first,
        "decode_tokens_per_second": later / (sum(row["seconds"] for row in rows) - first) if later else None,
    }


def _tokens_per_second(prompts: dict[int, list[dict[str, Any]]]) -> float:
    tokens = sum(len(rows[0]["token_ids"]) for rows in prompts.values())
    return tokens / sum(statistics.median(row["seconds"] for row in rows) for rows in prompts.values())


def _identical(ours: dict[int, list[dict[str, Any]]], theirs: dict[int, list[dict[str, Any]]]) -> int:
    """Prompts on which every repeat gave the tokens of the other method's first."""
    return sum(all(row["token_ids"] == theirs[p][0]["token_ids"] for row in rows) for p, rows in ours.items())


def _bit_exact(ours: dict[int, list[dict[str, Any]]], theirs: dict[int, list[dict[str, Any]]]) -> int:
    """Prompts on which every repeat's final states have the bits of the other method's first."""
    return sum(all(row["states_hash"] == theirs[p][0]["states_hash"] for row in rows) for p, rows in ours.items())
