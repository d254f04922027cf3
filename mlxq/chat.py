"""`mlxq chat`: talk to a model in a terminal, or answer one prompt for a script.

mlx-lm generates (stream_generate, its prompt cache and the model's own chat template), prompt_toolkit reads
the keyboard, rich renders Markdown. What is here is what lies between them:

    Conversation   messages -> tokens -> the part that the cache does not hold yet -> text, piece by piece
    _Plain, _Live  the pieces on the screen: as they are, or as Markdown
    _Session       the loop: input, commands, Ctrl-C

The answer goes to stdout; everything else that is said in a one-shot run goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# A Ctrl-C is seen between prefill chunks: small enough to stop a long prompt soon, large enough for full
# matrices.
PREFILL_CHUNK = 512
# Tokens within which a repeat is discouraged: more than mlx-lm's 20, which a long sentence escapes.
REPETITION_CONTEXT = 64
TRANSCRIPT_VERSION = 1
# The most likely words of a model as small as the embedded one soon go round in circles without it.
EMBEDDED_REPETITION_PENALTY = 1.1


# ----------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `mlxq chat`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a quantized MLX model, or a hub id; default: SmolLM2-135M, which comes with mlxq",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer TEXT once on stdout and exit (without it, a pipe on standard input is the prompt)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument("--plain", action="store_true", help="show the answer as it is, not as Markdown")
    parser.add_argument(
        "--stats", action="store_true", help="after each answer: tokens, tokens/s, time to first token"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temp", type=_at_least(0.0), default=0.0, metavar="T", help="0 = most likely token (default)"
    )
    sampling.add_argument(
        "--top-p", type=_between(0.0, 1.0), default=1.0, metavar="P", help="default 1: all tokens"
    )
    sampling.add_argument("--top-k", type=_count(0), default=0, metavar="K", help="default 0: all tokens")
    sampling.add_argument(
        "--min-p", type=_between(0.0, 1.0), default=0.0, metavar="P", help="default 0: all tokens"
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=_at_least(1.0),
        metavar="R",
        help=f"above 1 discourages repeats (default 1: off; {EMBEDDED_REPETITION_PENALTY} without MODEL)",
    )
    sampling.add_argument(
        "--max-tokens", type=_count(1), default=1024, metavar="N", help="per answer (default 1024)"
    )
    sampling.add_argument(
        "--seed", type=_count(0), metavar="N", help="the same answer again at a temperature above 0"
    )
    memory = parser.add_argument_group("memory")
    memory.add_argument("--max-kv-size", type=_count(8), metavar="N", help="remember at most N tokens")
    memory.add_argument(
        "--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), metavar="B", help="quantize the memory"
    )
    memory.add_argument(
        "--kv-group-size", type=int, choices=(32, 64, 128), default=64, metavar="G", help="default 64"
    )


def _number(convert, accepts, wanted: str):
    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def _at_least(low: float):
    return _number(float, lambda v: low <= v < float("inf"), f"a number of at least {low:g}")


def _between(low: float, high: float):
    return _number(float, lambda v: low <= v <= high, f"a number from {low:g} to {high:g}")


def _count(low: int):
    return _number(int, lambda v: v >= low, f"a whole number of at least {low}")


def run(args: argparse.Namespace) -> int:
    """Exit code of one chat: 0, or 130 when Ctrl-C stopped a one-shot answer. Bad input raises."""
    if args.max_kv_size is not None and args.kv_bits is not None:
        raise ValueError(
            "chat: --max-kv-size and --kv-bits do not go together: mlx-lm cannot quantize the rotating "
            "cache that --max-kv-size needs (to_quantized is not implemented there); use one of them"
        )
    transcript = read_transcript(Path(args.load)) if args.load is not None else None
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_pipe()
    if prompt is not None and not prompt.strip():
        where = "--prompt" if args.prompt is not None else "standard input"
        raise ValueError(f"chat: the prompt on {where} is empty")
    conversation = open_conversation(args)
    if transcript is not None:
        conversation.restore(transcript)
    if args.system is not None:
        conversation.system = args.system
    if prompt is not None:
        return _answer_once(conversation, prompt, args)
    return _Session(conversation, args).run()


def _read_pipe() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"chat: standard input is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def open_conversation(args: argparse.Namespace) -> Conversation:
    """The model of this command line, loaded, with nothing said yet."""
    quiet_transformers(args.model)
    if args.model is None:
        from mlxq.checkpoint.embedded import embedded_model

        path, name = embedded_model(), "SmolLM2-135M-Instruct"
        if args.repetition_penalty is None:
            args.repetition_penalty = EMBEDDED_REPETITION_PENALTY
    else:
        path, name = args.model, Path(args.model).expanduser().resolve().name

    with _spinner("Loading"):
        import mlx.core as mx

        from mlxq.load import load

        if args.seed is not None:
            mx.random.seed(args.seed)
        model, tokenizer, config = load(path, return_config=True)
    return Conversation(model, tokenizer, Options.of(args), name=name, trained_tokens=_trained_tokens(config))


def quiet_transformers(model: str | None) -> None:
    """Keep transformers from advice on frameworks, and off the network when the model is local.

    Its libraries read the environment when they are imported: call this before.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if model is None or Path(model).expanduser().exists():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _trained_tokens(config: dict) -> int | None:
    for block in (config, config.get("text_config") or {}):
        if isinstance(block.get("max_position_embeddings"), int):
            return block["max_position_embeddings"]
    return None


# ----------------------------------------------------------------------------------------------- conversation


@dataclass(frozen=True)
class Options:
    """How answers are generated; the fields are the flags of the command line."""

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    max_tokens: int = 1024
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})


@dataclass
class Stats:
    """What one answer cost."""

    prompt_tokens: int = 0  # that the template made of the whole conversation
    cached_tokens: int = 0  # of these, already in the cache
    answer_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    finish: str = ""  # stop | length | interrupted

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first: what a reader sees once the answer has begun."""
        seconds = self.seconds - self.first_token_seconds
        return (self.answer_tokens - 1) / seconds if seconds > 0 and self.answer_tokens > 1 else 0.0

    def __str__(self) -> str:
        speed = f", {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""
        count = f"{self.answer_tokens} token{'' if self.answer_tokens == 1 else 's'}"
        return f"{count}{speed}, first token after {self.first_token_seconds:.2f} s"


class Interrupted(Exception):
    """Ctrl-C was seen at a point where the prompt cache is consistent."""


@dataclass
class Conversation:
    """A model, what was said, and a prompt cache that holds a prefix of it.

    model and tokenizer are what mlxq.load returns. The cache holds exactly the tokens in `cached`; each
    answer feeds the tokens after the longest common prefix with what the chat template makes of the whole
    conversation. A template that renders history otherwise than it was generated (Qwen3 drops thoughts)
    costs a trim, or a fresh cache where the model's cache cannot be trimmed.
    """

    model: object
    tokenizer: object
    options: Options = field(default_factory=Options)
    name: str = "model"
    trained_tokens: int | None = None
    system: str | None = None
    messages: list[dict] = field(default_factory=list)
    history: list[Stats] = field(default_factory=list)
    cache: list | None = None
    cached: list[int] = field(default_factory=list)

    def __post_init__(self):
        from mlx_lm.models.cache import RotatingKVCache

        if self.options.kv_bits is not None and any(
            isinstance(c, RotatingKVCache) for c in self._new_cache()
        ):
            raise ValueError(
                f"chat: --kv-bits does not work with {self.name}: its sliding-window layers use mlx-lm's "
                "RotatingKVCache, which cannot be quantized"
            )

    def _new_cache(self) -> list:
        """An empty prompt cache of mlx-lm's, of at most max_kv_size tokens where a layer remembers them all.

        mlx-lm 0.32 does not tell that size to models that make their own cache, and llama is one.
        """
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        most = self.options.max_kv_size
        made = make_prompt_cache(self.model, most)
        if most is None:
            return made
        return [RotatingKVCache(max_size=most, keep=4) if type(c) is KVCache else c for c in made]

    @property
    def notices(self) -> list[str]:
        """What a user should know about this model before the first answer."""
        said = []
        if not self.tokenizer.has_chat_template:
            said.append(f"{self.name} has no chat template: it continues your text instead of answering")
        most = self.options.max_kv_size
        if most is not None and all(getattr(c, "max_size", None) != most for c in self._new_cache()):
            said.append(f"--max-kv-size has no effect: no layer of {self.name} remembers more than it needs")
        return said

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages.clear()
        self.history.clear()
        self._drop_cache()

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Pieces of the answer to `text`, as they are generated.

        The turn joins `messages` when the generator ends, also after a stop (stopped() is asked
        between tokens and between prefill chunks), unless there was not one character of answer: then
        it leaves no trace. Raises ValueError when the model's template refuses the conversation.
        """
        self.messages.append({"role": "user", "content": text})
        said, stats = "", Stats()
        try:
            for piece in self._generate(stats, stopped):
                said += piece
                yield piece
        except BaseException:
            # Not at a point of our choosing: the layers' caches may disagree.
            self._drop_cache()
            raise
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
                self.history.append(stats)
            else:
                self.messages.pop()

    def _generate(self, stats: Stats, stopped) -> Iterator[str]:
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        begin = time.perf_counter()
        wanted = self.tokens()
        fresh = self._align(wanted)
        stats.prompt_tokens, stats.cached_tokens = len(wanted), len(wanted) - len(fresh)

        def progress(done: int, total: int) -> None:
            if stopped() and done < total:
                raise Interrupted

        options = self.options
        stream = stream_generate(
            self.model,
            self.tokenizer,
            fresh,
            max_tokens=options.max_tokens,
            sampler=make_sampler(options.temp, options.top_p, options.min_p, top_k=options.top_k),
            logits_processors=make_logits_processors(
                repetition_penalty=options.repetition_penalty,
                repetition_context_size=REPETITION_CONTEXT,
            ),
            prompt_cache=self.cache,
            prefill_step_size=PREFILL_CHUNK,
            kv_bits=options.kv_bits,
            kv_group_size=options.kv_group_size,
            quantized_kv_start=0,
            prompt_progress_callback=progress,
        )
        self.cached = list(wanted)
        stats.finish = "interrupted"
        try:
            with contextlib.closing(stream):
                for response in stream:
                    stats.seconds = time.perf_counter() - begin
                    if stats.answer_tokens == 0:
                        stats.first_token_seconds = stats.seconds
                    stats.answer_tokens += 1
                    self.cached.append(response.token)
                    if response.finish_reason is not None:
                        stats.finish = response.finish_reason
                    if response.text:
                        yield response.text
                    if response.finish_reason is None and stopped():
                        break
            self._agree(prefilled=True)
        except Interrupted:
            self._agree(prefilled=False)

    def tokens(self) -> list[int]:
        """The conversation as the model's template writes it, ready for the model's answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        if not self.tokenizer.has_chat_template:
            return self.tokenizer.encode("\n".join(m["content"] for m in system + self.messages))
        from jinja2 import TemplateError

        try:
            return list(
                self.tokenizer.apply_chat_template(system + self.messages, add_generation_prompt=True)
            )
        except (TemplateError, TypeError) as error:  # a template is a program by the model's authors
            hint = " (it may have no system role: try without a system prompt)" if self.system else ""
            raise ValueError(
                f"chat: the chat template of {self.name} refuses this conversation: {error}{hint}"
            ) from None

    def _align(self, wanted: list[int]) -> list[int]:
        """Make the cache hold a prefix of `wanted`, and return the rest: at least one token."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        common = 0
        for ours, theirs in zip(self.cached, wanted[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        surplus = len(self.cached) - common
        if self.cache is not None and surplus:
            if can_trim_prompt_cache(self.cache) and trim_prompt_cache(self.cache, surplus) == surplus:
                self.cached = self.cached[:common]
            else:
                self._drop_cache()
        if self.cache is None:
            self.cache = self._new_cache()
            common = 0
        return wanted[common:]

    def _agree(self, prefilled: bool) -> None:
        """Hold `cached` to what the layers say they hold; start over where they disagree, or cannot tell."""
        offsets = {c.offset for c in self.cache if isinstance(getattr(c, "offset", None), int)}
        if not offsets and prefilled:
            return  # state-space layers do not count; every token up to here was fed
        if len(offsets) == 1 and min(offsets) <= len(self.cached):
            self.cached = self.cached[: min(offsets)]
        else:
            self._drop_cache()

    def _drop_cache(self) -> None:
        self.cache, self.cached = None, []

    def transcript(self) -> dict:
        """What /save writes: plain JSON types only."""
        return {
            "mlxq_chat": TRANSCRIPT_VERSION,
            "model": self.name,
            "system": self.system,
            "messages": self.messages,
        }

    def restore(self, transcript: dict) -> None:
        """Become the conversation of a transcript; the model stays this one."""
        self.reset()
        self.system = transcript["system"]
        self.messages = [dict(m) for m in transcript["messages"]]


# ------------------------------------------------------------------------------------------------ transcripts


def read_transcript(path: Path) -> dict:
    """The transcript in a file that /save wrote. Raises FileNotFoundError, or ValueError saying why not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"chat: there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"chat: {path} is not a transcript: {error}") from error
    if not isinstance(found, dict) or "mlxq_chat" not in found:
        raise ValueError(f"chat: {path} is not a transcript that /save wrote")
    if found["mlxq_chat"] != TRANSCRIPT_VERSION:
        raise ValueError(
            f"chat: {path} is a transcript of version {found['mlxq_chat']}; "
            f"this mlxq reads {TRANSCRIPT_VERSION}"
        )
    if not isinstance(found.get("system"), str | None):
        raise ValueError(f"chat: the system prompt in {path} is not text")
    messages = found.get("messages")
    turns = ("user", "assistant")
    if not isinstance(messages, list) or len(messages) % 2:
        raise ValueError(f"chat: the messages in {path} are not pairs of question and answer")
    for index, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.get("role") != turns[index % 2]
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(f"chat: message {index} in {path} is not text from the {turns[index % 2]}")
    return found


def write_transcript(path: Path, transcript: dict) -> None:
    """Write a transcript, whole or not at all.

    Raises FileExistsError rather than replace another file, OSError with one sentence when it cannot write.
    """
    if path.is_dir():
        raise FileExistsError(f"chat: {path} is a folder; give a file name")
    if path.exists() and path.stat().st_size:
        try:
            read_transcript(path)
        except ValueError:
            raise FileExistsError(f"chat: {path} exists and is not a transcript; give another name") from None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # it names the temporary file, which nobody asked for
        raise OSError(f"chat: {path} cannot be written: {error.strerror}") from error
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(transcript, file, ensure_ascii=False, indent=2)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# ----------------------------------------------------------------------------------------------------- screen


class _Plain:
    """Pieces as they are: for pipes, files and terminals that cannot move the cursor."""

    def __init__(self, out):
        self._out, self._last = out, ""

    def __enter__(self):
        return self

    def add(self, piece: str) -> None:
        if self._out.isatty():
            piece = piece.translate(_CONTROLS)
        self._out.write(piece)
        self._out.flush()
        self._last = piece or self._last

    def __exit__(self, *_):
        if not self._last.endswith("\n"):
            self._out.write("\n")
        self._out.flush()


class _Live:
    """Pieces as Markdown, rendered while they come, without flicker.

    Finished blocks (a paragraph, a list, a code block) are printed once and scroll away like any output.
    Only the last, still growing block is redrawn, cut to the rows of the window, so nothing above it is
    ever touched. Each step is one write: erase the old tail, print what is finished, draw the new tail.
    """

    FRAME_SECONDS = 1 / 15

    def __init__(self, console):
        from rich.live import Live

        self._console, self._text, self._drawn = console, "", 0.0
        self._any = False  # whether a block is on the screen already
        self._cursor = "\u258d" if console.encoding.lower().startswith("utf") else "_"
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")

    def __enter__(self):
        self._live.__enter__()
        return self

    def add(self, piece: str) -> None:
        self._text += piece.translate(_CONTROLS)
        if time.monotonic() - self._drawn < self.FRAME_SECONDS:
            return
        self._drawn = time.monotonic()
        *finished, self._text = _blocks(self._text)
        lines = self._render(finished)
        # The cursor is part of the text, so that it stands where the next word will.
        tail = self._lines(self._text.rstrip() + self._cursor)
        self._live.update(_joined(tail[-max(1, self._console.size.height - 2) :]), refresh=not lines)
        if lines:
            self._console.print(_joined(lines))

    def _render(self, blocks: list[str]) -> list:
        lines = []
        for block in blocks:
            rendered = self._lines(block)
            self._any = self._any or bool(rendered)
            lines += rendered
        return lines

    def _lines(self, text: str) -> list:
        """Rendered lines, an empty one before all but the first block: rich pads some blocks only."""
        if not text.strip():
            return []
        lines = self._console.render_lines(_markdown(text), self._console.options, pad=False)
        filled = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        return [[], *lines] if lines and self._any else lines

    def __exit__(self, *_):
        self._live.update("")
        self._live.__exit__(None, None, None)
        if rest := self._render(_blocks(self._text)):
            self._console.print(_joined(rest))


def _joined(lines: list):
    from rich.segment import Segment, Segments

    return Segments([segment for line in lines for segment in (*line, Segment.line())])


def _markdown(text: str):
    """Markdown for rich, with HTML shown as text: rich drops what stands between tags, thoughts too."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    rendered = Markdown(text, code_theme="ansi_dark")
    rendered.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    return rendered


def _blocks(text: str) -> list[str]:
    """The text cut into its Markdown blocks. No later text changes any but the last one."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    starts = [t.map[0] for t in parser.parse(text) if t.level == 0 and t.map and t.nesting >= 0]
    # Lines as markdown-it counts them; str.splitlines knows more line ends than it.
    ends = [0, *(match.end() for match in re.finditer(r"\r\n?|\n", text))]
    cuts = [0, *(ends[line] for line in starts[1:]), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


# What a model's text may do on a terminal is to begin a new line: escape sequences could do anything.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def _is_smart(stream) -> bool:
    """Whether stream is a terminal on which the cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def _console(stderr: bool = False):
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _renderer(plain: bool):
    return _Plain(sys.stdout) if plain or not _is_smart(sys.stdout) else _Live(_console())


def _spinner(text: str):
    """A moving sign of life on stderr while the block runs; nothing when stderr is no terminal."""
    if not _is_smart(sys.stderr):
        return contextlib.nullcontext()
    return _console(stderr=True).status(text)


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _no_echo():
    """Keep what is typed meanwhile off the screen, where it would move the cursor; the prompt gets it."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~(termios.ECHO | termios.ECHONL), *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class _Stop:
    """While entered, Ctrl-C sets a flag that generation looks at between tokens; a second breaks out."""

    def __init__(self):
        self.pressed = False

    def __call__(self) -> bool:
        return self.pressed

    def _handle(self, *_):
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __enter__(self):
        self.pressed = False
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._before)


# --------------------------------------------------------------------------------------------------- one shot


def _answer_once(conversation: Conversation, prompt: str, args: argparse.Namespace) -> int:
    for text in conversation.notices:
        _notice(f"mlxq: {text}")
    with _Stop() as stop, _renderer(args.plain) as screen:
        for piece in conversation.answer(prompt, stop):
            screen.add(piece)
    if stop.pressed:
        return 130
    stats = conversation.history[-1] if conversation.history else None
    if stats is None:
        _notice("mlxq: the model ended its answer before the first character")
    elif stats.finish == "length":
        _notice(f"mlxq: stopped at --max-tokens {args.max_tokens}")
    if args.stats and stats is not None:
        _notice(f"mlxq: {stats}")
    return 0


# ------------------------------------------------------------------------------------------------ interactive


_COMMANDS = {
    "help": ("", "this list"),
    "reset": ("", "forget the conversation (the system prompt stays)"),
    "system": ("[TEXT]", "show or set the system prompt; /system off removes it"),
    "save": ("FILE", "write the conversation to a file"),
    "load": ("FILE", "go on with a saved conversation"),
    "stats": ("", "tokens, speed and memory so far"),
    "quit": ("", "leave (or Ctrl-D)"),
}


class _Session:
    """An interactive chat: reads lines, runs commands, shows answers."""

    def __init__(self, conversation: Conversation, args: argparse.Namespace):
        self.conversation, self.args = conversation, args
        self.smart = _is_smart(sys.stdin) and _is_smart(sys.stdout)
        self.console = _console(stderr=not sys.stdout.isatty())

    def run(self) -> int:
        read = _reader() if self.smart else _read_line
        self._banner()
        while True:
            try:
                text = read()
            except KeyboardInterrupt:
                self.say("Ctrl-D or /quit leaves.")
                continue
            except EOFError:
                return 0
            if not text.strip():
                continue
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if self.command(text) == "quit":
                        return 0
                else:
                    self.answer(text.removeprefix("/") if text.startswith("//") else text)
            except (ValueError, OSError) as error:
                self.complain(str(error).removeprefix("chat: "))

    def _banner(self) -> None:
        self.console.print(f"[bold]{_escape(self.conversation.name)}[/bold] on mlxq")
        self.say("/help shows commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        for text in self.conversation.notices:
            self.say(text)
        if self.conversation.messages:
            self._recall()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, soft_wrap=False)

    def complain(self, text: str) -> None:
        self.console.print(text, style="red", markup=False)

    def answer(self, text: str) -> None:
        """Show the answer to `text`; an error of the model ends the answer and not the program."""
        before = len(self.conversation.history)
        try:
            with _Stop() as stop, _no_echo() if self.smart else contextlib.nullcontext():
                self._stream(text, stop)
        except KeyboardInterrupt:
            pass
        except RuntimeError as error:  # what MLX raises: out of memory, a kernel that failed
            self.complain(f"The answer failed: {error}")
            return
        stats = self.conversation.history[-1] if len(self.conversation.history) > before else None
        if stats is None:
            self.say("Stopped." if stop.pressed else "The model ended its answer before the first character.")
        elif stats.finish == "interrupted":
            self.say("Stopped. What it said so far stays in the conversation.")
        elif stats.finish == "length":
            self.say(f'Stopped at --max-tokens {self.args.max_tokens}; say "go on" for more.')
        if stats is not None:
            if self.args.stats:
                self.say(str(stats))
            trained, used = self.conversation.trained_tokens, stats.prompt_tokens + stats.answer_tokens
            if trained is not None and used > trained:
                self.say(
                    f"This conversation has {used} tokens, the model was trained on {trained}; /reset helps."
                )
        if self.smart:
            self.console.print()

    def _stream(self, text: str, stop: _Stop) -> None:
        pieces = self.conversation.answer(text, stop)
        with contextlib.closing(pieces):
            with _spinner("") if self.smart else contextlib.nullcontext():
                first = next(pieces, None)
            if first is None:
                return
            with _renderer(self.args.plain) as screen:
                screen.add(first)
                for piece in pieces:
                    screen.add(piece)

    def command(self, line: str) -> str:
        """Run one /command and return its name. ValueError for an unknown one, or one without its FILE."""
        name, _, rest = line[1:].partition(" ")
        name, rest = name.strip(), rest.strip()
        if name == "exit":
            name = "quit"
        if name not in _COMMANDS:
            near = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean /{near[0]}?" if near else "/help shows what there is."
            raise ValueError(f"There is no command /{name}; {hint} (// begins a message with a slash)")
        wants = _COMMANDS[name][0]
        if wants == "FILE" and not rest:
            raise ValueError(f"/{name} wants a file name: /{name} chat.json")
        if not wants and rest:
            raise ValueError(f"/{name} takes nothing after it")
        getattr(self, f"_{name}")(*([rest] if wants else []))
        return name

    def _help(self) -> None:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for name, (argument, text) in _COMMANDS.items():
            table.add_row(_escape(f"/{name} {argument}".strip()), text)
        self.console.print(table)
        if self.smart:
            self.say(
                "Enter sends; Alt-Enter or a \\ at the end of a line begins a new one; arrow keys recall."
            )

    def _reset(self) -> None:
        self.conversation.reset()
        self.say("Forgotten. The next message starts a new conversation.")

    def _system(self, text: str) -> None:
        if not text:
            self.say(
                self.conversation.system
                or "There is no system prompt of yours; the model's own applies, if any."
            )
            return
        self.conversation.system = None if text == "off" else text
        self.say(
            "The system prompt is removed."
            if text == "off"
            else "The system prompt holds from the next answer."
        )

    def _save(self, file: str) -> None:
        path = Path(file).expanduser()
        write_transcript(path, self.conversation.transcript())
        self.say(f"Saved {_turns(self.conversation)} to {path}.")

    def _load(self, file: str) -> None:
        self.conversation.restore(read_transcript(Path(file).expanduser()))
        self._recall()

    def _recall(self) -> None:
        self.say(f"Restored {_turns(self.conversation)}.")
        if self.conversation.messages:
            question, answer = (m["content"] for m in self.conversation.messages[-2:])
            self.say(f"> {question}")
            self.say(answer)

    def _stats(self) -> None:
        import mlx.core as mx

        done = self.conversation.history
        if not done:
            self.say("No answers yet.")
            return
        held = sum(c.nbytes for c in self.conversation.cache or [] if not c.empty())
        answered = sum(s.answer_tokens for s in done)
        seconds = sum(s.seconds for s in done)
        self.say(
            f"Last answer: {done[-1]}; "
            f"{done[-1].cached_tokens} of {done[-1].prompt_tokens} prompt tokens cached"
        )
        self.say(f"All answers: {len(done)}, {answered} tokens in {seconds:.1f} s")
        self.say(
            f"Memory: {held / 1e6:.1f} MB for the conversation, {mx.get_peak_memory() / 1e9:.2f} GB peak"
        )

    def _quit(self) -> None:
        pass


def _turns(conversation: Conversation) -> str:
    count = len(conversation.messages) // 2
    return f"{count} turn{'' if count == 1 else 's'}"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _read_line() -> str:
    """One message from a plain terminal: a line, and the next ones while they end in a backslash."""
    lines = []
    while True:
        sys.stderr.write("... " if lines else "> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        lines.append(line.rstrip("\n"))
        if not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1][:-1]


def history_file() -> Path:
    """Where the arrow keys find earlier messages: mlxq/history in XDG_STATE_HOME, or in ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "mlxq" / "history"


def _history():
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with open(path, "ab"):
            return FileHistory(str(path))
    except OSError as error:
        _notice(f"mlxq: messages are not remembered in {path}: {error.strerror}")
        return InMemoryHistory()


def _reader(**devices) -> Callable[[], str]:
    """A function that reads one message from the keyboard; devices are prompt_toolkit's input and output."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.formatted_text import HTML
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts import CompleteStyle

    class Commands(Completer):
        def get_completions(self, document, complete_event):
            typed = document.text_before_cursor
            if re.fullmatch(r"/\w*", typed):
                for name, (argument, text) in _COMMANDS.items():
                    if name.startswith(typed[1:]):
                        end = " " if argument else ""
                        yield Completion(
                            f"/{name}{end}", -len(typed), display=f"/{name} {argument}", display_meta=text
                        )

    keys = KeyBindings()

    @keys.add("enter")
    def _(event):
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event):
        event.current_buffer.newline(copy_margin=False)

    session = PromptSession(
        history=_history(),
        multiline=True,
        key_bindings=keys,
        completer=Commands(),
        # Tab lists what fits below the line, as a shell does: a menu would keep rows empty for itself.
        complete_style=CompleteStyle.READLINE_LIKE,
        reserve_space_for_menu=0,
        enable_open_in_editor=True,
        **devices,
    )

    def read() -> str:
        return session.prompt(HTML("<b>&gt;</b> "), prompt_continuation=HTML("<ansigray>.</ansigray> "))

    return read
