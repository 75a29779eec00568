"""Answers with drafts, from Python. `python examples/library.py [NEW_TOKENS]`"""

import sys

from transformers import TextStreamer

from early_exit_cli import EarlyExitModel

new_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 96
early = EarlyExitModel.from_pretrained(
    "smollm2-135m"
)  # the bundle that comes with the program, and its backbone in NF4

# Text in, text out.
print(early.answer("What is the capital of France? Explain why in two sentences.", max_new_tokens=new_tokens))
stats = early.last.stats
print(f"\n{stats.tokens_per_second:.0f} tokens/s, {stats.accept_length:.2f} tokens a pass\n")

# As transformers' own generate: the same arguments, the same tensor.
chat = [{"role": "user", "content": "Write a short poem about the sea."}]
inputs = early.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
streamer = TextStreamer(early.tokenizer, skip_prompt=True, skip_special_tokens=True)
sequences = early.generate(**inputs, max_new_tokens=new_tokens, stop_strings=["\n\n"], streamer=streamer)
print(f"\n{sequences.shape[1] - inputs['input_ids'].shape[1]} new tokens\n")

# transformers' own model, with another decoding loop.
sequences = early.model.generate(**inputs, max_new_tokens=new_tokens, custom_generate=early.custom_generate)
print(early.tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
