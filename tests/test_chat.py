"""Text: tokenizer files, prompt templates, media runs, incremental detokenising.

Oracles: ids of the real vocabularies, transformers' PreTrainedTokenizerFast, the sentencepiece
package, and Python's own UTF-8 decoder.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers_tiny import CHATML, CORPUS, VICUNA, write_llama_like, write_qwen_like
from transformers import PreTrainedTokenizerFast

from zipvl.config import ModelConfig, TextConfig
from zipvl.errors import ModelError, UsageError
from zipvl.model.chat import BUILT_IN, Chat
from zipvl.model.tokenizer import read_sentencepiece

DATA = Path(__file__).parent / "data"
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
FAST = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def text(string: str) -> dict:
    return {"type": "text", "text": string}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def model_config(
    kind: str = "llama",
    layout: str = "hf",
    family: str = "llava",
    image: int = -200,
    video: int | None = None,
) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(kind, 600, 8, 8, 1, 1, 1, 8, 1e-6, 1e4),
        vision=None,
        family=family,
        layout=layout,
        image_token=image,
        video_token=image if video is None else video,
    )


def open_chat(folder: Path, config: ModelConfig, template: str | None = None) -> Chat:
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text("{}")
    return Chat.from_folder(folder, config, template)


def flat(runs: list, image: int = -200, video: int = -200) -> list[int]:
    ids = {"image": [image], "video": [video]}
    return [i for run in runs for i in (ids[run] if isinstance(run, str) else run)]


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Chat, dict[str, int]]:
    ids = write_llama_like(
        tmp_path, ["<video>", "<image>", "<pad>"], start_id=450, chat_template=VICUNA
    )
    config = model_config("llama", "hf", "llava_next_video", ids["<image>"], ids["<video>"])
    return open_chat(tmp_path, config), ids


@pytest.fixture
def qwen(tmp_path: Path) -> tuple[Chat, dict[str, int]]:
    ids = write_qwen_like(tmp_path, chat_template=CHATML)
    config = model_config("qwen2", "hf", "llava_onevision", ids["<image>"], ids["<video>"])
    return open_chat(tmp_path, config), ids


# Ids of the real vocabularies ------------------------------------------------------------------

GOLDEN = {
    "vicuna": ("llama", "vicuna", "What is this?", [
        1, 3148, 1001, 29901, 29871, -200, 29871, 13, 5618, 338, 445, 29973, 319, 1799, 9047, 13566,
        29901]),
    "mistral": ("mistral", "mistral_instruct", "What is shown in this image?", [
        1, 733, 16289, 28793, 28705, -200, 28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733,
        28748, 16289, 28793]),
    "qwen2": ("qwen2", "qwen_1_5", "Describe the image in details.", [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, -200,
        198, 74785, 279, 2168, 304, 3565, 13, 151645, 198, 151644, 77091, 198]),
}  # fmt: skip


def golden_folder(folder: Path, name: str, image: int | None = None) -> Path:
    raw = json.loads((DATA / f"golden_{name}.json").read_text(encoding="utf-8"))
    if image is not None:  # as the HF conversion adds it
        raw["model"]["vocab"]["<image>"] = image
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        raw["added_tokens"].append({"id": image, "content": "<image>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    eos = "<|im_end|>" if name == "qwen2" else "</s>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.mark.parametrize("name", GOLDEN)
def test_original_layout_ids(tmp_path: Path, name: str) -> None:
    kind, template, question, ids = GOLDEN[name]
    chat = open_chat(golden_folder(tmp_path, name), model_config(kind, "original"), template)
    runs = chat.tokenize([user(IMAGE, text(question))])
    assert flat(runs) == ids
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    chunks = chat.render([user(IMAGE, text(question))]).split("<image>")
    assert [hf(chunks[0]).input_ids, hf(chunks[1], add_special_tokens=False).input_ids] == [
        runs[0],
        runs[2],
    ]


@pytest.mark.parametrize("name", GOLDEN)
def test_hf_layout_ids(tmp_path: Path, name: str) -> None:
    kind, template, question, ids = GOLDEN[name]
    image = 151646 if kind == "qwen2" else 32000
    family = "llava_next" if kind == "mistral" else "llava"
    config = model_config(kind, "hf", family, image)
    chat = open_chat(golden_folder(tmp_path, name, image), config, template)
    runs = chat.tokenize([user(IMAGE, text(question))])
    assert flat(runs) == ids
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert hf(chat.render([user(IMAGE, text(question))])).input_ids == flat(runs, image)
    assert chat.vocab_size == image + 1


def test_metaspace_first_is_read_as_legacy(tmp_path: Path) -> None:
    """legacy=false files lose the "▁" after <image>; the model was trained with it."""
    kind, template, question, ids = GOLDEN["vicuna"]
    folder = golden_folder(tmp_path, "vicuna", 32000)
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw = json.loads(tok.to_str())
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    as_written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chat = open_chat(folder, model_config(kind, "hf", "llava", 32000), template)
    messages = [user(IMAGE, text(question))]
    assert flat(chat.tokenize(messages)) == ids
    assert as_written.encode(chat.render(messages)).ids != flat(chat.tokenize(messages), 32000)


# Templates -------------------------------------------------------------------------------------

WITH_GENERATION = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}\n"
    "    {# pictures first #}\n"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{% for part in message['content'] %}"
    "{% generation %}{{ part['text'] + eos_token }}{% endgeneration %}{% endfor %}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STRING_ONLY = "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
PRINTS_ANYTHING = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
TURNS = [
    user(IMAGE, IMAGE, text("What is this? 你好")),
    {"role": "assistant", "content": [text("Two cats.")]},
    user(text("And now?"), text(" Look.")),
]


@pytest.mark.parametrize("template", [VICUNA, CHATML, WITH_GENERATION])
def test_own_template_equals_transformers(tmp_path: Path, template: str) -> None:
    ids = write_llama_like(tmp_path, ["<video>", "<image>"], chat_template=template)
    config = model_config("llama", "hf", "llava_next_video", ids["<image>"], ids["<video>"])
    chat = open_chat(tmp_path, config)
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = hf.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert chat.render(TURNS) == expected
    assert flat(chat.tokenize(TURNS), ids["<image>"], ids["<video>"]) == hf(expected).input_ids
    assert chat.template_name == str(tmp_path / "tokenizer_config.json")


def test_string_only_templates(tmp_path: Path) -> None:
    ids = write_llama_like(tmp_path, chat_template=STRING_ONLY)
    chat = open_chat(tmp_path, model_config(image=ids["<image>"]))
    messages = [user(IMAGE, IMAGE, text("hi"))]
    assert chat.render(messages) == "<s>[user] <image> <image>\nhi\n"
    assert flat(chat.tokenize(messages)).count(1) == 1  # the template's BOS is the only one
    write_llama_like(tmp_path, chat_template=PRINTS_ANYTHING)
    chat = open_chat(tmp_path, model_config(image=ids["<image>"]))
    assert chat.render([user(text("hi"))]) == "user: hi "  # not the list's repr


def test_interleaved_media_keep_their_places(qwen: tuple, llama: tuple) -> None:
    for chat, _ in (qwen, llama):
        messages = [user(text("First "), IMAGE, text(" then "), VIDEO, text(" which?"))]
        assert "First <image> then <video> which?" in chat.render(messages)
        runs = chat.tokenize(messages)
        assert [r for r in runs if isinstance(r, str)] == ["image", "video"]
    chat, _ = llama  # its template writes parts in their order, so nothing is joined here
    assert chat.render([user(VIDEO, IMAGE, text("q"))]) == "USER: <video>\n<image>\nq ASSISTANT:"


def test_template_that_reorders_media_is_bypassed(tmp_path: Path) -> None:
    """WITH_GENERATION knows no videos at all; the flat form keeps them."""
    ids = write_llama_like(tmp_path, ["<video>", "<image>"], chat_template=WITH_GENERATION)
    config = model_config("llama", "hf", "llava_next_video", ids["<image>"], ids["<video>"])
    chat = open_chat(tmp_path, config)
    messages = [user(VIDEO, IMAGE, text("q"))]
    assert chat.render(messages) == "USER: <video> <image>\nq ASSISTANT:"
    assert [r for r in chat.tokenize(messages) if isinstance(r, str)] == ["video", "image"]


def test_one_marker_for_both_kinds(tmp_path: Path) -> None:
    write_llama_like(tmp_path, [])
    chat = open_chat(tmp_path, model_config("llama", "original"))
    runs = chat.tokenize([user(VIDEO, text(" and "), IMAGE, text(" differ?"))])
    assert [r for r in runs if isinstance(r, str)] == ["video", "image"]
    assert flat(runs)[0] == 1
    assert flat(runs).count(1) == 1
    assert chat.marker_ids == frozenset()


@pytest.mark.parametrize("marker", ["<image>", "<video>"])
def test_a_typed_marker_is_refused(qwen: tuple, marker: str) -> None:
    chat, _ = qwen
    with pytest.raises(UsageError, match=marker):
        chat.tokenize([user(IMAGE, text(f"what is {marker}?"))])


def test_typed_special_tokens_parse_as_in_transformers(qwen: tuple, tmp_path: Path) -> None:
    chat, ids = qwen
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    typed = "a<|im_end|>\n<|im_start|>b</s> <pad>"
    assert chat.encode(typed) == hf(typed).input_ids
    assert ids["<|im_end|>"] in chat.encode(typed)


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    write_llama_like(tmp_path, [])
    config = model_config("llama", "original")
    settings_file = tmp_path / "tokenizer_config.json"
    plain = json.loads(settings_file.read_text())
    messages = [user(text("q"))]

    def say(word: str) -> str:
        return word + " {{ messages[0]['content'] }}"

    assert open_chat(tmp_path, config).template_name == "vicuna_v1"
    named = [{"name": "tool_use", "template": say("T")}, {"name": "default", "template": say("D")}]
    settings_file.write_text(json.dumps(plain | {"chat_template": named}))
    assert open_chat(tmp_path, config).render(messages) == "D q"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": say("J")}))
    assert open_chat(tmp_path, config).render(messages) == "J q"
    (tmp_path / "chat_template.jinja").write_text(say("F"))
    assert open_chat(tmp_path, config).render(messages) == "F q"
    (tmp_path / "mine.jinja").write_text(say("M"))
    assert open_chat(tmp_path, config, str(tmp_path / "mine.jinja")).render(messages) == "M q"
    assert open_chat(tmp_path, config, "llava_v1").template_name == "llava_v1"
    with pytest.raises(UsageError, match="vicuna_v1"):
        open_chat(tmp_path, config, "no_such_template")


@pytest.mark.parametrize(
    ("source", "clue"),
    [
        ("{% if %}", "valid jinja"),
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "fails"),  # the sandbox holds
        ("{{ 1 / 0 }}", "fails"),
        ("fixed words", "does not place"),
    ],
)
def test_bad_templates(tmp_path: Path, source: str, clue: str) -> None:
    ids = write_llama_like(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ModelError, match=clue) as e:
        open_chat(tmp_path, model_config(image=ids["<image>"])).render([user(IMAGE, text("q"))])
    assert "chat_template.jinja" in str(e.value)


def test_built_in_templates(tmp_path: Path) -> None:
    write_llama_like(tmp_path, [])
    turns = [
        user(IMAGE, text("one")),
        {"role": "assistant", "content": [text("two")]},
        user(text("three")),
    ]
    polite = (
        "A chat between a curious {0} and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the {0}'s questions. "
    )
    vicuna = "USER: <image>\none ASSISTANT: two</s>USER: three ASSISTANT:"
    chatml = (
        "<|im_start|>system\n{0}<|im_end|>\n<|im_start|>user\n<image>\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    direct = chatml.format("Answer the questions.").replace("<|im_end|>\n", "<|im_end|>")
    qwen_25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    expected = {
        "vicuna_v1": polite.format("user") + vicuna,
        "llava_v1": polite.format("human") + vicuna,
        "vicuna": vicuna,
        "mistral_instruct": "[INST] <image>\none [/INST] two </s>[INST] three [/INST]",
        "qwen_1_5": chatml.format("You are a helpful assistant."),
        "qwen_2_5": chatml.format(qwen_25),
        "chatml_direct": direct,
    }
    assert expected.keys() == BUILT_IN.keys()
    system = {"role": "system", "content": [text("Be brief.")]}
    for name, prompt in expected.items():
        chat = open_chat(tmp_path, model_config("llama", "original"), name)
        assert chat.render(turns) == prompt
        with_system = chat.render([system, *turns])
        assert with_system.count("Be brief.") == 1
        assert "helpful" not in with_system
        assert with_system.index("Be brief.") < with_system.index("one")


@pytest.mark.parametrize(
    ("kind", "layout", "family", "name"),
    [
        ("llama", "original", "llava", "vicuna_v1"),
        ("llama", "hf", "llava", "vicuna"),
        ("llama", "hf", "llava_next", "llava_v1"),
        ("llama", "hf", "llava_next_video", "vicuna_v1"),
        ("mistral", "hf", "llava_next", "mistral_instruct"),
        ("mistral", "original", "llava_next", "mistral_instruct"),
        ("qwen2", "original", "longva", "qwen_1_5"),
        ("qwen2", "hf", "llava_onevision", "qwen_1_5"),
    ],
)
def test_default_template(tmp_path: Path, kind: str, layout: str, family: str, name: str) -> None:
    ids = write_llama_like(tmp_path, ["<image>", "<video>"])
    config = model_config(kind, layout, family, ids["<image>"], ids["<video>"])
    assert open_chat(tmp_path, config).template_name == name


# Tokenizer files -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def spm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained here, as Llama's: BPE, byte fallback, identity normaliser."""
    folder = tmp_path_factory.mktemp("spm")
    corpus = folder / "corpus.txt"
    corpus.write_text(CORPUS * 3 + "    indented\n        twice\n", encoding="utf-8")
    common = dict(  # noqa: C408
        input=str(corpus), vocab_size=420, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
        pad_id=-1, minloglevel=2,
    )  # fmt: skip
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            model_prefix=str(folder / kind), model_type=kind, **common
        )
    nfkc = common | {"normalization_rule_name": "nmt_nfkc"}
    sentencepiece.SentencePieceTrainer.train(
        model_prefix=str(folder / "nfkc"), model_type="bpe", **nfkc
    )
    return folder


WORDS = st.sampled_from(
    [*CORPUS.split(" ")[:60], " ", "   ", "\n", "=====", "é", "你好", "🎉", "▁"]
)
TEXT = st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=20).map(" ".join))


@FAST
@given(TEXT)
def test_model_file_equals_sentencepiece(spm_folder: Path, string: str) -> None:
    string = string.replace("\0", "")  # the package treats it as the end of the text
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "bpe.model"))
    tok = read_sentencepiece(spm_folder / "bpe.model")
    assert tok.encode(string, add_special_tokens=False).ids == oracle.encode(string)
    assert tok.encode(string).ids == [1, *oracle.encode(string)]


def test_runs_of_spaces_equal_sentencepiece(spm_folder: Path, tmp_path: Path) -> None:
    """Llama's and Mistral's runs of 2 to 16 spaces all score -1e9: ties go to the left."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((spm_folder / "bpe.model").read_bytes())
    known = {piece.piece: piece for piece in proto.pieces}
    for n in range(2, 17):
        piece = known.get("▁" * n) or proto.pieces.add(piece="▁" * n)
        piece.score = -1e9
    proto.trainer_spec.vocab_size = len(proto.pieces)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tok = read_sentencepiece(tmp_path / "tokenizer.model")
    for n in range(100):
        for string in (" " * n, "The" + " " * n + "image", "\n" + " " * n + "The"):
            assert tok.encode(string, add_special_tokens=False).ids == oracle.encode(string)


def test_model_file_folder(spm_folder: Path, tmp_path: Path) -> None:
    shutil.copy(spm_folder / "bpe.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 421, "<im_patch>": 420}))
    chat = open_chat(tmp_path, model_config("llama", "original"))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "bpe.model"))
    messages = [user(IMAGE, text("What is this? 你好"))]
    before, after = chat.render(messages).split("<image>")
    assert chat.tokenize(messages) == [[1, *oracle.encode(before)], "image", oracle.encode(after)]
    assert chat.encode("a<im_patch>b") == [*oracle.encode("a"), 420, *oracle.encode("b")]
    assert chat.vocab_size == 422
    assert chat.stop_ids == {2}
    assert chat.decode([1, *oracle.encode("Two  cats 你好🎉."), 2]) == "Two  cats 你好🎉."
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 500}))
    with pytest.raises(ModelError, match="<pad>"):
        open_chat(tmp_path, model_config("llama", "original"))


@pytest.mark.parametrize("name", ["unigram", "nfkc"])
def test_other_sentencepiece_kinds_are_refused(spm_folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"not plain BPE.*tokenizer\.json"):
        read_sentencepiece(spm_folder / f"{name}.model")


@FAST
@given(data=st.data())
def test_damaged_model_files(spm_folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    good = (spm_folder / "bpe.model").read_bytes()
    cut = data.draw(st.integers(0, len(good) - 1))
    noise = data.draw(st.binary(max_size=40))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data.draw(st.sampled_from([noise, good[:cut], good[:cut] + noise])))
    try:
        read_sentencepiece(path)  # a lucky cut between two fields can still be a model
    except ModelError as e:
        assert str(path) in str(e)  # noqa: PT017


def test_a_cut_model_file(spm_folder: Path, tmp_path: Path) -> None:
    good = (spm_folder / "bpe.model").read_bytes()
    for cut in (*range(1000, 1040), len(good) - 1):
        (tmp_path / "tokenizer.model").write_bytes(good[:cut])
        with pytest.raises(ModelError, match="download"):
            read_sentencepiece(tmp_path / "tokenizer.model")
    short_piece = b"\x0a\x7f\x0a\x01a"  # says 127 bytes, holds 3
    (tmp_path / "tokenizer.model").write_bytes(good + short_piece)
    with pytest.raises(ModelError, match="download"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def piece(string: bytes) -> bytes:
    """One piece of a model file."""
    inside = b"\x0a" + bytes([len(string) % 128 | 128, len(string) // 128]) + string
    return b"\x0a" + bytes([len(inside) % 128 | 128, len(inside) // 128]) + inside


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 3_000_000,  # one number without end
        b"\x0a\x00" * 500_000,  # more pieces than there may be
        piece(b"a") * 2 + b"\x12\x02\x18\x02\x1a\x00\x1a\x02\x0a\x00",  # the same piece twice
        piece(b"a" * 300) + b"\x12\x02\x18\x02\x1a\x00\x1a\x02\x0a\x00",
        b"".join(piece(b"a" * i + b"b" * j) for i in range(40) for j in range(40) if i + j)
        + b"\x12\x02\x18\x02\x1a\x00\x1a\x02\x0a\x00",  # 60,000 merges
        bytes(2**22 + 1),
    ],
    ids=["number", "pieces", "twice", "long", "merges", "size"],
)
def test_model_files_without_end(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipvl.model.tokenizer.MERGES", 10000)
    (tmp_path / "tokenizer.model").write_bytes(content)
    began = time.process_time()
    with pytest.raises(ModelError, match=r"tokenizer\.model .*download"):
        read_sentencepiece(tmp_path / "tokenizer.model")
    assert time.process_time() - began < 5


def test_vocab_and_merges_files(qwen: tuple, tmp_path: Path) -> None:
    chat, ids = qwen
    bare = tmp_path / "bare"
    bare.mkdir()
    chat.tokenizer.model.save(str(bare))
    (bare / "added_tokens.json").write_text(json.dumps(dict(reversed(ids.items()))))
    again = open_chat(
        bare, model_config("qwen2", "hf", "llava_onevision", ids["<image>"], ids["<video>"])
    )
    string = "You're here: 2024!\n\n  ｆｕｌｌ 你好 🎉<|im_end|> e\u0301"
    assert again.encode(string) == chat.encode(string)
    assert again.decode(again.encode(string)) == chat.decode(chat.encode(string))
    assert again.stop_ids == {ids["<|im_end|>"], ids["<|endoftext|>"]}


def test_tokens_only_the_settings_know(tmp_path: Path) -> None:
    ids = write_llama_like(tmp_path, [])
    size = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    raw = json.loads((tmp_path / "tokenizer_config.json").read_text())
    raw["added_tokens_decoder"] = {
        str(size): {"content": "<image>", "special": True, "normalized": False},
        "1": {"content": "<s>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(raw))
    chat = open_chat(tmp_path, model_config(image=size))
    assert chat.encode("<s><image>") == [ids["<s>"], size]
    raw["added_tokens_decoder"] = {"x": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="added tokens"):
        open_chat(tmp_path, model_config(image=size))


def test_odd_tokens_of_the_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No raw exception, and no word on stdout, where the answer goes."""
    size = len(write_llama_like(tmp_path, ["<image>"]))
    settings = tmp_path / "tokenizer_config.json"
    raw = json.loads(settings.read_text())
    raw["added_tokens_decoder"] = {"1": {"content": "<s>", "special": True, "colour": "red"}}
    raw |= {"eos_token": "\ud800", "bos_token": "\udfff", "pad_token": "<unk>"}
    settings.write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert open_chat(tmp_path, model_config(image=size - 1)).stop_ids >= {5}
    assert capfd.readouterr() == ("", "")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": []}))
    with pytest.raises(ModelError, match="added tokens"):
        open_chat(tmp_path, model_config(image=size - 1))


def test_saved_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    ids = write_llama_like(tmp_path)
    tok = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    string = "USER: a much longer text than four tokens"
    expected = tok.encode(string, add_special_tokens=False).ids
    tok.enable_truncation(4)
    tok.enable_padding(length=64)
    tok.save(str(tmp_path / "tokenizer.json"))
    chat = open_chat(tmp_path, model_config(image=ids["<image>"]))
    assert chat.encode(string) == expected


@pytest.mark.parametrize(
    ("files", "clue"),
    [
        ({}, r"tokenizer\.json nor tokenizer\.model"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "download"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "download"),
        ({"tokenizer.model": "version https://git-lfs.github.com/spec/v1\n"}, "download"),
        ({"tokenizer.model": ""}, "download"),
        ({"vocab.json": "{}", "merges.txt": "a b"}, "download"),
    ],
)
def test_bad_tokenizer_files(tmp_path: Path, files: dict[str, str], clue: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=clue) as e:
        open_chat(tmp_path, model_config())
    assert str(tmp_path) in str(e.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json",
     "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
     "chat_template.json", "merges.txt"],
)  # fmt: skip
def test_what_is_no_plain_file(tmp_path: Path, name: str) -> None:
    """A pipe would hang, a device would fill the memory, a huge file too."""
    ids = write_llama_like(tmp_path)
    if name in ("tokenizer.model", "merges.txt"):
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text("{}")
    path, config = tmp_path / name, model_config(image=ids["<image>"])
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(ModelError, match="a pipe or a device") as e:
        open_chat(tmp_path, config)
    assert str(path) in str(e.value)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="a pipe or a device"):
        open_chat(tmp_path, config)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ModelError, match="8,589,934,592 bytes, and zipvl reads"):
        open_chat(tmp_path, config)


def test_a_template_of_ones_own_that_is_no_file(tmp_path: Path) -> None:
    write_llama_like(tmp_path, [])
    for choice in (tmp_path, "/dev/zero", "x" * 5000, "\0"):
        with pytest.raises(UsageError, match="nor a readable file"):
            open_chat(tmp_path, model_config("llama", "original"), str(choice))


@pytest.mark.parametrize("value", ["[1]", '[{"name": "default"}, 5]', "5", '{"default": "x"}'])
@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_templates_that_are_no_text(tmp_path: Path, name: str, value: str) -> None:
    write_llama_like(tmp_path, [])
    (tmp_path / name).write_text('{"chat_template": ' + value + "}")
    with pytest.raises(ModelError, match=r"chat_template is .*expected text") as e:
        open_chat(tmp_path, model_config("llama", "original"))
    assert name in str(e.value)


@pytest.mark.parametrize("value", ['[{"name": 1}]', '[{"name": "tool", "template": "T"}]', "null"])
def test_lists_without_a_default_template(tmp_path: Path, value: str) -> None:
    write_llama_like(tmp_path, [])
    (tmp_path / "chat_template.json").write_text('{"chat_template": ' + value + "}")
    assert open_chat(tmp_path, model_config("llama", "original")).template_name == "vicuna_v1"


def test_an_odd_section_has_no_stop_tokens(tmp_path: Path) -> None:
    """The original layout reads no text_config."""
    write_llama_like(tmp_path, [])
    (tmp_path / "config.json").write_text('{"text_config": "llama", "eos_token_id": 9}')
    assert open_chat(tmp_path, model_config("llama", "original")).stop_ids == {2, 9}


def test_placeholder_of_another_checkpoint(tmp_path: Path) -> None:
    write_llama_like(tmp_path)
    with pytest.raises(ModelError, match="32000"):
        open_chat(tmp_path, model_config(image=32000))


def test_stop_ids(tmp_path: Path) -> None:
    ids = write_llama_like(tmp_path)
    config = model_config(image=ids["<image>"])
    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": None, "text_config": {"eos_token_id": 7}})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert open_chat(tmp_path, config).stop_ids == {2, 7, 8, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert open_chat(tmp_path, config).stop_ids == {2, 5}


def test_no_stop_token(tmp_path: Path) -> None:
    write_qwen_like(tmp_path, ["<image>"])
    with pytest.raises(ModelError, match="eos_token_id"):
        open_chat(tmp_path, model_config("llama", "original"))


def test_bos_follows_the_settings(tmp_path: Path) -> None:
    write_llama_like(tmp_path, [])
    config = model_config("llama", "original")
    path = tmp_path / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    for setting, bos in ((True, (1,)), (False, ())):
        path.write_text(json.dumps(raw | {"add_bos_token": setting}))
        assert open_chat(tmp_path, config).bos == bos
    del raw["add_bos_token"]
    path.write_text(json.dumps(raw))
    assert open_chat(tmp_path, config).bos == (1,)
    path.unlink()
    assert open_chat(tmp_path, config).bos == (1,)


def test_a_prompt_without_end(qwen: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the template or the user wrote it."""
    monkeypatch.setattr("zipvl.model.chat.PROMPT_SIZE", 1000)
    chat = qwen[0]
    assert len(chat.encode("a" * 1000))
    with pytest.raises(UsageError, match="the prompt has 1,001 characters, and 1,000 may be"):
        chat.encode("a" * 1001)


def test_text_that_is_no_unicode(qwen: tuple) -> None:
    chat, _ = qwen
    with pytest.raises(UsageError, match="UTF-8"):
        chat.tokenize([user(text("bad \ud800 surrogate"))])


# Detokenising ----------------------------------------------------------------------------------

STREAMED = st.one_of(TEXT, st.text("你好🎉👩‍👩‍👧‍👦\ufffd é▁ \nab", max_size=30))


def streamed(chat: Chat, ids: list[int]) -> list[str]:
    stream = chat.detokenizer()
    return [*map(stream.push, ids), stream.flush()]


@FAST
@given(string=STREAMED)
def test_stream_gives_the_text_back(llama: tuple, qwen: tuple, string: str) -> None:
    for chat, _ in (llama, qwen):
        ids = chat.encode(string)
        shown = [i for i in ids if i not in chat.special_ids]
        whole = chat.tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(streamed(chat, ids)) == whole == chat.decode(ids) == chat.decode(shown)
        if "\ufffd" not in string:
            assert not any("\ufffd" in piece for piece in streamed(chat, ids))


@FAST
@given(data=st.data())
def test_broken_bytes_become_replacement_characters(
    llama: tuple, qwen: tuple, data: st.DataObject
) -> None:
    chat, _ = qwen
    ids = data.draw(st.lists(st.integers(0, chat.vocab_size - 1), max_size=30))
    assert "".join(streamed(chat, ids)) == chat.tokenizer.decode(ids, skip_special_tokens=True)
    chat, _ = llama
    some = data.draw(st.lists(st.integers(0, 255), max_size=20))
    ids = [3 + b for b in some]
    assert chat.tokenizer.id_to_token(3 + 0xAB) == "<0xAB>"
    expected = bytes(some).decode("utf-8", "replace").removeprefix(" ")
    assert "".join(streamed(chat, ids)) == expected
    ids.insert(data.draw(st.integers(0, len(some))), 2)  # a special token splits no character
    assert "".join(streamed(chat, ids)) == expected


def test_characters_appear_with_their_last_byte(qwen: tuple, llama: tuple) -> None:
    chat, _ = qwen
    ids = [chat.tokenizer.token_to_id(c) for c in "ðŁİī"]  # the four bytes of one emoji
    assert streamed(chat, ids) == ["", "", "", "🎉", ""]
    assert streamed(chat, ids[:3]) == ["", "", "", "\ufffd"]
    chat, _ = llama
    assert streamed(chat, [3 + b for b in "你a".encode()]) == ["", "", "你", "a", ""]


def test_only_the_first_space_is_dropped(llama: tuple) -> None:
    chat, _ = llama
    space = chat.tokenizer.token_to_id("▁")
    assert streamed(chat, [1, space, space]) == ["", "", " ", ""]
    assert chat.decode(chat.encode("  two")) == "  two"
    ids = chat.encode("The image")
    assert streamed(chat, ids)[0].startswith("T")
    assert "".join(streamed(chat, ids)) == "The image"


def test_added_tokens_are_written_as_they_read(tmp_path: Path) -> None:
    ids = write_qwen_like(tmp_path)
    tok = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tok.add_tokens(["naïve plain"])
    tok.save(str(tmp_path / "tokenizer.json"))
    config = model_config("qwen2", "hf", "llava_onevision", ids["<image>"], ids["<video>"])
    chat = open_chat(tmp_path, config)
    new = chat.encode("a naïve plain b")
    assert tok.token_to_id("naïve plain") in new
    assert chat.decode(new) == "a naïve plain b" == tok.decode(new)


def test_streaming_cost_does_not_grow(qwen: tuple) -> None:
    """20,000 tokens that never end a character: a window of undecoded tokens would be quadratic."""
    chat, _ = qwen
    stream = chat.detokenizer()
    continuation = chat.tokenizer.token_to_id("Ģ")  # byte 0x80
    start = time.perf_counter()
    pieces = [stream.push(continuation) for _ in range(20000)]
    assert time.perf_counter() - start < 2
    assert pieces == ["\ufffd"] * 20000


def test_byte_level_llama_has_no_space_to_drop(tmp_path: Path) -> None:
    """Llama-3 decoders are byte-level: what counts is the tokenizer, not the decoder's kind."""
    write_qwen_like(tmp_path, ["<|im_end|>"])
    tok = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert isinstance(tok.decoder, decoders.ByteLevel)
    assert isinstance(tok.pre_tokenizer, pre_tokenizers.Sequence)
    chat = open_chat(tmp_path, model_config("llama", "original"))
    assert chat.decode(chat.encode(" x")) == " x"
