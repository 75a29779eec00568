"""How long until the first token: ours, transformers' generate and llama.cpp, by the length of the prompt.

    python benchmarks/first_token.py --lengths 100 500 1500

Milliseconds, medians of some repeats, the methods in turns; each in a process of its own, the others idle. llama.cpp is PyPI's, on
the GGUF file that the backbone was made from.
"""

import argparse
import statistics
import time

from early_exit_cli.backbone.load import load_tokenizer
from early_exit_cli.config import BackboneConfig, SamplingConfig
from early_exit_cli.evaluation.bench_methods import Setup, Worker

PAUSE = 0.5
"""Seconds after which the threads of the method before have stopped looking for work."""
TEXT = "The lighthouse keeper counted {} ships before the storm, and wrote down what each of them carried. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 500, 1500])
    parser.add_argument("--methods", nargs="+", default=["full", "transformers", "llama.cpp"])
    parser.add_argument("--quantization", default="4bit")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    backbone = BackboneConfig(device="cpu", quantization=options.quantization)
    encode = load_tokenizer(backbone)
    ids = encode("".join(TEXT.format(number) for number in range(max(options.lengths))))
    setup = Setup(backbone, None, SamplingConfig(), 0.9, "all")
    workers = [Worker(name, setup) for name in options.methods]
    for worker in workers:
        worker.ready()
    for length in options.lengths:
        seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for _ in range(options.repeats):
            for worker in workers:
                time.sleep(PAUSE)
                answer = worker.answer(ids[:length], 2)
                seconds[worker.name].append(answer.first_token_seconds or answer.seconds)
        found = (f"{name} {statistics.median(times) * 1000:,.0f} ms" for name, times in seconds.items())
        print(f"{length} tokens: {', '.join(found)}", flush=True)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
