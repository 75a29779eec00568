"""The ways of decoding that `eexit bench` compares, each in a process of its own.

A worker loads its model, warms up, then answers one prompt at a time on request. While one works the others
wait on their pipe, so nobody's threads disturb the measured one. Identity is reported as token ids; our own methods add a
hash of the final states that decided their tokens, so that equal bits can be seen across processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from early_exit_cli.config import EMBEDDED_MODEL, BackboneConfig, BundleConfig, InferenceConfig, SamplingConfig
from early_exit_cli.errors import BackboneError, ConfigError, EexitError

OURS = ("full", "adaptive", "eagle", "mtp", "lookup", "auto")
PEERS = ("transformers", "transformers-lookup", "transformers-early-exit", "llama.cpp", "economize")
READS_HEADS = {"adaptive": "exit heads", "eagle": "an EAGLE head", "transformers-early-exit": "exit heads"}
"""Methods that a backbone without a bundle cannot have, and what each lacks."""
PACKAGES = {"llama.cpp": "xllamacpp", "economize": "economize"}
LOOKUP_TOKENS = 10
WARM_UP_TOKENS = 8
LLAMA_CONTEXT = 4096
SECONDS_TO_END = 2.0
"""How long a process may take to end by itself once nobody asks it any more."""


@dataclass(frozen=True)
class Answer:
    """One timed answer: new token ids, seconds in all and to the first tokens, and how many came then; our own counts where
    there are any."""

    token_ids: list[int]
    seconds: float
    first_token_seconds: float | None
    first_tokens: int = 1
    accept_length: float | None = None
    drafted: int | None = None
    accepted: int | None = None
    partly_rejected: int | None = None
    states_hash: str | None = None


@dataclass(frozen=True)
class Setup:
    """What all methods of a run share. bundle: None for a backbone without heads."""

    backbone: BackboneConfig
    bundle: BundleConfig | None
    sampling: SamplingConfig
    level: float
    read_heads: str


class Method(Protocol):
    """A loaded way of decoding."""

    def answer(self, prompt_ids: list[int], max_tokens: int) -> Answer: ...


def check_methods(names: list[str], sampling: SamplingConfig) -> None:
    """Refuse unknown method names and peers whose package is missing, or that cannot sample, before anything loads."""
    for name in names:
        kind, _, level = name.partition("@")
        if kind not in OURS + PEERS or (level and kind != "adaptive"):
            raise ConfigError(f"unknown method {name!r}", hint=f"methods: {', '.join(OURS + PEERS)}, adaptive@LEVEL")
        package = PACKAGES.get(kind)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(f"method {kind} needs the package {package}", hint="pip install 'eexit[peers]'")
        if kind == "economize" and not sampling.is_greedy:
            raise ConfigError(f"method {kind} is greedy only", hint="leave it out, or the sampling settings")


def left_out_without_heads(names: list[str], model_name: str) -> dict[str, str]:
    """The methods among some that cannot run where a backbone has no heads, and what to do about it."""
    lacking = {name: READS_HEADS.get(name.partition("@")[0]) for name in names}
    return {
        name: f"{name} reads {what}, and there are none for {model_name}: eexit train makes them, --bundle names them"
        for name, what in lacking.items()
        if what is not None
    }


def load_method(name: str, setup: Setup) -> Method:
    """Build a method in this process."""
    kind, _, at = name.partition("@")
    if kind in OURS:
        return _Ours(kind, setup, float(at) if at else setup.level)
    if kind == "llama.cpp":
        return _LlamaCpp(setup)
    if kind == "economize":
        return _Economize(setup)
    return _Transformers(kind, setup)


class _Ours:
    """Plain or adaptive decoding of this program."""

    def __init__(self, kind: str, setup: Setup, level: float) -> None:
        from early_exit_cli.bundle.load import load_engine
        from early_exit_cli.drafting.choose import DRAFTS_BY_MTP, make_drafter
        from early_exit_cli.sampling import make_chooser

        self.engine = load_engine(setup.backbone, setup.bundle, with_mtp=kind in DRAFTS_BY_MTP)
        self.kind = kind
        self.chooser = make_chooser(setup.sampling)
        settings = InferenceConfig.model_validate({"accuracy_level": level, "read_heads": setup.read_heads})
        drafter_kind = {"full": "none", "adaptive": "exit"}.get(kind, kind)
        self.drafter, self.width = make_drafter(self.engine, settings, drafter_kind)

    def answer(self, prompt_ids: list[int], max_tokens: int) -> Answer:
        import torch

        from early_exit_cli.decoding.answer import generate
        from early_exit_cli.decoding.text import Request

        run = generate(
            self.engine,
            Request(prompt_ids, max_tokens, self.chooser),
            self.drafter,
            mode=self.kind,
            width=self.width,
            keep_states=True,
        )
        states = run.states.contiguous().view(torch.uint8).cpu().numpy().tobytes() if run.states is not None else b""
        return Answer(
            run.token_ids,
            run.stats.total_time_seconds,
            run.stats.time_to_first_token_seconds,
            len(run.rounds[0].tokens),
            run.stats.accept_length,
            run.stats.tokens_drafted,
            run.stats.tokens_accepted,
            run.stats.partly_rejected_drafts,
            hashlib.sha256(states).hexdigest()[:16],
        )

    def top2_gap(self, token_ids: list[int]) -> float:
        """How far apart the backbone's two best logits after these tokens are: near 0, rounding decides."""
        import torch

        engine = self.engine
        with torch.inference_mode():
            cache = engine.prefill(token_ids, 1)
            state = engine.run(engine.embed(token_ids[-1:]), cache, cache.length, 0, engine.blocks.num_blocks)
            first, second = engine.blocks.logits(engine.blocks.final_norm(state))[0].float().topk(2).values.tolist()
        return first - second


class _Transformers:
    """The library's own `generate` on the same 4-bit weights: plain, prompt lookup, or early exit."""

    def __init__(self, kind: str, setup: Setup) -> None:
        from early_exit_cli.backbone.load import load_backbone
        from early_exit_cli.bundle.files import read_bundle_config
        from early_exit_cli.bundle.load import bundle_folder

        self.backbone = load_backbone(setup.backbone)
        sampling = setup.sampling
        self.seed = sampling.seed
        self.options: dict[str, Any] = {
            "do_sample": sampling.temperature > 0,
            "repetition_penalty": sampling.repetition_penalty,
        }
        if sampling.temperature:
            cuts = {"temperature", "top_k", "top_p", "min_p"}
            self.options |= sampling.model_dump(include=cuts)
        if kind == "transformers-lookup":
            self.options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        if kind == "transformers-early-exit" and setup.bundle is not None:
            heads = read_bundle_config(bundle_folder(setup.bundle))
            self.options["assistant_early_exit"] = heads.exit_layers[0]

    def answer(self, prompt_ids: list[int], max_tokens: int) -> Answer:
        import torch

        clock = _FirstTokenClock()
        inputs = torch.tensor([prompt_ids], device=self.backbone.device)
        torch.manual_seed(self.seed)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.backbone.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_tokens,
                stopping_criteria=[clock],
                **self.options,
            )
        tokens = output[0, len(prompt_ids) :].tolist()
        seconds = time.perf_counter() - started
        return Answer(tokens, seconds, (clock.first or time.perf_counter()) - started)


class _Economize:
    """The lookup drafter of the package economize, at its defaults, on the same 4-bit weights."""

    def __init__(self, setup: Setup) -> None:
        import economize
        from economize.techniques.lookup import LookupConfig

        from early_exit_cli.backbone.load import load_backbone

        self.backbone = load_backbone(setup.backbone)
        self.model = economize.apply(
            self.backbone.model,
            LookupConfig(),
            decoding=economize.DecodeConfig(cycle_length=LOOKUP_TOKENS + 1),
        )

    def answer(self, prompt_ids: list[int], max_tokens: int) -> Answer:
        import torch

        inputs = torch.tensor(prompt_ids, device=self.backbone.device)
        started = time.perf_counter()
        with torch.inference_mode():
            result = self.model.decode(inputs, max_tokens, stop=sorted(self.backbone.eos_token_ids))
        tokens = result.tokens.tolist()
        return Answer(tokens, time.perf_counter() - started, None, accept_length=1 + result.mean_accepted)


class _FirstTokenClock:
    """A stopping criterion that never stops; it notes when it was first asked, which is after the first token."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self.first = self.first or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _LlamaCpp:
    """llama.cpp on the GGUF file of the same model, with as many threads as torch uses."""

    def __init__(self, setup: Setup) -> None:
        import torch
        import xllamacpp

        from early_exit_cli.backbone.gguf import embedded_gguf

        self.sampling = setup.sampling
        name = setup.backbone.model_name
        path = embedded_gguf() if name == EMBEDDED_MODEL else name
        if path is None or not str(path).endswith(".gguf"):
            raise BackboneError("llama.cpp needs the model's GGUF file", hint="--model-name FILE.gguf")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = LLAMA_CONTEXT
        params.n_parallel = 1
        params.warmup = True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        if not os.environ.get("EEXIT_DEBUG"):  # it logs every request; what matters comes as an exception
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self.server = xllamacpp.Server(params)

    def answer(self, prompt_ids: list[int], max_tokens: int) -> Answer:
        request = {
            "prompt": prompt_ids,
            "n_predict": max_tokens,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k if self.sampling.temperature else 1,
            "top_p": self.sampling.top_p,
            "min_p": self.sampling.min_p,
            "repeat_penalty": self.sampling.repetition_penalty,
            "repeat_last_n": LLAMA_CONTEXT,
            "seed": self.sampling.seed,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": False,
        }
        started = time.perf_counter()
        reply = self.server.handle_completions(request)
        seconds = time.perf_counter() - started
        if not isinstance(reply, dict) or "error" in reply:
            raise BackboneError(f"llama.cpp: {str(reply)[:200]}")
        # /completion puts tokens beside the text; /v1/completions only counts them
        tokens = reply.get("tokens") or [-1] * int(reply.get("usage", {}).get("completion_tokens", 0))
        timings = reply.get("timings", {})
        first = (
            (timings["prompt_ms"] + timings.get("predicted_per_token_ms", 0.0)) / 1000
            if "prompt_ms" in timings
            else None
        )
        return Answer(list(tokens), seconds, first)


class Worker:
    """A method in a child process."""

    def __init__(self, name: str, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name, setup), daemon=True)
        with deaf_to_interrupts():
            self.process.start()
        theirs.close()

    def ready(self) -> dict[str, float]:
        """Wait until it has loaded and warmed up; what that cost."""
        return self._receive()

    def answer(self, prompt_ids: list[int], max_tokens: int) -> Answer:
        """One timed answer."""
        self.pipe.send(("answer", prompt_ids, max_tokens))
        return Answer(**self._receive())

    def top2_gap(self, token_ids: list[int]) -> float:
        """The gap between the backbone's two best logits; only our own methods can tell."""
        self.pipe.send(("top2_gap", token_ids))
        return float(self._receive())

    def _receive(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise BackboneError(f"the process of method {self.name} died") from None
        if kind == "error":
            raise BackboneError(f"method {self.name}: {value}")
        return value

    def dismiss(self) -> None:
        """Ask it nothing any more, upon which it ends."""
        self.pipe.close()

    def close(self) -> None:
        """Wait for its end; one that is busy is ended."""
        self.dismiss()
        self.process.join(timeout=SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C, which a terminal sends to all: the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection, name: str, setup: Setup) -> None:
    """The child's life: load, warm up, answer until the pipe closes. Its stdout goes to stderr: stdout is the result."""
    os.dup2(2, 1)
    try:
        started = time.perf_counter()
        method = load_method(name, setup)
        loaded = time.perf_counter()
        method.answer(list(range(10, 42)), WARM_UP_TOKENS)
        pipe.send(("ready", {"load_s": loaded - started, "warm_up_s": time.perf_counter() - loaded}))
        while True:
            request, *arguments = pipe.recv()
            result = getattr(method, request)(*arguments)
            pipe.send((request, asdict(result) if isinstance(result, Answer) else result))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
    except EexitError as error:
        _tell(pipe, error.message)
    except Exception as error:  # whatever a peer raises is told to the parent, which names the method
        _tell(pipe, f"{type(error).__name__}: {error}")


def _tell(pipe: Connection, fault: str) -> None:
    with contextlib.suppress(OSError):  # the parent is gone
        pipe.send(("error", fault))
