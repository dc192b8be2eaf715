"""A checkpoint folder one can talk with: a model of two layers and a byte-level tokenizer."""

import checkpoints
from serving import TOKENIZER

from mmx.inference.chat import ChatTemplate, encode_chat

LENGTH = 512


def write_model(folder, **changes):
    """The folder, whose conversations have MiniMax's format."""
    fields = checkpoints.released_fields(
        vocab_size=TOKENIZER.get_vocab_size(), num_hidden_layers=2, attn_type_list=[0, 1],
        max_position_embeddings=LENGTH, eos_token_id=0, **changes,
    )  # fmt: skip
    checkpoints.write_folder(folder, fields, checkpoints.random_tensors(checkpoints.shapes(fields)))
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return folder


def system_of(tokens, config, message):
    """A system message with which a first message makes so many tokens, or a few more."""
    text = "twice"
    while True:
        talk = [{"role": "system", "content": text}, {"role": "user", "content": message}]
        if len(encode_chat(ChatTemplate(), TOKENIZER, talk, config)) >= tokens:
            return text
        text += " twice"
