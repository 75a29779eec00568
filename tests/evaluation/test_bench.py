"""The report from raw records: worked by hand, so that no speed can be claimed that the records do not hold."""

import os
import signal
import subprocess
import sys

import pytest

from early_exit_cli.config import BackboneConfig, BenchConfig, BundleConfig, SamplingConfig
from early_exit_cli.errors import ConfigError, DataError
from early_exit_cli.evaluation.bench import category_of, compare_with_baseline, select_prompts, summarize
from early_exit_cli.evaluation.bench_methods import Setup, check_methods, deaf_to_interrupts
from early_exit_cli.report import plots

SETUP = Setup(BackboneConfig(), BundleConfig(), SamplingConfig(), 0.9, "auto")


def record(method, prompt, repeat, tokens, seconds, category="qa", states="a", **more):
    return {
        "prompt": prompt, "category": category, "method": method, "repeat": repeat, "token_ids": tokens, "seconds": seconds,
        "first_token_seconds": 0.1, "first_tokens": 1, "prompt_tokens": 40, "accept_length": None, "states_hash": states, "drafted": None, "accepted": None,
        "partly_rejected": None, **more,
    }  # fmt: skip


def test_figures_are_ratios_of_medians():
    records = [
        *(record("full", 0, r, [1] * 10, s) for r, s in enumerate([1.0, 2.0, 9.0])),
        *(record("full", 1, r, [2] * 10, s, "math") for r, s in enumerate([2.0, 2.0, 2.0])),
        *(record("adaptive", 0, r, [1] * 10, s, accept_length=2.0) for r, s in enumerate([1.0, 1.0, 4.0])),
        *(record("adaptive", 1, r, [2] * 10, s, "math", accept_length=1.0) for r, s in enumerate([1.0, 1.0, 1.0])),
    ]
    report = summarize(records, {}, BenchConfig(repeats=3), SETUP)
    full, adaptive = report["methods"]["full"], report["methods"]["adaptive"]
    assert full["tokens_per_second"] == pytest.approx(20 / 4.0)
    assert adaptive["tokens_per_second"] == pytest.approx(20 / 2.0)
    assert adaptive["speedup_over_full"] == pytest.approx(2.0)
    assert adaptive["accept_length"] == pytest.approx(1.5)
    assert adaptive["identical_prompts"] == adaptive["bit_exact_prompts"] == adaptive["prompts"] == 2
    assert report["categories"]["qa"]["adaptive"]["speedup_over_full"] == pytest.approx(2.0)


def test_one_differing_repeat_costs_a_prompt_its_identity():
    records = [record("full", 0, r, [1, 2], 1.0) for r in range(2)] + [
        record("adaptive", 0, 0, [1, 2], 1.0),
        record("adaptive", 0, 1, [1, 3], 1.0),
    ]
    figure = summarize(records, {}, BenchConfig(repeats=2), SETUP)["methods"]["adaptive"]
    assert figure["identical_prompts"] == 0
    assert figure["bit_exact_prompts"] == 1


def test_peers_are_also_held_against_their_own_plain_decoding():
    records = [
        record("full", 0, 0, [1, 2], 1.0),
        record("transformers", 0, 0, [1, 9], 1.0, states=None),
        record("transformers-lookup", 0, 0, [1, 9], 1.0, states=None),
    ]
    figures = summarize(records, {}, BenchConfig(repeats=1), SETUP)["methods"]
    assert figures["transformers-lookup"]["identical_prompts"] == 0
    assert figures["transformers-lookup"]["identical_to_own_plain"] == 1
    assert figures["transformers-lookup"]["bit_exact_prompts"] is None


def test_the_first_difference_and_its_gap_are_recorded():
    records = [
        record("full", 0, 0, [1, 2, 3, 4], 1.0),
        record("peer", 0, 0, [1, 2, 9, 4], 1.0),
        record("peer", 0, 1, [1, 2, 9, 4], 1.0),
        record("short", 0, 0, [1], 1.0),
        record("same", 0, 0, [1, 2, 3, 4], 1.0),
    ]
    asked = []

    def gap(prompt, tokens):
        asked.append((prompt, tokens))
        return 0.25

    compare_with_baseline(records, gap)
    assert [r["first_difference"] for r in records] == [None, 2, 2, 1, None]
    assert [r["identical"] for r in records] == [True, False, False, False, True]
    assert records[1]["top2_gap"] == 0.25
    assert asked == [(0, [1, 2]), (0, [1])]


def test_the_picture_is_drawn(tmp_path):
    records = [
        record(method, prompt, repeat, [1] * 8, 1.0 + prompt, category, accept_length=accept)
        for prompt, category in enumerate(("qa", "math"))
        for repeat in range(2)
        for method, accept in (("full", 1.0), ("adaptive", 1.5), ("transformers", None))
    ]
    report = summarize(records, {}, BenchConfig(repeats=2), SETUP)
    plots.draw_bench(report, records, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    plots.draw_bench(report, [r for r in records if r["method"] != "adaptive"], tmp_path / "again.png")


def test_prompts_are_spread_over_a_category():
    rows = (
        [{"category": "writing"}] * 10 + [{"category": "coding"}] * 10 + [{"category": "qa", "n": n} for n in range(80)]
    )
    chosen = select_prompts(rows, BenchConfig(limit=4))
    assert [category_of(row) for row in chosen] == ["mt_bench", "qa"] * 4
    assert [row["category"] for row in chosen[::2]] == ["writing", "writing", "coding", "coding"]
    assert [row["n"] for row in chosen[1::2]] == [0, 20, 40, 60]
    assert len(select_prompts(rows, BenchConfig(categories=["qa"]))) == 80
    with pytest.raises(DataError, match="summaries"):
        select_prompts(rows, BenchConfig(categories=["summaries"]))


@pytest.mark.parametrize("name", ["fast", "full@0.5", "transformers@0.9"])
def test_unknown_methods_are_refused(name):
    with pytest.raises(ConfigError, match="unknown method"):
        check_methods(["full", name], SamplingConfig())


def test_repeats_count_each_token_once():
    from early_exit_cli.evaluation.bench import repeated_tokens

    line = list(range(20))
    assert repeated_tokens(line * 2) == 20
    assert repeated_tokens(line * 3) == 40
    assert repeated_tokens(line + line[:15]) == 0
    assert repeated_tokens([7] * 40) == 39
    assert repeated_tokens([*line, 99, *line[2:19], 98, *line[2:19]]) == 34


def test_ctrl_c_reaches_no_method_but_still_the_parent():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is deaf itself
    child = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('lives')"
    with deaf_to_interrupts():
        process = subprocess.Popen([sys.executable, "-S", "-c", child], stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=20)[0] == "lives\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)
