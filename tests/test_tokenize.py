"""`/tokenize` and `/detokenize` agree with the tokenizer; single tokens are spelled as texts hold them."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors

from config.settings import BUNDLED_CHECKPOINT, EngineSettings
from decoding.messages import TextAssets
from server.codec import Codec
from server.logprobs import prompt_offsets
from server.vocabulary import Vocabulary
from tests.scripted_engine import scripted_limits
from tests.test_text_stream import WORDS

JSON = (BUNDLED_CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8")
TOKENIZER = Tokenizer.from_str(JSON)
BUNDLED = Vocabulary(TOKENIZER, JSON, eos_token_ids=[0])
SENTENCEPIECE = Vocabulary(WORDS, WORDS.to_str(), eos_token_ids=[])
TEXT = "def naïve(日本):<|endoftext|>\n"


def test_text_becomes_ids_and_ids_become_the_text(scripted):
    answer = scripted.post({"prompt": TEXT}, path="/tokenize").json
    ids = TOKENIZER.encode(TEXT).ids
    assert answer == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    assert scripted.post({"tokens": ids}, path="/detokenize").json == {"prompt": TEXT}
    named = scripted.post({"prompt": TEXT, "return_token_strs": True}, path="/tokenize").json
    assert named["token_strs"] == [TOKENIZER.id_to_token(i) for i in ids]
    assert scripted.post({"content": TEXT}, path="/tokenize").json == answer


def test_texts_longer_than_the_context_and_empty_ones_are_tokenised(scripted):
    assert scripted.post({"prompt": "a b " * 2000}, path="/tokenize").json["count"] > 512
    assert scripted.post({"prompt": ""}, path="/tokenize").json["tokens"] == []
    assert scripted.post({"tokens": []}, path="/detokenize").json == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens"),
        ("/detokenize", {"tokens": [4096]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_bad_input_is_a_400_that_names_the_parameter(scripted, path, body, param):
    answer = scripted.post(body, path=path)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_other_models_are_a_404(scripted):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert scripted.post(body | {"model": "gpt-4"}, path=path).status == 404


def test_ping_and_version_answer(scripted):
    assert scripted.get("/ping").status == scripted.post({}, path="/ping").status == 200
    assert json.loads(scripted.get("/version").body)["version"]


@given(st.text(max_size=40))
def test_bytes_of_tokens_join_to_the_text(text):
    ids = TOKENIZER.encode(text).ids
    assert b"".join(map(BUNDLED.utf8, ids)).decode() == text


@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "é", "▁"]), max_size=10))
def test_bytes_and_texts_of_sentencepiece_tokens_keep_their_spaces(symbols):
    ids = [WORDS.token_to_id(symbol) for symbol in symbols]
    expected = "".join(symbols).replace("▁", " ")
    assert b"".join(map(SENTENCEPIECE.utf8, ids)).decode() == expected
    assert "".join(map(SENTENCEPIECE.text, ids)) == expected


def test_byte_tokens_are_spelled_as_their_byte():
    ids = [WORDS.token_to_id(f"<0x{byte:02X}>") for byte in "日".encode()]
    assert b"".join(map(SENTENCEPIECE.utf8, ids)).decode() == "日"
    assert SENTENCEPIECE.utf8(WORDS.token_to_id("<s>")) == b"<s>"


@given(st.text("ab é日\n", max_size=40))
def test_offsets_of_a_prompt_are_where_its_tokens_begin(text):
    encoding = TOKENIZER.encode(text)
    expected = [
        len(TOKENIZER.decode(encoding.ids[:count]).rstrip("\ufffd")) for count in range(len(encoding.ids))
    ]
    assert prompt_offsets(encoding.ids, text, BUNDLED) == expected


def test_offsets_know_special_tokens_and_dropped_spaces():
    assert prompt_offsets(TOKENIZER.encode("a<|endoftext|>b").ids, "a<|endoftext|>b", BUNDLED) == [0, 1, 14]
    assert prompt_offsets([0, TOKENIZER.token_to_id("b")], "b", BUNDLED) == [0, 0]
    ids = [WORDS.token_to_id(symbol) for symbol in ("<s>", "▁the", "▁cat", "s")]
    assert prompt_offsets(ids, "the cats", SENTENCEPIECE) == [0, 0, 3, 7]


def codec_with_bos() -> Codec:
    """A tokenizer of single letters that puts `<s>` in front."""
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "a": 1, "b": 2, "c": 3, " ": 4}, merges=[]))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assets = TextAssets(tokenizer.to_str(), eos_token_ids=[3], special_token_ids=[0], chat_template=None)
    return Codec(assets, scripted_limits(EngineSettings()))


@pytest.mark.parametrize(
    ("add_special_tokens", "keep_last", "ids"),
    [
        (True, None, [0, 1, 2, 3]),
        (False, None, [1, 2, 3]),
        (True, 3, [0, 2, 3]),
        (False, 2, [2, 3]),
        (True, 1, [0]),
        (True, 9, [0, 1, 2, 3]),
    ],
)
def test_special_tokens_survive_the_cut_of_a_prompt(add_special_tokens, keep_last, ids):
    async def encode() -> list[int]:
        codec = codec_with_bos()
        limit = codec.prompt_limit(max_new_tokens=1, param="prompt")
        return await codec.encode_prompt(
            "abc", limit, add_special_tokens=add_special_tokens, keep_last=keep_last
        )

    assert asyncio.run(encode()) == ids


def test_tokens_that_begin_and_end_are_known_by_name():
    vocabulary = codec_with_bos().vocabulary
    assert (vocabulary.bos_token, vocabulary.eos_token) == ("<s>", "c")
    assert (BUNDLED.bos_token, BUNDLED.eos_token) == ("", "<|endoftext|>")
