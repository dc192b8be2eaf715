"""Ways to spoil a checkpoint, and the words that the refusal must contain.

Each spoils a copy of a golden checkpoint of three shards (`checkpoints.RELEASED`) in place.
"""

import json
import shutil
import struct

import checkpoints
import jax.numpy as jnp
import numpy as np
from checkpoints import INDEX, edit_fields, edit_index, edit_tensors

SHARD_1, SHARD_2, SHARD_3 = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
QKV = "model.layers.0.self_attn.qkv_proj.weight"  # in shard 1
CASES = {}


def case(*named, **options):
    """Register a way to spoil a folder; `named` are the words the message must contain."""

    def register(spoil):
        CASES[options.get("name", spoil.__name__)] = (spoil, named)
        return spoil

    return register


# ---------------------------------------------------------------- folder and config


@case("no such folder")
def missing_folder(folder):
    shutil.rmtree(folder)


@case("no such folder")
def a_file_for_a_folder(folder):
    shutil.rmtree(folder)
    folder.write_text("model")


@case("config.json", "no such file")
def missing_config(folder):
    (folder / "config.json").unlink()


@case("config.json")
def config_is_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


for title, content in {
    "not json": b"hello",
    "empty": b"",
    "cut": b'{"model_type": "minimax_text_01", "vocab',
    "a list": b"[1, 2]",
    "a string": b'"minimax"',
    "binary": bytes(range(256)),
    "nul": b"\0" * 100,
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a number of 5000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
}.items():

    @case("config.json", name=f"config {title}")
    def _config(folder, content=content):
        (folder / "config.json").write_bytes(content)

    @case(INDEX, name=f"index {title}")
    def _index(folder, content=content):
        (folder / INDEX).write_bytes(content)


@case("config.json", "model_type 'llama'", "minimax_text_01")
def unknown_model(folder):
    edit_fields(folder, model_type="llama")


@case("config.json", "hidden_size is '32'")
def config_with_a_string(folder):
    edit_fields(folder, hidden_size="32")


@case("config.json", "link")
def config_links_out(folder):
    link_out(folder, "config.json")


@case(INDEX, "link")
def index_links_out(folder):
    link_out(folder, INDEX)


# ---------------------------------------------------------------- shards


def link_out(folder, name):
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


@case(SHARD_2, "link")
def shard_links_out(folder):
    link_out(folder, SHARD_2)


@case(SHARD_2, "link")
def shard_links_to_blobs_of_another_cache(folder):
    blobs = folder.parent / "other" / "blobs"
    blobs.mkdir(parents=True)
    shutil.move(folder / SHARD_2, blobs / "hash")
    (folder / SHARD_2).symlink_to(blobs / "hash")


@case(SHARD_2)
def shard_links_to_itself(folder):
    (folder / SHARD_2).unlink()
    (folder / SHARD_2).symlink_to(SHARD_2)


@case(SHARD_2, "missing")
def missing_shard(folder):
    (folder / SHARD_2).unlink()


@case(SHARD_2)
def shard_is_a_folder(folder):
    (folder / SHARD_2).unlink()
    (folder / SHARD_2).mkdir()


HEADER = len((checkpoints.GOLDEN / checkpoints.RELEASED / SHARD_2).read_bytes()) - len(
    checkpoints.split_file((checkpoints.GOLDEN / checkpoints.RELEASED / SHARD_2).read_bytes())[1]
)
for size in (0, 1, 7, 8, 9, HEADER // 2, HEADER - 1, HEADER, HEADER + 1, HEADER + 4096, -4096, -1):

    @case(SHARD_2, "download", name=f"shard cut at {size}")
    def _cut(folder, size=size):
        (folder / SHARD_2).write_bytes((folder / SHARD_2).read_bytes()[:size])


for length in (0, 1, HEADER, 2**20, 2**32, 2**63 - 1, 2**64 - 1):

    @case(SHARD_2, "download", name=f"shard with a header of {length}")
    def _length(folder, length=length):
        content = (folder / SHARD_2).read_bytes()
        (folder / SHARD_2).write_bytes(struct.pack("<Q", length) + content[8:])


@case(SHARD_2, "download")
def shard_of_text(folder):
    (folder / SHARD_2).write_text("<html>not found</html>" * 100)


@case(SHARD_2, "download")
def shard_longer_than_its_header_says(folder):
    (folder / SHARD_2).write_bytes((folder / SHARD_2).read_bytes() + b"x")


@case("pytorch_model.bin", "safetensors", "convert")
def only_a_pickle(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@case("model.safetensors")
def no_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


# ---------------------------------------------------------------- tensors


@case(SHARD_1, QKV, "(191, 32)", "(192, 32)")
def wrong_shape(folder):
    edit_tensors(folder, SHARD_1, lambda t: t.update({QKV: t[QKV][:-1]}))


@case(SHARD_1, QKV, "(32, 192)", "(192, 32)")
def transposed(folder):
    edit_tensors(folder, SHARD_1, lambda t: t.update({QKV: t[QKV].T}))


@case(SHARD_1, "model.embed_tokens.weight", "(64, 32)")
def another_vocabulary(folder):
    edit_fields(folder, vocab_size=65)


@case(INDEX, QKV, SHARD_1)
def missing_tensor(folder):
    edit_tensors(folder, SHARD_1, lambda t: t.pop(QKV))


@case(QKV, "missing")
def missing_tensor_that_the_index_does_not_know(folder):
    missing_tensor(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][QKV]
    (folder / INDEX).write_text(json.dumps(index))


@case("model.layers.4.", "missing")
def missing_layer(folder):
    edit_fields(folder, num_hidden_layers=5, attn_type_list=[0, 0, 0, 1, 0])


@case(SHARD_3, "model.layers.3.", "unexpected")
def one_layer_too_many(folder):
    edit_fields(folder, num_hidden_layers=3, attn_type_list=[0, 0, 0])


@case(SHARD_1, "model.layers.0.self_attn.q_norm.weight", "unexpected")
def unexpected_tensor(folder):
    name = "model.layers.0.self_attn.q_norm.weight"
    edit_tensors(folder, SHARD_1, lambda t: t.update({name: np.ones(4, np.float32)}))


@case(SHARD_1, "lm_head.weight", "unexpected")
def quantised_beside(folder):
    name = "lm_head.weight_scale"
    edit_tensors(folder, SHARD_1, lambda t: t.update({name: np.ones(4, np.float32)}))


@case(SHARD_1)
def a_name_with_control_characters(folder):
    name = "lm_head\n\x1b[31mmmx: all is well\r"
    edit_tensors(folder, SHARD_1, lambda t: t.update({name: np.ones(4, np.float32)}))


@case(SHARD_2, SHARD_1, QKV)
def the_same_tensor_in_two_shards(folder):
    tensor = checkpoints.read_file(folder / SHARD_1)[QKV]
    edit_tensors(folder, SHARD_2, lambda t: t.update({QKV: tensor}))


@case("model.norm.weight")
def the_same_tensor_with_and_without_a_prefix(folder):
    """Which of the two it is must not be left to chance."""
    tensor = checkpoints.read_file(folder / SHARD_1)["model.norm.weight"]
    name = "language_model.model.norm.weight"
    edit_tensors(folder, SHARD_1, lambda t: t.update({name: 2 * tensor}))


for dtype in (jnp.float8_e4m3fn, np.int8, np.int64, bool):

    @case(SHARD_1, QKV, "dtype", "F32", name=f"dtype {np.dtype(dtype).name}")
    def _dtype(folder, dtype=dtype):
        edit_tensors(folder, SHARD_1, lambda t: t.update({QKV: t[QKV].astype(dtype)}))

    @case(SHARD_1, "lm_head.weight", name=f"tied head of dtype {np.dtype(dtype).name}")
    def _tied(folder, dtype=dtype):
        edit_fields(folder, tie_word_embeddings=True)
        head = "lm_head.weight"
        edit_tensors(folder, SHARD_1, lambda t: t.update({head: t[head].astype(dtype)}))


# ---------------------------------------------------------------- index


@case(INDEX, QKV, SHARD_2)
def index_names_another_shard(folder):
    edit_index(folder, **{QKV: SHARD_2})


@case("config.json", "download")
def index_names_the_config(folder):
    edit_index(folder, **{QKV: "config.json"})


@case("model-9.safetensors", "missing")
def index_names_no_shard(folder):
    edit_index(folder, **{QKV: "model-9.safetensors"})


for value in (3, None, True, [SHARD_1], {"file": SHARD_1}):

    @case(INDEX, "weight_map", name=f"index with the value {value}")
    def _value(folder, value=value):
        edit_index(folder, **{QKV: value})


for weight_map in (None, [], {}, "x", 3):

    @case(INDEX, "weight_map", name=f"weight_map {weight_map!r}")
    def _map(folder, weight_map=weight_map):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@case(INDEX, "weight_map")
def index_without_weight_map(folder):
    (folder / INDEX).write_text("{}")


for path in ("../x", "../it/" + SHARD_1, "/etc/hostname", "sub/" + SHARD_1, "./" + SHARD_1,
             SHARD_1 + "/", ".", "..", "", "a\0b", "x" * 5000):  # fmt: skip

    @case(INDEX, "weight_map", name=f"path {ascii(path)[:20]}")
    def _path(folder, path=path):
        (folder / "sub").mkdir()
        shutil.copy(folder / SHARD_1, folder / "sub" / SHARD_1)
        edit_index(folder, **{QKV: path})
