"""Ask a LLaVA-family model about pictures and videos: generate.py -v clip.mp4 -p "What happens?"

The answer streams to stdout and nothing else does; progress and statistics go to stderr.
Exit codes: 0, 1 input or model error, 2 usage, 3 out of memory, 130 Ctrl-C.
"""

import argparse
import os
import sys


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        usage="%(prog)s [-m MODEL] [-v FILE] [-i FILE] [-p TEXT] [options]",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to ask").add_argument
    add(
        "-m",
        "--model",
        metavar="MODEL",
        help="checkpoint folder or hub id (default: bundled demo)",
    )
    add(
        "-v",
        "--video",
        metavar="FILE",
        action="append",
        default=[],
        help="a video; may be repeated",
    )
    add(
        "-i",
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="a picture; may be repeated",
    )
    add(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="the question; '-' reads stdin; none on a terminal: chat",
    )
    add("--system", metavar="TEXT", help="system prompt")
    add("--template", metavar="NAME", help="prompt template: a built-in name or a .jinja file")
    add = parser.add_argument_group("frames of a video").add_argument
    add("-n", "--frames", type=int, default=32, help="how many, uniformly spread (default 32)")
    add("--fps", type=float, help="frames a second instead; --frames is then the most")
    add("--start", type=float, metavar="S", help="from this second")
    add("--end", type=float, metavar="S", help="up to this second")
    add = parser.add_argument_group("the answer").add_argument
    add(
        "--max-new-tokens", type=int, default=256, metavar="N", help="at most so many (default 256)"
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the likeliest token (default)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="likeliest tokens of total mass P (default 1)",
    )
    add(
        "--top-k", type=int, default=0, metavar="K", help="the K likeliest tokens; 0: all (default)"
    )
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add = parser.add_argument_group("which tokens to keep").add_argument
    add(
        "--method",
        metavar="NAME",
        help="zipvl (default), dense, ... or my_file.py:Class; NAME:option=value",
    )
    add("--dense", action="store_true", help="same as --method dense")
    add("--tau", type=float, help="share of attention mass a layer keeps (zipvl; default 0.975)")
    add("--keep-ratio", type=float, metavar="R", help="share of tokens kept (methods with a ratio)")
    add("--probe", metavar="R+R", help="probe rows, recent+random (zipvl; default 64+64)")
    add("--kv-bits", metavar="B", help="cache bits: 4; or 4,2 to keep all, the others at 2 (zipvl)")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    add(
        "--dtype",
        default="auto",
        help="bfloat16, float32, float16 (default: bfloat16 on CUDA and AMX CPUs, else float32)",
    )
    add("--attn", default="auto", help="auto, sdpa, torch-flash, flash-attn (default auto)")
    add("--weights", default="full", metavar="KIND", help="int8, int4: decode faster on a CPU")
    add("--compile", action="store_true", help="torch.compile for prefill; on CUDA graph decoding")
    add = parser.add_argument_group("what to print").add_argument
    add("--stats", action="store_true", help="seconds by stage and kept tokens by layer, on stderr")
    add("--json", action="store_true", help="one JSON object on stdout instead of text")
    add("-q", "--quiet", action="store_true", help="nothing on stderr but errors")
    add("--verbose", action="store_true", help="a traceback with every error")
    return parser


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Faults of the command line that need no model to be seen."""
    choices = (args.method, args.tau, args.keep_ratio, args.probe, args.kv_bits)
    if args.dense and any(choice is not None for choice in choices):
        parser.error(
            "--dense keeps every token in full precision: leave out --method, --tau, --keep-ratio, "
            "--probe and --kv-bits"
        )
    interactive = sys.stdin and sys.stdin.isatty()
    if (args.prompt is None and not interactive) or (args.prompt == "-" and not sys.stdin):
        parser.error("no prompt: give -p TEXT, or -p - to read it from standard input")
    if args.prompt is None and args.json:
        parser.error("--json prints one answer and a chat has many: give -p TEXT")
    if args.kv_bits is not None and args.kv_bits.isdecimal():
        args.kv_bits = int(args.kv_bits)
    if args.probe is not None:
        recent, plus, random = args.probe.partition("+")
        if not (plus and recent.isdecimal() and random.isdecimal()):
            parser.error(f"--probe {args.probe}: write recent+random, for example 64+64")
        args.probe = {"recent": int(recent), "random": int(random)}


def run(args: argparse.Namespace) -> int:
    """Everything after parsing; imports torch late, so that --help and usage errors are quick."""
    import zipvl
    from zipvl import cli
    from zipvl.vision.image import open_image
    from zipvl.vision.local_file import local_file

    for path in args.video:
        local_file(path)  # a mistyped name is told before a large model is loaded
    for path in args.image:
        open_image(path)
    policy = zipvl.load_policy(
        "dense" if args.dense else args.method or "zipvl",
        tau=args.tau, ratio=args.keep_ratio, kv_bits=args.kv_bits, **(args.probe or {}),
    )  # fmt: skip
    show = sys.stderr.isatty() and not args.quiet
    engine = zipvl.load(
        args.model, args.device, args.dtype, args.attn, args.template, show, args.weights,
        args.compile,
    )  # fmt: skip
    if args.model is None and not args.video and not args.image:
        args.video = [str(zipvl.demo_clip())]
    session = cli.Session(engine, policy, args)
    if args.prompt is None:
        return session.chat()
    prompt = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    return session.ask(prompt)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check(args, parser)
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our stdout has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        if args.verbose:
            raise
        code = getattr(e, "code", None)
        known = code in (1, 2, 3)
        what = str(e) if known else f"{type(e).__name__}: {e} (--verbose shows where)"
        print(f"error: {what}", file=sys.stderr)
        return code if known else 1


if __name__ == "__main__":
    sys.exit(main())
