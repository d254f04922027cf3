"""The command line: `mlxq convert | train | inspect | chat | doctor | autotune | parity`.

Only argparse and the modules that declare flags are imported before a command runs, so `mlxq --help` answers
at once. Exit codes: 0 done, 1 doctor or parity found something wrong, 2 bad input (one line on stderr, no
traceback unless MLXQ_TRACEBACK=1), 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from mlxq import __version__, chat, doctor, parity, train

# What bad input raises. Anything else is our own mistake and keeps its traceback.
_BAD_INPUT = (ValueError, TypeError, OSError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """Exit code of one `mlxq` command line (argv without the program's name; default: this process's)."""
    warnings.showwarning = _show_warning
    try:
        args = _parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit: give it something that accepts the bytes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stopped:
        if str(stopped):
            print(f"mlxq: {stopped}", file=sys.stderr)
        return 130
    except _BAD_INPUT as error:
        if os.environ.get("MLXQ_TRACEBACK") == "1":
            raise
        print(f"mlxq: {_message(error)}", file=sys.stderr)
        return 2


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning of ours as one line, without the place in the source; others as Python shows them."""
    if category is RuntimeWarning and str(message).startswith("mlxq"):
        print(f"mlxq: {str(message).removeprefix('mlxq: ')}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


class _Parser(argparse.ArgumentParser):
    """argparse with our form of an error: one line, and where to read more."""

    def error(self, message):
        self.exit(2, f"mlxq: {message}\nTry: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mlxq",
        description="Quantize language models to MLX format and run them on mlxq's own kernels.",
        epilog="Start here: `mlxq chat` talks to a small model that comes with mlxq. `mlxq COMMAND --help` "
        "has every flag of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mlxq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text, add_arguments, run in (
        ("chat", "talk to a model in this terminal, or answer one --prompt", chat.add_arguments, chat.run),
        ("convert", "quantize a Hugging Face or GGUF model to MLX format", _convert_arguments, _convert),
        ("inspect", "show layers, bits, sizes and bits per weight of a model", _inspect_arguments, _inspect),
        ("train", "train scales or weights for the codes they have", train.add_arguments, _train),
        ("eval", "measure quality, size and speed of a model on text", _eval_arguments, _eval),
        (
            "doctor",
            "check this installation and every kernel that runs here",
            doctor.add_arguments,
            doctor.run,
        ),
        (
            "autotune",
            "time the kernels against stock MLX here, and use what is faster",
            _autotune_arguments,
            _autotune,
        ),
        (
            "parity",
            "run a model on every back end here and prove that all give the same answer",
            parity.add_arguments,
            parity.run,
        ),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="Hugging Face folder, hub id, or GGUF file")
    parser.add_argument("dst", metavar="DST", help="folder to write; must not exist")
    parser.add_argument(
        "--bits", type=int, metavar="B", help="bits per weight (default 4; a GGUF keeps its own)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="G",
        help="weights per scale (default 64; a GGUF keeps its own groups of 32)",
    )
    parser.add_argument(
        "--embedding-bits", type=int, metavar="B", help="bits of the embedding and output head"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of scales, norms and layers kept in float (default: the source's; float16 for GGUF)",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=bits:B,group_size:G",
        help="other settings for modules whose whole path, '/' between components, matches the regular "
        "expression; bits:none keeps them in float; may be repeated, the first match wins",
    )
    parser.add_argument(
        "--rules", metavar="FILE", help="TOML or JSON file of such rules; they follow those of --rule"
    )
    parser.add_argument(
        "--allow-unused-rules",
        action="store_true",
        help="remark on a rule that matches no layer, instead of refusing",
    )
    parser.add_argument(
        "--quantization-rule",
        choices=("affine", "mlx"),
        default="affine",
        help="affine: ours, the same bits on every device (default); mlx: the codes of mx.quantize",
    )
    parser.add_argument(
        "--method",
        choices=("auto", "rtn", "gptq", "awq", "awq+gptq", "tune", "train"),
        help="rtn: round to nearest; gptq: keep the layers' outputs on calibration text; awq: scale input "
        "channels, then round; tune: gptq, then train scales and biases; train: gptq, then train each "
        "block's weights, then tune; auto: gptq where it helps, and tune, or at few bits on a GPU train, in "
        "what is left of --minutes (default: auto with --calibration or --minutes, else rtn)",
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="time for auto, tune or train, all included (10)"
    )
    parser.add_argument(
        "--device", metavar="D", help="of tune and train: cpu, cuda or mps of torch (default: the best here)"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text or .jsonl file for gptq and static input scales, or the word model: answers that SRC "
        "itself samples to a set of prompts, kept in the cache folder (default: a text that comes with mlxq)",
    )
    parser.add_argument(
        "--target-bpw",
        type=float,
        metavar="X",
        help="bits per weight of the whole model: each layer gets bits by the KL divergence its error causes",
    )
    parser.add_argument(
        "--plan", metavar="FILE", help="write what --target-bpw chose as a .json file for --rules"
    )
    parser.add_argument(
        "--costs",
        metavar="FILE",
        help="what --target-bpw measures, as .json: written once, then read for other targets",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="write float weights under Hugging Face's names instead, for transformers; takes --dtype",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="anonymous memory to stay below, like 3GB: slower, or refused; not for tune and train",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="start anew where an interrupted run of the same left off"
    )
    parser.epilog = (
        "Under mlx.launch or torchrun several processes share the writing and the measuring of --target-bpw. "
        "They do not share gptq and awq: each solves every layer. tune and train run in one process."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes and estimates of time and memory; write nothing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model folder")
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="keep layers with NaN or Inf in float instead of refusing",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model's tokenizer or config",
    )


def _convert(args: argparse.Namespace) -> int:
    chat.quiet_transformers(args.src)
    from rich.console import Console

    if args.dequantize:
        return _dequantize(args)
    from mlxq.convert import convert
    from mlxq.rules import read_rules

    options = {"method": args.method}
    if args.method in ("tune", "train") or (args.minutes is not None and args.method in (None, "auto")):
        from mlxq.tune import convert_and_tune as convert

        options = {"method": args.method or "auto", "minutes": args.minutes, "device": args.device}
    elif args.minutes is not None or args.device is not None:
        raise ValueError("convert: --minutes and --device are for --method auto, tune and train")
    calibration = args.calibration
    if calibration == "model":
        from mlxq.sampled import sampled_text

        calibration = sampled_text(args.src, trust_remote_code=args.trust_remote_code)
    report = convert(
        args.src,
        args.dst,
        bits=args.bits,
        group_size=args.group_size,
        dtype=args.dtype,
        rules=args.rule + (read_rules(args.rules, args.quantization_rule) if args.rules else []),
        allow_unused_rules=args.allow_unused_rules,
        embedding_bits=args.embedding_bits,
        quantization_rule=args.quantization_rule,
        **options,
        calibration=calibration,
        target_bpw=args.target_bpw,
        plan=args.plan,
        costs=args.costs,
        allow_nonfinite=args.allow_nonfinite,
        overwrite=args.overwrite,
        trust_remote_code=args.trust_remote_code,
        max_memory=args.max_memory,
        resume=not args.no_resume,
        dry_run=args.dry_run,
    )
    console = Console(highlight=False)
    console.print(report.table())
    if (plan := report.planned) is not None:
        from mlxq.checkpoint.summary import human_bytes

        console.print(
            f"Nothing is written. It would take about {plan.seconds:.0f} s, {human_bytes(plan.memory)} of "
            f"memory and {human_bytes(plan.disk)} of disk.",
            markup=False,
        )
        return 0
    console.print(
        f"{report.path} is written in {report.seconds:.1f} s. Try: mlxq chat {args.dst}", markup=False
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    chat.quiet_transformers(args.model)
    return train.run(args)


def _dequantize(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mlxq.checkpoint.plain import dequantize

    options = {"dtype": args.dtype, "overwrite": args.overwrite, "trust_remote_code": args.trust_remote_code}
    report = dequantize(args.src, args.dst, **options)
    console = Console(highlight=False)
    console.print(report.table())
    console.print(f"{report.path} is written in {report.seconds:.1f} s, for transformers", markup=False)
    return 0


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, or GGUF file")


def _inspect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from mlxq.checkpoint.summary import inspect

    Console(highlight=False).print(inspect(args.model).table())
    return 0


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, hub id, or GGUF file")
    parser.add_argument(
        "--against", metavar="FLOAT", help="the float model, of the same kinds: gives KL and top-1"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="MODEL", help="more models for the same report"
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="[DOMAIN=]FILE",
        help="text to measure on; may be repeated (default: a small set that comes with mlxq)",
    )
    parser.add_argument("--windows", type=int, metavar="N", help="windows of text altogether (default 12)")
    parser.add_argument("--length", type=int, metavar="L", help="tokens of a window (default 512)")
    parser.add_argument(
        "--report", action="append", default=[], metavar="FILE", help=".html, .png or .json; may be repeated"
    )
    parser.add_argument("--card", action="store_true", help="add the numbers to MODEL's README.md")


def _eval(args: argparse.Namespace) -> int:
    chat.quiet_transformers(args.model)
    from mlxq import evaluate

    return evaluate.run(args)


def _autotune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="some formats and sizes only, in 12 seconds; default: everything"
    )
    parser.add_argument("--model", metavar="DIR", help="time the layers of this model instead")
    parser.add_argument("--clear", action="store_true", help="remove what was stored, and time nothing")


def _autotune(args: argparse.Namespace) -> int:
    from mlxq.ops import tuning

    if args.clear:
        print(f"{tuning.path()} {'is removed' if tuning.clear() else 'does not exist'}")
        return 0
    if args.model is not None:
        chat.quiet_transformers(args.model)
    from rich.console import Console

    from mlxq.autotune import WrongAnswer, autotune, show

    try:
        outcome = autotune(args.quick, args.model)
    except WrongAnswer as error:
        print(f"mlxq: {error}; nothing was stored. Try: mlxq doctor", file=sys.stderr)
        return 1
    show(outcome, Console(highlight=False))
    print(f"{tuning.path()} is written" + (", and MLXQ_AUTOTUNE=0 is set" if tuning.switched_off() else ""))
    return 0
