"""llama.cpp next to zipvl: the same random tensors, the same token ids, one interleaved run.

    pip install gguf xllamacpp
    python -m lab.bench.llama_cpp --tokens 2048 --scratch /tmp/gguf --out raw.json

Writes the benchmark's random model as GGUF files in --scratch (2.8 GB for all 24 layers of the
Qwen2-0.5B shape; deleted at the end), loads them in this process through llama.cpp's server
without a port, checks that float32 gives our first token's probabilities, and times

    prefill   the whole prompt and one token
    decode    --new tokens after a cached prompt

Seconds are processor time of the process by thread, for both sides. Start it with
OMP_WAIT_POLICY=passive: idle OpenMP threads of either side then sleep instead of counting.
What differs: llama.cpp rounds activations to 8-bit blocks (q8_0, q4_0), keeps keys and values in
float16 and takes only the last token through the last layer's MLP; zipvl caches float32 here.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import gguf
import torch
import xllamacpp
from torch import Tensor

from ..command import Parser, count, counts, ended
from ..raw import write_json
from .benches import our_steps
from .model import Model
from .timing import CLOCKS, Factory, Row, interleaved, machine, ratios, spread

KINDS = ("f32", "q8_0", "q4_0")
METHODS = ("dense", "fixed:ratio=0.3")


def write_gguf(model: Model, kind: str, path: Path, context: int) -> None:
    """The decoder's tensors, matrices in `kind`; the tokenizer is a list of made-up words."""
    c, out = model.config, gguf.GGUFWriter(path, "qwen2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, c.num_layers)
    out.add_block_count(c.num_layers)
    out.add_context_length(context)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_heads)
    out.add_head_count_kv(c.num_kv_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(c.rope_theta)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list([f"w{i}" for i in range(c.vocab_size)])
    out.add_token_types([gguf.TokenType.NORMAL] * c.vocab_size)
    out.add_token_merges(["w 0"])
    out.add_eos_token_id(0)
    for name, p in model.decoder.named_parameters():
        as_kind = gguf.GGMLQuantizationType[kind.upper() if p.ndim > 1 else "F32"]
        data = gguf.quants.quantize(p.float().numpy(), as_kind)
        theirs = names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        out.add_tensor(theirs or name, data, raw_dtype=as_kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class LlamaCpp:
    """One GGUF behind llama.cpp's server code, called in this process."""

    def __init__(self, path: Path, context: int, threads: int):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.fit_params, params.cache_ram_mib, params.verbosity = False, 0, 0
        self.server = xllamacpp.Server(params)

    def ask(self, ids: list[int], new: int, cached: bool, probs: int = 0) -> dict:
        """Greedy tokens after `ids`; `cached` takes what an earlier call left of the same ids."""
        request = {
            "prompt": ids, "n_predict": new, "cache_prompt": cached, "ignore_eos": True,
            "temperature": 0, "n_probs": probs,
        }  # fmt: skip
        answer = self.server.handle_completions(request)
        if "choices" not in answer:
            raise SystemExit(f"llama.cpp refused {len(ids)} tokens: {str(answer)[:300]}")
        return answer["choices"][0]

    def prefill(self, ids: list[int]) -> Callable[[], object]:
        return lambda: self.ask(ids, 1, cached=False)

    def steps(self, ids: list[int], new: int) -> Callable[[], object]:
        """`new` steps: the last prompt token is computed again and makes the first."""
        self.ask(ids, 1, cached=True)
        return lambda: self.ask(ids, new, cached=True)


def same_model(model: Model, rival: LlamaCpp, ids: Tensor) -> float:
    """The largest difference of the five likeliest first tokens' log-probabilities."""
    [token] = rival.ask(ids.tolist(), 1, cached=False, probs=5)["logprobs"]["content"]
    ours = model.prefill(ids, "dense", room=None)[0][0].log_softmax(-1)
    return max(abs(t["logprob"] - ours[t["id"]].item()) for t in token["top_logprobs"])


def prompt_work(model: Model, ids: Tensor, method: str) -> Callable[[], object]:
    return lambda: model.prefill(ids, method, room=16)


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict:
    model = Model("qwen2-0.5b", "cpu", torch.float32, "auto", args.layers)
    context = max(args.tokens) + args.new + 64
    args.scratch.mkdir(parents=True, exist_ok=True)
    rivals, sizes = {}, {}
    for kind in KINDS:
        path = args.scratch / f"random-{kind}.gguf"
        try:
            write_gguf(model, kind, path, context)
            sizes[kind] = path.stat().st_size
            rivals[kind] = LlamaCpp(path, context, torch.get_num_threads())
        finally:
            path.unlink(missing_ok=True)  # stays mapped until the process ends
    probe = torch.randint(model.config.vocab_size, (200,))
    differs = {kind: same_model(model, rival, probe) for kind, rival in rivals.items()}
    print(f"log-probabilities of first tokens differ by {differs}", file=sys.stderr)
    if differs.get("f32", 0) > 1e-2:
        raise SystemExit("llama.cpp computes another model than zipvl")
    models = {kind: model.packed(kind) for kind in ("full", "int8", "int4")}
    return {
        "machine": machine(args), "layers": model.config.num_layers, "shape": "qwen2-0.5b",
        "dtype": "float32", "clock": args.clock, "passive": os.environ.get("OMP_WAIT_POLICY"),
        "rival": f"llama.cpp in xllamacpp {version('xllamacpp')}: {xllamacpp.get_system_info()}",
        "gguf_bytes": sizes, "packed_bytes": {k: sum(p.packed_bytes for p in m.packs)
                                              for k, m in models.items()},
        "weight_bytes": model.weight_bytes, "logprob_difference": differs,
        "rows": [row for tokens in args.tokens for row in rows(models, rivals, tokens, args)],
    }  # fmt: skip


def rows(
    models: dict[str, Model], rivals: dict[str, LlamaCpp], tokens: int, args: argparse.Namespace
) -> list[Row]:
    """Prefill of both sides, then decoding of both, each in one interleaved run."""
    model, theirs, made = models["full"], rivals.items(), []
    ids = torch.randint(model.config.vocab_size, (tokens,))
    prompt = ids.tolist()
    prefill: dict[str, Factory] = {
        f"zipvl {method}": partial(prompt_work, model, ids, method) for method in METHODS
    }
    prefill |= {f"llama.cpp {kind}": partial(r.prefill, prompt) for kind, r in theirs}
    decode: dict[str, Factory] = {
        f"zipvl {kind}": partial(our_steps, m, [tokens], [tokens], args.new)
        for kind, m in models.items()
    }
    decode |= {f"llama.cpp {kind}": partial(r.steps, prompt, args.new) for kind, r in theirs}
    for bench, runs, steps in (("prefill", prefill, 1), ("decode", decode, args.new)):
        chosen = runs if bench in args.benches else {}
        seconds = interleaved(model.device, args.clock, chosen, args.repeats)
        for name, values in seconds.items():
            made.append({
                "bench": bench, "tokens": tokens, "batch": 1, "run": name, "seconds": values,
                "steps": steps, "seconds_per_step": statistics.median(values) / steps,
                **ratios(seconds, name),
            })  # fmt: skip
    return made


def work(argv: list[str] | None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=counts, default=[2048])
    parser.add_argument("--benches", type=lambda t: t.split(","), default=["prefill", "decode"])
    parser.add_argument("--layers", type=count, help="fewer layers than the shape has")
    parser.add_argument("--new", type=count, default=16, help="decode steps a run")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--scratch", type=Path, required=True, help="for the GGUF files")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(argv)
    args.device = "cpu"
    report = measure(args)
    for row in report["rows"]:
        each = spread([s / row["steps"] for s in row["seconds"]])
        print(f"{row['bench']} {row['tokens']} tokens | {row['run']:<22} | {each} s")
    if args.out:
        write_json(args.out, report)


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main())
