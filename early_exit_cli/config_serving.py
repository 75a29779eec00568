"""The section of `eexit serve`."""

from __future__ import annotations

from pydantic import SecretStr

from early_exit_cli.config_fields import DrafterName, Section, TextList, setting


class ServeConfig(Section):
    """A model that stays loaded, behind an address."""

    host: str = setting(
        "127.0.0.1", "Address to listen on. One that other machines reach needs --api-key, or --allow-without-key."
    )
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    api_key: SecretStr | None = setting(
        None,
        "Key that every request must bring (Authorization: Bearer KEY), except to /health and the page. Default: "
        "EEXIT_API_KEY, which no list of processes shows.",
    )
    allow_without_key: bool = setting(False, "Let other machines ask without a key.")
    cors_origin: TextList = setting(
        [], "Let pages of this origin (https://example.org) ask from a browser. Repeatable. Default: none."
    )
    drafter: DrafterName = setting(
        None, "What proposes tokens for the backbone to verify, as for infer. Default: auto."
    )
    max_tokens: int = setting(
        1024,
        "New tokens of a chat answer, at most, where the request does not say.",
        ge=1,
        aliases=("--max-new-tokens",),
    )
    batch: int = setting(8, "So many answers share the backbone's passes.", ge=1, aliases=("--batch-size",))
    queue: int = setting(64, "So many requests wait beyond those; the next is refused (429).", ge=1)
    prefix_gb: float = setting(
        1.0,
        "Keep what earlier requests have computed, at most so many gigabytes (10^9 bytes); 0 keeps nothing.",
        ge=0.0,
    )
    timeout: float = setting(600.0, "Seconds after which a request is given up, those in the queue included.", gt=0.0)
    body_mb: float = setting(4.0, "Refuse a request of more megabytes (10^6 bytes; 413).", gt=0.0)
