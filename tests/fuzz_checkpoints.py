"""Damaged and hostile checkpoints: weights, configs, tokenizers, chat templates; and who reads them.

A case is a small healthy checkpoint of one of the families with one file replaced.
"""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers_tiny
import torch
from fuzz_damage import NUMBERS, STRANGE, Files, Random, damage, retell
from PIL import Image
from safetensors.torch import save_file

import zipvl
from zipvl.engine.load import DEMO
from zipvl.model.chat import BUILT_IN, Chat
from zipvl.model.layouts import read_config
from zipvl.model.vlm import VLM

CLIP = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
DECODER = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
           "max_position_embeddings": 4096, "eos_token_id": 4}  # fmt: skip
CANVASES = [[28, 56], [56, 28], [56, 56]]


def hf(name: str, text: str, vision: dict, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{name}ForConditionalGeneration"], "image_token_index": 5,
        "video_token_index": 6, "projector_hidden_act": "gelu", "vision_config": vision,
        "text_config": DECODER | {"model_type": text}, **more,
    }  # fmt: skip


def original(name: str, **more: Any) -> dict[str, Any]:
    return DECODER | {
        "architectures": [f"{name}ForCausalLM"], "mm_vision_tower": "tower",
        "mm_vision_select_layer": -2, "mm_projector_type": "mlp2x_gelu", **more,
    }  # fmt: skip


CHECKPOINTS = {
    "llava": hf("Llava", "llama", CLIP, vision_feature_layer=-2),
    "next": hf("LlavaNext", "mistral", CLIP, image_grid_pinpoints=CANVASES),
    "next_video": hf("LlavaNextVideo", "llama", CLIP, image_grid_pinpoints=CANVASES),
    "onevision": hf(
        "LlavaOnevision", "qwen2", SIGLIP, image_grid_pinpoints=CANVASES,
        vision_aspect_ratio="anyres_max_9",
    ),
    "original": original(
        "LlavaLlama", image_aspect_ratio="anyres", image_grid_pinpoints=str(CANVASES),
        mm_patch_merge_type="spatial_unpad", rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "longva": original(
        "LlavaQwen", image_aspect_ratio="anyres", image_grid_pinpoints=CANVASES,
        mm_patch_merge_type="unires", tie_word_embeddings=True,
    ),
    "intern": hf(
        "InternVL", "qwen3", {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "qwen": hf(
        "Qwen2_5_VL", "qwen2", {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 16, "window_size": 56, "fullatt_block_indexes": [1]},
    ),
}  # fmt: skip
TURNS = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
CHECKPOINTS["qwen"]["text_config"] |= TURNS
WRITTEN = {  # how files call what the model calls otherwise
    "intern": {
        "vision.tower.": "vision_tower.", "vision.projector.0.": "multi_modal_projector.layer_norm.",
        "vision.projector.1.": "multi_modal_projector.linear_1.",
        "vision.projector.3.": "multi_modal_projector.linear_2.",
    },
    "qwen": {"vision.": "visual."},
    "": {
        "vision.tower.": "vision_tower.vision_model.", "vision.projector.": "model.mm_projector.",
        "vision.newline": "image_newline",
    },
}  # fmt: skip


def written(name: str, family: str) -> str:
    for ours, theirs in WRITTEN.get(family, WRITTEN[""]).items():
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    return name


def build_checkpoints(root: Path) -> None:
    """One folder for each of CHECKPOINTS, with random weights and the bundled tokenizer."""
    for name, config in CHECKPOINTS.items():
        folder = shutil.copytree(DEMO / "model", root / name)
        (folder / "config.json").write_text(json.dumps(config))
        if "mm_vision_tower" in config:
            (folder / "chat_template.jinja").unlink()
            (folder / "tower").mkdir()
            (folder / "tower" / "config.json").write_text(json.dumps(CLIP))
        if name == "intern":  # whose processor must fit its tower
            (folder / "preprocessor_config.json").write_text('{"max_patches": 3}')
        torch.manual_seed(0)
        state = VLM(read_config(folder)).state_dict()
        tensors = {written(k, name): tensor.detach().clone() for k, tensor in state.items()}
        if name == "next":  # in two files
            (folder / "model.safetensors").unlink()
            half = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(tensors)}
            for file in set(half.values()):
                save_file({k: tensors[k] for k in tensors if half[k] == file}, folder / file)
            index = folder / "model.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": half}))
        else:
            save_file(tensors, folder / "model.safetensors")


DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "U32",
    "I8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F7",
    "f32",
)


def weights(rng: Random, base: Path) -> Files:
    path = rng.choice(sorted(base.glob("model*")))
    data = path.read_bytes()
    if rng.random() < 0.1:
        return {path.name: rng.choice(STRANGE)}
    if path.suffix == ".json":
        names = ("../x.safetensors", "model-0.safetensors\n", "/dev/zero", "model-9.safetensors")
        return {path.name: retell(rng, data, names)}
    size = int.from_bytes(data[:8], "little")
    head, body = data[8 : 8 + size], data[8 + size :]
    match rng.randrange(8):
        case 0:
            return {path.name: damage(rng, data)}
        case 1:
            return {path.name: struct.pack("<Q", rng.choice(NUMBERS)) + data[8:]}
        case 2 | 3:  # NaN, infinity, large numbers
            value = rng.choice(
                (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", bytes(4))
            )
            at = rng.randrange(len(body)) // 4 * 4
            hurt = value * rng.choice((1, 16, (len(body) - at) // 4))
            body = body[:at] + hurt[: len(body) - at] + body[at + len(hurt) :]
        case 4 | 5:
            head = retell(rng, head, DTYPES)
        case 6:
            head = json.dumps(other_tensors(rng, json.loads(head))).encode()
        case 7:
            count, prefix = (
                rng.choice((10, 1000, 100_000)),
                rng.choice(("t", "model.layers.0.", "é\n")),
            )
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            more = {f"{prefix}{i}": empty for i in range(count)}
            head = json.dumps(json.loads(head) | more).encode()
    return {path.name: struct.pack("<Q", len(head)) + head + body}


def other_tensors(rng: Random, head: dict[str, Any]) -> dict[str, Any]:
    """A header that fits the same bytes: other types, shapes or names."""
    names = [name for name in head if name != "__metadata__"]
    for name in rng.choice((names, rng.sample(names, 1), rng.sample(names, 3))):
        tensor = head[name]
        match rng.randrange(3):
            case 0:
                tensor["dtype"] = rng.choice(("I32", "U32", "F32"))
            case 1:
                shape = tensor["shape"]
                flat = [int(np.prod(shape))]
                tensor["shape"] = rng.choice(
                    (shape[::-1], flat, [1, *shape], [*shape, 1], [*flat, 1])
                )
            case 2:
                new = rng.choice(
                    (*names, "x", "", "a" * 10**4, "\x1b[2J", "lm_head.weight", name + ".weight")
                )
                head[new] = head.pop(name)
    return head


def config(rng: Random, base: Path) -> Files:
    names = ["config.json"] * 6 + ["preprocessor_config.json", "generation_config.json"]
    names += ["tower/config.json"] * 2 if (base / "tower").exists() else []
    name = rng.choice(names)
    if rng.random() < 0.05:
        return {name: rng.choice(STRANGE)}
    kinds = (
        "llama",
        "mistral",
        "qwen2",
        "clip_vision_model",
        "siglip_vision_model",
        "anyres_max_9",
    )
    kinds += (
        "pad",
        "anyres",
        "full",
        "average",
        "max",
        "spatial",
        "unires",
        "grid",
        "gelu",
        "identity",
    )
    kinds += ("linear", "mlp9999x_gelu", "mlp3x_gelu", "openai/clip-vit-large-patch14-336")
    kinds += ("qwen3", "mrope", "rms_norm", "silu")
    return {name: retell(rng, (base / name).read_bytes(), kinds)}


def answer(folder: Path) -> None:
    """From a checkpoint to two tokens about a picture and a video."""
    engine = zipvl.load(folder, dtype="float32")
    video = np.zeros((2, 20, 30, 3), np.uint8)
    prompt = engine.prepare("What?", images=[Image.new("RGB", (60, 40))], video=video)
    engine.generate(prompt, max_new_tokens=2)


# --- tokenizers ---------------------------------------------------------------------------------


def build_tokenizers(root: Path) -> None:
    """Folders without weights: a tokenizer of each of the kinds of files that hold one."""
    demo = json.loads((DEMO / "model" / "tokenizer.json").read_text())
    for name in ("bytes", "llama", "qwen", "merges", "pieces"):
        folder = root / name
        folder.mkdir(parents=True)
        layout, ids = CHECKPOINTS["onevision"], {"<image>": 5, "<video>": 6}
        if name == "bytes":
            shutil.copy(DEMO / "model" / "tokenizer.json", folder)
            shutil.copy(DEMO / "model" / "tokenizer_config.json", folder)
        elif name == "llama":
            ids = tokenizers_tiny.write_llama_like(folder, ("<image>", "<video>", "<pad>"))
        elif name == "qwen":
            ids = tokenizers_tiny.write_qwen_like(folder)
        elif name == "merges":
            (folder / "vocab.json").write_text(json.dumps(demo["model"]["vocab"]))
            merges = [m if isinstance(m, str) else " ".join(m) for m in demo["model"]["merges"]]
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
            added = {str(t.pop("id")): t for t in demo["added_tokens"]}
            settings = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        else:
            layout = original("LlavaLlama") | {
                "mm_vision_tower": "openai/clip-vit-large-patch14-336"
            }
            (folder / "tokenizer.model").write_bytes(sentencepiece())
            (folder / "added_tokens.json").write_text('{"<pad>": 282}')
            (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
        tokens = {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
        (folder / "config.json").write_text(json.dumps(layout | tokens))


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def sentencepiece(extra: tuple[str, ...] = ()) -> bytes:
    """A tokenizer.model: <unk> <s> </s>, the bytes, letters and pairs of them."""
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    letters = [*"▁etaoinsrhldcuWt?", "th", "▁t", "▁th", "in", "er", "▁a", "on", *extra]
    pieces = special + [(text, 1) for text in dict.fromkeys(letters)]
    told = [
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -float(i)) + field(3, kind))
        for i, (text, kind) in enumerate(pieces)
    ]
    return b"".join(told) + field(2, field(3, 2)) + field(3, field(1, b"identity"))


GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BOMBS = (  # normalizers and pre-tokenizers: text that grows, patterns that try every way
    {"type": "Sequence", "normalizers": [GROW] * 40},
    {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "b"},
    {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": True},
    {"type": "Prepend", "prepend": "a" * 10**6},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
)


def tokenizer(rng: Random, base: Path) -> Files:
    path = rng.choice([p for p in sorted(base.iterdir()) if p.name != "config.json"])
    data = path.read_bytes()
    if rng.random() < 0.07:
        return {path.name: rng.choice(STRANGE)}
    if path.suffix == ".json" and rng.random() < 0.9:
        return {path.name: retell(rng, data, BOMBS)}
    if path.suffix == ".model" and rng.random() < 0.3:
        long = rng.choice("▁te") * rng.choice((10, 1000, 30_000, 10**6))
        return {path.name: sentencepiece((long, "x" + long, long[:-1] + "y"))}
    return {path.name: damage(rng, data)}


TEXT = "What is in the picture? Éç 漢字 🙂\n\t 12345  " + "a" * 3000


def chat(folder: Path) -> None:
    """From a checkpoint's text files to token ids and back."""
    talk = Chat.from_folder(folder, read_config(folder))
    picture = [{"type": "image"}, {"type": "text", "text": "What?"}]
    words = [{"type": "text", "text": TEXT}]
    for messages in (
        [("user", picture)],
        [("user", picture), ("assistant", words), ("user", words)],
    ):
        runs = talk.tokenize([{"role": role, "content": parts} for role, parts in messages])
        talk.decode([i for run in runs if not isinstance(run, str) for i in run])


# --- chat templates -----------------------------------------------------------------------------

ATOMS = (
    "'a'", "''", "3", "0", "-1", "2.5", "none", "true", "[]", "{}", "[1, 2, 3]", "messages", "m",
    "messages[0]", "messages[0].content", "messages[-1].role", "bos_token", "nothing", "loop.index",
    "loop", "self", "range", "namespace", "ns", "ns.x", "cycler", "joiner()", "lipsum", "strftime_now",
    "raise_exception", "add_generation_prompt", "'%s'", "'{0}'", "'a' * 1000", "range(9)",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or")
LARGE = ("10**5", "10**7", "10**10", "99999", "2**63", "10**400", "-10**9")
FILTERS = (
    "list", "join", "join('b')", "length", "upper", "trim", "tojson", "tojson(indent=N)", "center(N)",
    "indent(N)", "wordwrap(N)", "batch(N)", "slice(N)", "format(N)", "replace('a', 'aaa')", "urlize",
    "truncate(N)", "xmlattr", "sum", "sort", "unique", "groupby('role')", "map('upper')", "first", "last",
    "selectattr('type')", "reverse", "string", "int", "float", "round(N)", "escape", "striptags", "items",
    "pprint", "random", "dictsort", "attr('__class__')", "filesizeformat", "wordcount", "default(N)",
)  # fmt: skip
CALLS = (
    "ljust(N)", "zfill(N)", "rjust(N)", "expandtabs(N)", "format(N)", "join(messages)", "split('a')",
    "encode()", "upper()", "items()", "__class__", "__class__.__mro__", "__globals__", "strip()",
    "splitlines()", "replace('a', 'b' * N)", "translate({97: 'a' * N})", "count('a')", "update(a=1)",
)  # fmt: skip
TRICKS = (
    "{{ 'a' * 10**10 }}", "{{ [0] * 10**9 }}", "{{ '%10000000000d' % 3 }}", "{{ 9**9**9 }}",
    "{{ (10**100000)**1000 }}", "{{ '{:>10000000000}'.format('a') }}", "{{ 'a'|center(10**10) }}",
    "{{ ('a\n' * 10**6)|indent(10**5) }}", "{{ ('a' * 10**6)|list|join('b' * 10**6) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% set ns = namespace(x='aaaa') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}", "{{ lipsum(n=100000, max=10000) }}",
    "{{ messages|tojson(indent=10**9) }}", "{{ strftime_now('%Y' * 10**7) }}", "{{ ('http://' * 10**5)|urlize }}",
    "{{ ('<a ' * 10**5)|striptags }}", "{{ ('a' * 10**5)|wordwrap(1) }}", "{{ range(99999)|map('string')|join|int ** 9 }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}", "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}", "{% import 'os' as o %}{{ o }}", "{{ raise_exception('no\n\x1b[2J') }}",
    "{{ 'x' * 10**7 }}", "{% for i in range(10**7) %}{% endfor %}", "{{ [1] * 10**7 }}", "{{ 2 ** 10**6 }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{{ -" * 900,
    "{{ " + "[" * 150 + "1" + "]" * 150 + " }}", "{{ 1" + " + 1" * 5000 + " }}", "{{ a" + ".a" * 5000 + " }}",
)  # fmt: skip


def expression(rng: Random, depth: int = 3) -> str:
    if not depth or rng.random() < 0.2:
        return rng.choice(LARGE) if rng.random() < 0.1 else rng.choice(ATOMS)
    a, b = (expression(rng, depth - 1) for _ in range(2))
    number = rng.choice(("2", "7", "300", *LARGE[:3]))
    match rng.randrange(7):
        case 0 | 1:
            return f"({a} {rng.choice(OPERATORS)} {b})"
        case 2 | 3:
            return f"({a})|{rng.choice(FILTERS)}".replace("N", number)
        case 4:
            return f"({a}).{rng.choice(CALLS)}".replace("N", number)
        case 5:
            return rng.choice(
                (f"range({a})", f"({a})[{b}]", f"lipsum({a})", f"dict(a={a})", f"({a})({b})")
            )
        case _:
            return rng.choice(
                (f"[{a}, {b}]", f"{{{a}: {b}}}", f"({a} if {b} else {a})", f"not {a}")
            )


def statement(rng: Random, depth: int = 2) -> str:
    a = expression(rng)
    inner = statement(rng, depth - 1) if depth else "x"
    return rng.choice((
        f"{{{{ {a} }}}}", f"{{{{ {a} }}}}", f"{{% set x = {a} %}}{inner}", f"{{% for m in {a} %}}{inner}{{% endfor %}}",
        f"{{% for m in messages %}}{inner}{{% endfor %}}", f"{{% for i in range(9) %}}{inner}{inner}{{% endfor %}}",
        f"{{% if {a} %}}{inner}{{% elif m %}}{inner}{{% endif %}}", f"{{% macro f(x) %}}{inner}{{% endmacro %}}{{{{ f({a}) }}}}",
        f"{{% set ns = namespace(x={a}) %}}{inner}{{% set ns.x = ns.x + ns.x %}}", f"{{% filter upper %}}{inner}{{% endfilter %}}",
        f"{{% generation %}}{inner}{{% endgeneration %}}", f"{{% call {a} %}}{inner}{{% endcall %}}",
        f"{{% for m in messages recursive %}}{{{{ loop({a}) }}}}{{% endfor %}}", f"{{% block b %}}{inner}{{% endblock %}}",
        "{% break %}", "{% continue %}", "{% raw %}{{", "{#", "{% endfor %}", "{%- -%}",
    ))  # fmt: skip


def template(rng: Random, base: Path) -> Files:
    real = [*BUILT_IN.values(), tokenizers_tiny.CHATML, tokenizers_tiny.VICUNA]
    own = (DEMO / "model" / "chat_template.jinja").read_text()
    parts = re.split(r"({%.*?%}|{{.*?}})", rng.choice([own, *real]))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        match rng.randrange(6):
            case 0 | 1 | 2:
                parts.insert(at, statement(rng))
            case 3:
                parts[at] = rng.choice(parts) if rng.random() < 0.5 else ""
            case 4:
                parts.insert(at, rng.choice(TRICKS) if rng.random() < 0.5 else "")
            case 5:
                parts[at] = re.sub(r"'\w*'|\bm\w*", lambda _: expression(rng), parts[at], count=1)
    text = "".join(parts)
    data = text.encode()
    match rng.randrange(8):
        case 0:
            return {"chat_template.jinja": damage(rng, data)}
        case 1:
            named = [{"name": "default", "template": text}, {"name": "tool_use", "template": own}]
            odd = retell(rng, json.dumps({"chat_template": rng.choice((text, named))}).encode())
            file = rng.choice(("chat_template.json", "tokenizer_config.json"))
            return {"chat_template.jinja": None, file: odd}
        case _:
            return {"chat_template.jinja": data}
