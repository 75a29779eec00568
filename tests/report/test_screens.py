"""What commands show, at 60, 100 and 160 columns, as text to look at: tests/report/screens.

No label and no value may be lost, whatever the width. WRITE_SCREENS=1 writes the files anew.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from terminal import Terminal

from early_exit_cli.calibration.calibrate import Calibration, Cell, HeadCalibration
from early_exit_cli.cli import bench, calibrate, many, show
from early_exit_cli.decoding.answer import Generation, Stats
from early_exit_cli.decoding.text import Round
from early_exit_cli.drafting.chances import DraftChances, Survival
from early_exit_cli.evaluation.compare import Comparison
from early_exit_cli.evaluation.comprehensive import MethodRun

FOLDER = Path(__file__).parent / "screens"
WIDTHS = (60, 100, 160)
TITLE = "HuggingFaceTB/SmolLM2-135M-Instruct, 4bit, accuracy level 0.90"
STATS = Stats(
    mode="auto", prompt_tokens=6760, total_tokens_generated=131, total_time_seconds=2.1, tokens_per_second=62.4,
    time_to_first_token_seconds=1.52, prefill_tokens_per_second=4447.4, decode_tokens_per_second=224.1, draft_attempts=40,
    tokens_drafted=120, tokens_accepted=85, acceptance_rate=85 / 120, average_draft_length=3.0, accept_length=2.85,
    partly_rejected_drafts=12, exit_distribution={"0": 0, "1": 0, "2": 0, "full": 46, "lookup": 60, "eagle": 25},
    average_exit_layer=10.5,
)  # fmt: skip
PLAIN = replace(
    STATS, mode="full", tokens_per_second=46.9, decode_tokens_per_second=132.6, tokens_drafted=0, tokens_accepted=0,
    acceptance_rate=None, accept_length=1.0, exit_distribution={"0": 0, "1": 0, "2": 0, "full": 131}, average_exit_layer=30.0,
)  # fmt: skip
EXITS = replace(
    STATS, mode="adaptive_early_exit", exit_distribution={"0": 3, "1": 0, "2": 22, "full": 106}, average_exit_layer=27.6
)


def run_of(stats, finish_reason="stop"):
    return Generation("an answer", [1, 2], stats, [Round([1, 2], 0, 0, [None, None], finish_reason=finish_reason)])


def answer():
    show.legend(STATS, coloured=False)
    show.console.table("", ["", ""], show.stats_rows(run_of(STATS)))


def answer_with_exits():
    show.legend(EXITS, coloured=False)
    show.console.table("", ["", ""], show.stats_rows(run_of(replace(EXITS, peak_gpu_memory_gb=5.2), None)))


def compared():
    show.legend(STATS, coloured=False)
    show.comparison(Comparison(run_of(PLAIN), run_of(STATS), True, True, 1.33, None), TITLE, 3)


def comprehensive():
    runs = {"full": PLAIN, "layerskip_h2_d15": EXITS, "adaptive_acc0.90": EXITS}
    show.all_methods({name: MethodRun(run_of(stats), 0.98, True, True) for name, stats in runs.items()}, TITLE, 3)


def many_prompts():
    class Job:
        as_json, settings = False, type("Settings", (), {"mode": "compare", "batch": 1})
        drafter = type("Drafter", (), {"name": "auto"})

    class Answers:
        records = {  # noqa: RUF012 (read only)
            place: {
                "row": place + 1, "category": "mathematical_reasoning", "prompt_tokens": 53, "speedup": 1.33,
                "full": run_of(PLAIN).record(), "auto": run_of(STATS, reason).record(), "identical": True, "bit_exact": True,
            }
            for place, reason in enumerate(["stop", "length"])
        }  # fmt: skip

        def in_order(self):
            return [*self.records.values()]

    many.report(Job, Answers(), 2.0)


def calibrated(verbose=False):
    cells = {
        f"{level:.2f}": Cell(0.4213, level < 0.8, 4000, 0.674, 0.91, 0.89, 1200, 3900, 0.902)
        for level in (0.6, 0.7, 0.8, 0.9)
    }
    cells = {
        key: cell if cell.reachable else replace(cell, agreement=None, reached=None) for key, cell in cells.items()
    }
    head = HeadCalibration(8, 1.0, 0.5, 0.41, 60000, {"conditional": cells, "independent": cells}, [], [], [])
    result = Calibration(
        [0.6, 0.7, 0.8, 0.9],
        [head, head],
        "text",
        100,
        "max_coverage",
        "entropy",
        "conditional",
        0.01,
        None,
        50000,
        [],
        {},
    )
    survival = Survival(intercept=2.0, slope=-1.5, mean=0.67)
    chances = DraftChances(lookup=[0.31, 0.42, 0.55, 0.6, 0.7, 0.8], eagle=[survival], checked=[(0.66, 0.67)])
    calibrate.print_draft_chances(chances, has_exits=True)
    calibrate.print_calibration(result, 30, verbose)
    calibrate.print_warnings(result)


def calibrated_verbosely():
    calibrated(verbose=True)


def benched():
    figures = {
        "tokens_per_second": 219.4, "speedup_over_full": 1.33, "prefill_tokens_per_second": 4447.0,
        "decode_tokens_per_second": 240.1, "accept_length": 2.78, "identical_prompts": 60, "bit_exact_prompts": 60,
        "prompts": 60, "ttft_s": 0.141,
    }  # fmt: skip
    methods = {"full": figures, "auto": figures, "transformers-lookup": figures | {"bit_exact_prompts": None}}
    bench.print_report(
        {
            "environment": {
                "processor": "AMD EPYC 9R14, 2 cores", "max_tokens": 128, "repeats": 3, "sampling": {"temperature": 0.0},
                "start_up": {name: {"load_s": 6.6} for name in methods},
            },
            "methods": methods,
            "categories": {"mathematical_reasoning": methods, "summarization": methods},
            "repeats": {"share": 0.24, "length": 16, "prompts_with": 30, "speedup_without": {"full": 1.0, "auto": 1.2}},
        }
    )  # fmt: skip


SCREENS = [
    answer, answer_with_exits, compared, comprehensive, many_prompts, calibrated, calibrated_verbosely, benched,
]  # fmt: skip


def drawn(screen, columns, monkeypatch):
    """What a person sees in a terminal of so many columns, stdout and stderr together."""
    terminal = Terminal(columns)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm-256color", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    screen()
    monkeypatch.undo()
    return "\n".join(terminal.lines).rstrip() + "\n"


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.__name__)
def test_a_screen_is_as_it_was_looked_at(screen, columns, monkeypatch):
    text = drawn(screen, columns, monkeypatch)
    path = FOLDER / f"{screen.__name__}.{columns}.txt"
    if os.environ.get("WRITE_SCREENS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.__name__)
def test_a_narrow_terminal_shows_every_word_of_a_wide_one(screen, monkeypatch):
    wide, narrow = (drawn(screen, columns, monkeypatch).split() for columns in (160, 60))
    assert not {*wide} - {*narrow}


def test_a_bundle_is_told_nothing_of_heads_that_it_has_not(capsys):
    survival = Survival(intercept=1.0, slope=-1.0, mean=0.5, entropies=(0.5,) * 16)
    for eagle, has_exits, expected in (
        ([], True, "at 0.7 (exit heads) times"),
        ([survival], False, "at 0.9 (EAGLE head) times"),
        ([survival], True, "at 0.7 (exit heads) and 0.9 (EAGLE head) times"),
    ):
        chances = DraftChances(lookup=[0.5] * 6, eagle=eagle, checked=[(0.5, 0.5)] * len(eagle))
        chances = chances.model_copy(update={"exit_temperature": 0.7, "eagle_temperature": 0.9})
        calibrate.print_draft_chances(chances, has_exits)
        assert expected in " ".join(capsys.readouterr().err.split())
