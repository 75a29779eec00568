"""What `eexit infer` does with every prompt: the engine, the drafter and the settings, made once; and where answers go."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from early_exit_cli.config import InferenceConfig, SamplingConfig
from early_exit_cli.errors import ConfigError

if TYPE_CHECKING:
    from early_exit_cli.backbone.chat import Prompt
    from early_exit_cli.decoding.answer import Generation
    from early_exit_cli.decoding.text import Request
    from early_exit_cli.drafting.drafter import Drafter
    from early_exit_cli.engine import Engine


class RecordFile:
    """`--output`: records, a line each, written as they come. What a file held before stays until the first one.

    Raises:
        ConfigError: it cannot be written; told before anything is answered.
        OSError: a disk that fills up, with the file's name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None
        try:
            path.open("a").close()
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error.strerror}") from error

    def write(self, record: dict[str, Any]) -> None:
        """A further record, on the disk at once."""
        try:
            self.file = self.file or self.path.open("w", encoding="utf-8")
            self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


@dataclass(frozen=True)
class Job:
    """Everything but the prompt."""

    engine: Engine
    settings: InferenceConfig
    sampling: SamplingConfig
    drafter: Drafter
    width: int
    as_json: bool
    coloured: bool
    output: RecordFile | None = None

    def request(self, ids: list[int], prompt: Prompt = "") -> Request:
        """What is asked for of a prompt's token ids; `prompt` is what they were, which matters of a conversation."""
        from early_exit_cli.backbone.chat import turn_ends
        from early_exit_cli.decoding.text import Request
        from early_exit_cli.sampling import make_chooser

        settings, stop = self.settings, list(self.settings.stop)
        if not isinstance(prompt, str) or settings.system is not None:
            stop += turn_ends(self.engine.backbone.tokenizer, raw=settings.raw)
        return Request(ids, settings.max_tokens, make_chooser(self.sampling), stop=tuple(stop))

    def generate(self, request: Request, **more: Any) -> Generation:
        """`decoding.answer.generate` with the job's engine, drafter and width."""
        from early_exit_cli.decoding.answer import generate

        return generate(self.engine, request, self.drafter, mode=self.drafter.name, width=self.width, **more)

    @property
    def title(self) -> str:
        """Of a table: what was run."""
        name = f"{self.engine.backbone.name}, {self.engine.backbone.quantization}"
        return name if self.level is None else f"{name}, accuracy level {self.level:.2f}"

    @property
    def level(self) -> float | None:
        """The target accuracy; None where every level is run."""
        return None if self.settings.mode == "comprehensive" else self.settings.accuracy_level


def encode(engine: Engine, settings: InferenceConfig, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, behind what `--system` says unless it is a conversation that has a system turn; refused when
    it is empty or beyond the context."""
    if settings.system is not None:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if all(turn["role"] != "system" for turn in turns):
            prompt = [{"role": "system", "content": settings.system}, *turns]
    ids = engine.backbone.encode_prompt(prompt, raw=settings.raw)
    engine.check_length(len(ids), settings.max_tokens)
    return ids


def warm_up(job: Job, ids: list[int], drafter: Drafter) -> None:
    """A few tokens that nobody sees, so that a timed run does not pay for what is made once."""
    from early_exit_cli.decoding.answer import generate

    request = dataclasses.replace(job.request(ids), max_new_tokens=min(8, job.settings.max_tokens))
    generate(job.engine, request, drafter, mode="warm-up", width=job.width)
