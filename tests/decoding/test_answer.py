"""Tokens become text piece by piece: never half a character, and whatever the bytes are."""

import random
from types import SimpleNamespace

import pytest
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from early_exit_cli.decoding.text_stream import TextStream

WORDS = ["▁ok", "▁then", "ß", "▁", "日", "<s>", "</s>"]


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """Laid out as Llama 2's: words, and a token for each byte."""
    names = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def stream_of(tokenizer, stop=()) -> TextStream:
    return TextStream(SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer)), stop)


def streamed(tokenizer, ids: list[int], stop=()) -> tuple[list[str], TextStream]:
    stream = stream_of(tokenizer, stop)
    return [*(stream.push([token]) for token in ids), stream.finish()], stream


def bytes_of(tokenizer, data: bytes) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


def test_bytes_that_are_no_text_become_replacement_characters():
    tokenizer = with_byte_fallback()
    ids = [*bytes_of(tokenizer, b"\n\xf0\x9f"), tokenizer.convert_tokens_to_ids("▁ok")]
    pieces, stream = streamed(tokenizer, ids)
    assert stream.ids == ids
    assert "".join(pieces) == stream.text == tokenizer.decode(ids) == "\ufffd\ufffd\ufffd ok"


def test_a_character_of_several_bytes_comes_whole():
    tokenizer = with_byte_fallback()
    ids = [*bytes_of(tokenizer, "é\n🙂".encode()), tokenizer.convert_tokens_to_ids("▁ok")]
    pieces, stream = streamed(tokenizer, ids)
    assert pieces[-2:] == ["é\n🙂 ok", ""]
    assert stream.text == "é\n🙂 ok"


def test_a_character_that_never_became_complete_is_dropped():
    tokenizer = with_byte_fallback()
    ids = [tokenizer.convert_tokens_to_ids("▁ok"), *bytes_of(tokenizer, b"\xf0\x9f")]
    pieces, stream = streamed(tokenizer, ids)
    assert "".join(pieces) == stream.text == "ok"
    assert stream.ids == ids


def test_a_row_without_a_token_is_no_text():
    tokenizer = with_byte_fallback()
    ok = tokenizer.convert_tokens_to_ids("▁ok")
    pieces, stream = streamed(tokenizer, [ok, len(tokenizer) + 3, ok])
    assert "".join(pieces) == "ok ok"
    assert stream.ids == [ok, len(tokenizer) + 3, ok]


@pytest.mark.parametrize("kind", ["byte fallback", "byte level", "smollm2"])
def test_the_pieces_joined_are_the_whole_text(kind, request):
    """Random tokens, most of them no text: what is not text is dropped at the very end only."""
    tokenizer = {"byte fallback": with_byte_fallback, "byte level": byte_tokenizer}.get(
        kind, lambda: request.getfixturevalue("smollm2").tokenizer
    )()
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 30))]
        pieces, stream = streamed(tokenizer, ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(pieces) == stream.text
        assert stream.text.rstrip("\ufffd") == whole.rstrip("\ufffd")
        assert whole.startswith(stream.text)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one. two", [". "], "one"),
        ("aab", ["ab"], "a"),
        ("abcab", ["bd", "abd"], "abcab"),
        ("a stop and STOP", ["STOP"], "a stop and "),
        ("xyz and more", ["more", "yz"], "x"),
        ("stop", ["stop"], ""),
        ("日本語", ["本"], "日"),
    ],
)
def test_a_text_goes_up_to_the_first_stop_text_and_shows_nothing_that_may_become_one(text, stop, shown):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces, stream = streamed(tokenizer, ids, stop)
    assert "".join(pieces) == stream.text == shown
    assert stream.stopped == (shown != text)
    assert stream.ids == ids
    for place in range(len(pieces)):
        assert shown.startswith("".join(pieces[:place]))
