"""How long until the first token: ours, transformers' generate and llama.cpp, by the length of the prompt.

    python benchmarks/first_token.py --lengths 100 500 1500

Milliseconds, medians of some repeats. One method after another, each in a process that ends before the next one begins: side by
side their waiting threads would take the processor from each other. llama.cpp is PyPI's, on the GGUF file that the backbone was made from.
"""

import argparse
import statistics

from early_exit_cli.backbone.load import load_tokenizer
from early_exit_cli.config import BackboneConfig, SamplingConfig
from early_exit_cli.evaluation.bench_methods import Setup, Worker

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
    for name in options.methods:
        worker = Worker(name, setup)
        worker.ready()
        found = []
        for length in options.lengths:
            answers = [worker.answer(ids[:length], 2) for _ in range(options.repeats)]
            seconds = statistics.median(answer.first_token_seconds or answer.seconds for answer in answers)
            found.append(f"{length} tokens {seconds * 1000:,.0f} ms")
        print(f"{name}: {', '.join(found)}", flush=True)
        worker.close()


if __name__ == "__main__":
    main()
